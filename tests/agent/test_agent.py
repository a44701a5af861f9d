"""An agent asks, calls and answers, whatever its model and its tools do."""

import asyncio
import json
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llama2_chat.agent import PARAMS, Agent, Calculator, Exchange, Step
from llama2_chat.agent.messages import REMINDER, SMALL_TALK
from llama2_chat.agent.steps import write
from llama2_chat.errors import Busy, ChatError
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.tool_users import a_tool

SUM, ANSWER = write("calculator", "2 * 3"), write("answer", "It is 6.")


def saying(*texts):
    """A model that says one after another, in small pieces."""
    rest = list(texts)

    def say(messages):
        text = rest.pop(0)
        return (
            Scripted(*(text[start : start + 5] for start in range(0, len(text), 5))) if isinstance(text, str) else text
        )

    return ScriptedChat(say=say)


def read(agent, question="What is 2 * 3?"):
    """The steps and the answer."""
    with agent.ask(question) as reply:
        events = list(reply)
    steps = [event for event in events if isinstance(event, Step)]
    assert events[: len(steps)] == steps
    return steps, "".join(events[len(steps) :])


def actions(params):
    return [option["properties"]["action"]["const"] for option in json.loads(params.grammar.text)["anyOf"]]


def test_a_sum_is_computed_and_its_result_read_before_the_answer():
    chat = saying(SUM, ANSWER)
    (step,), answer = read(Agent(chat))
    assert (step.name, step.input, step.result, step.failed, answer) == ("calculator", "2 * 3", "6", False, "It is 6.")
    messages, params = chat.asked[1]
    assert messages[-2] == {"role": "assistant", "content": SUM}
    assert "6" in messages[-1]["content"]
    assert (params.temperature, params.repetition_penalty) == (0, 1)


@pytest.mark.parametrize(
    ("said", "called"),
    [
        ([SUM], ["calculator"]),
        ([write("clock", "now")], ["clock"]),
        ([SUM, write("clock", "now")], ["calculator", "clock"]),
        ([], []),
    ],
)
def test_the_model_chooses_the_tools_and_whether_it_calls_any(said, called):
    steps, answer = read(Agent(saying(*said, ANSWER)))
    assert [step.name for step in steps] == called
    assert answer == "It is 6."


def test_the_answer_streams_and_a_program_reads_it_in_an_event_loop_too():
    pieces = '{"action": "answer", "action_input": "', "Hel", "lo", '"}'

    async def read_it():
        async with Agent(ScriptedChat(reply=Scripted(*pieces))).ask("Hi") as reply:
            return "".join([event async for event in reply]), reply.finish_reason

    assert asyncio.run(read_it()) == ("Hello", "stop")


def test_after_its_steps_the_model_can_only_answer():
    chat = saying(*(write("calculator", f"{number} + 1") for number in range(5)), ANSWER)
    steps, answer = read(Agent(chat))
    assert (len(steps), answer) == (5, "It is 6.")
    assert [actions(params) for _, params in chat.asked] == [["clock", "calculator", "answer"]] * 5 + [["answer"]]
    assert chat.asked[-1][0][-1]["content"].endswith(REMINDER)


def test_when_time_is_up_the_model_can_only_answer():
    chat = saying(ANSWER)
    assert read(Agent(chat, max_seconds=0)) == ([], "It is 6.")
    assert [actions(params) for _, params in chat.asked] == [["answer"]]


def test_when_time_is_up_while_a_step_is_written_it_is_left_and_the_answer_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llama2_chat.agent.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    slow = Scripted(*SUM, gate=lambda: now.__setitem__(0, now[0] + 7) or True)
    assert read(Agent(saying(slow, ANSWER))) == ([], "It is 6.")
    assert (len(slow.pieces), slow.finish_reason) == (len(SUM) - 10, "cancelled")  # counted from the first


def test_an_answer_is_as_long_as_was_asked_whatever_stands_around_it():
    said = write("answer", "One two three.")
    agent = Agent(ScriptedChat(reply=Scripted(*said)), params=replace(PARAMS, max_new_tokens=7))
    with agent.ask("Count") as reply:
        assert "".join(reply) == "One two"
    assert reply.finish_reason == "length"


def test_an_answer_that_was_cut_off_goes_on_where_it_ended_and_ends_with_its_step():
    chat = ScriptedChat(reply=Scripted(' \\"six\\".', '"', "}", " more"))
    with Agent(chat).go_on(Exchange("What is 2 * 3?", [Step("calculator", "2 * 3", "6", 0)], "It is")) as reply:
        assert "".join(reply) == ' "six".'
    assert reply.finish_reason == "stop"
    messages, params = chat.asked[0]
    assert [message["content"] for message in messages[-4:]] == [
        "What is 2 * 3?",
        SUM,
        "Result of 2 * 3: 6",
        '{"action": "answer", "action_input": "It is',
    ]
    assert params.grammar is None


def test_a_reply_is_entered_once_the_model_has_taken_the_question_or_refused_it():
    def refuse(messages):
        raise Busy("Too many questions.")

    with pytest.raises(Busy), Agent(ScriptedChat(say=refuse)).ask("Hi"):
        raise AssertionError

    async def enter():
        async with Agent(ScriptedChat(say=refuse)).ask("Hi"):
            raise AssertionError

    with pytest.raises(Busy):
        asyncio.run(enter())


def test_a_reply_counts_the_tokens_of_all_its_steps():
    with Agent(saying(SUM, ANSWER)).ask("What is 2 * 3?") as reply:
        list(reply)
    pieces = sum(-(-len(text) // 5) for text in (SUM, ANSWER))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (40, pieces)
    assert reply.timing.time_to_first_token_s > 0


def test_a_reply_tells_which_tool_is_being_called():
    called, released = threading.Event(), threading.Event()
    agent = Agent(
        saying(write("tool", 1), ANSWER), [a_tool("tool", lambda input: called.set() or str(released.wait(30)))]
    )
    with agent.ask("Do it") as reply:
        assert called.wait(30)
        assert (reply.calling.name, reply.calling.input) == ("tool", 1)
        released.set()
        list(reply)
        assert reply.calling is None


def test_a_call_that_was_made_already_leads_to_the_answer():
    chat = saying(SUM, SUM, ANSWER)
    steps, answer = read(Agent(chat))
    assert (len(steps), answer) == (1, "It is 6.")
    assert actions(chat.asked[-1][1]) == ["answer"]


def test_a_call_that_is_cut_off_leads_to_the_answer():
    chat = saying(Scripted(SUM[:-4], reason="length"), ANSWER)
    assert read(Agent(chat)) == ([], "It is 6.")


def test_a_server_that_holds_its_model_to_no_grammar_is_understood_all_the_same():
    assert read(Agent(saying("Six, of course.", "Six."))) == ([], "Six.")
    (step,), answer = read(Agent(saying(write("browser", "x"), ANSWER)))
    assert (step.failed, step.result, answer) == (True, "There is no such tool.", "It is 6.")


def hang(input):
    threading.Event().wait(30)


@pytest.mark.parametrize("run", [lambda input: 1 / 0, lambda input: "x" * 10**6, lambda input: None, hang])
def test_whatever_a_tool_does_there_is_one_failed_step_and_an_answer(run):
    chat = saying(write("tool", 1), ANSWER)
    (step,), answer = read(Agent(chat, [a_tool("tool", run, timeout_s=0.2)]))
    assert (step.failed, answer) == (True, "It is 6.")
    assert len(chat.asked[1][0][-1]["content"]) < 300


def test_stop_ends_the_reply_at_once_and_waits_for_no_tool():
    called, released = threading.Event(), threading.Event()
    agent = Agent(
        saying(write("tool", 1), ANSWER), [a_tool("tool", lambda input: called.set() or str(released.wait(30)))]
    )
    reply = agent.ask("Do it")
    assert called.wait(30)
    threading.Timer(0, reply.close).start()
    assert list(reply) == []
    assert reply.finish_reason == "cancelled"
    ended(reply)
    released.set()
    assert (len(agent.plan.chat.asked), [*agent.exchanges]) == (1, [])


def test_stop_frees_the_model_while_it_writes():
    writing = threading.Event()
    answer = Scripted(*ANSWER, gate=lambda: writing.set() or False)
    agent = Agent(saying(answer))
    with agent.ask("Do it") as reply:
        assert writing.wait(30)
    ended(reply)
    assert (answer.finish_reason, reply.finish_reason, [*reply]) == ("cancelled", "cancelled", [])


def ended(reply):
    for thread in threading.enumerate():
        if thread.name == "agent":
            thread.join(30)
            assert not thread.is_alive()


def test_what_the_model_raises_reaches_the_reader():
    agent = Agent(saying(Scripted('{"act', error=Busy("Too many questions."))))
    with agent.ask("Hi") as reply, pytest.raises(Busy, match="Too many"):
        list(reply)
    assert reply.finish_reason == "error"


def test_a_question_comes_with_the_latest_exchanges_their_steps_included():
    chat = saying(*[SUM, ANSWER] * 4)
    agent = Agent(chat, memory=2)
    for number in range(4):
        read(agent, f"Question {number}")
    messages = chat.asked[-2][0]
    contents = [message["content"] for message in messages]
    assert [f"Question {number}" in contents for number in range(3)] == [False, True, True]
    assert contents.count(SUM) == contents.count(ANSWER) == 2
    assert contents[-1] == "Question 3"


def test_no_memory_holds_the_reminder_that_the_answer_must_come():
    chat = saying(ANSWER, ANSWER)
    agent = Agent(chat, max_steps=0)
    read(agent, "Question 0")
    read(agent, "Question 1")
    contents = [message["content"] for message in chat.asked[-1][0]]
    assert contents[-1] == "Question 1" + REMINDER
    assert "Question 0" in contents


def test_each_step_of_a_question_begins_with_the_messages_of_the_one_before():
    chat = saying(SUM, write("clock", "now"), ANSWER)
    read(Agent(chat))
    first, second, third = (messages for messages, _ in chat.asked)
    assert second[: len(first)] == first
    assert third[: len(second)] == second


def test_where_the_window_is_small_old_exchanges_are_left_out_before_any_example():
    chat = saying(*[ANSWER] * 3)
    agent = Agent(chat)
    for _ in range(2):
        read(agent, "word " * 500)
    chat.context_length = 1000
    read(agent)
    messages = chat.asked[-1][0]
    assert SMALL_TALK[0][0] in [message["content"] for message in messages]
    assert sum(message["content"].startswith("word") for message in messages) == 1


@pytest.mark.parametrize("name", ["answer", "", "two words", 'quote"', "calculator"])
def test_a_tool_whose_name_is_unfit_or_taken_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        Agent(ScriptedChat(), [Calculator(), SimpleNamespace(name=name)])


def test_a_tool_may_refuse_in_a_sentence_that_the_model_reads():
    def run(input):
        raise ChatError("There is no such city.")

    chat = saying(write("tool", 1), ANSWER)
    (step,), _ = read(Agent(chat, [a_tool("tool", run)]))
    assert (step.failed, step.result) == (True, "There is no such city.")
    assert "There is no such city." in chat.asked[1][0][-1]["content"]
