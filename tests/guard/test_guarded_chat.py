"""A chat behind a guard: what is judged, what the model is asked, and what readers see."""

import asyncio
import threading
from dataclasses import replace

import pytest

from llama2_chat.agent import Agent
from llama2_chat.errors import ModelUnavailable, Unsafe
from llama2_chat.guard.guarded_chat import newest
from llama2_chat.types import SamplingParams
from tests.support.guards import BAD, GOOD, Guard, guarded, saying
from tests.support.scripted import Scripted
from tests.support.tool_users import QUESTION, computing
from tests.support.waiting import until

PARAMS = SamplingParams()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(reply):
    with reply:
        return list(reply)


async def read_in_a_loop(reply):
    async with reply:
        return [piece async for piece in reply]


READERS = {"in a thread": read, "in a loop": lambda reply: asyncio.run(read_in_a_loop(reply))}


@pytest.mark.parametrize("how", READERS)
def test_an_unsafe_message_never_reaches_the_model(settings, how):
    chat = saying(GOOD)
    with guarded(chat, settings) as behind, pytest.raises(Unsafe, match="has not been asked"):
        READERS[how](behind.stream_reply([user(BAD)], PARAMS))
    assert chat.asked == []


@pytest.mark.parametrize("how", READERS)
def test_of_an_unsafe_answer_nothing_is_read(settings, how):
    seen = []
    with guarded(saying(GOOD, BAD), settings) as behind:
        reply = behind.stream_reply([user(GOOD)], PARAMS)
        with pytest.raises(Unsafe, match="not shown"):
            seen += READERS[how](reply)
    assert seen == []
    assert reply.logprobs == ()
    assert reply.finish_reason == "error"


@pytest.mark.parametrize("how", READERS)
def test_a_safe_answer_is_read_once_it_has_been_judged(settings, how):
    guard = Guard()
    with guarded(saying("a ", "kind ", "answer"), settings, guard) as behind:
        reply = behind.stream_reply([user(GOOD)], PARAMS)
        assert READERS[how](reply) == ["a kind answer"]
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens == 3
    assert guard.judged == [(GOOD, None), (GOOD, "a kind answer")]


@pytest.mark.parametrize(("fails", "shown"), [("open", [GOOD]), ("closed", None)])
def test_without_a_verdict_the_operator_decides(settings, caplog, fails, shown):
    chat = saying(GOOD)
    with guarded(chat, replace(settings, guard_fails=fails), Guard(fails=True)) as behind:
        if shown:
            assert read(behind.stream_reply([user(GOOD)], PARAMS)) == shown
        else:
            with pytest.raises(ModelUnavailable, match="cannot judge"):
                read(behind.stream_reply([user(GOOD)], PARAMS))
            assert chat.asked == []
        counted = {sample.labels["verdict"] for sample in samples(behind)}
    assert counted == {"none"}
    assert f"GUARD_FAILS is {fails}" in caplog.text
    assert "The guard's server cannot be reached" in caplog.text


def samples(behind):
    (metric,) = behind.verdicts.collect()
    return [sample for sample in metric.samples if sample.name.endswith("_total")]


def test_verdicts_are_counted(settings):
    with guarded(saying(BAD), settings) as behind:
        for text in (GOOD, BAD):
            with pytest.raises(Unsafe):
                read(behind.stream_reply([user(text)], PARAMS))
        counted = {(each.labels["subject"], each.labels["verdict"]): each.value for each in samples(behind)}
    assert counted == {("message", "safe"): 1, ("message", "unsafe"): 1, ("answer", "unsafe"): 1}


def test_an_answer_that_is_continued_is_judged_whole(settings):
    guard = Guard()
    with guarded(saying(" word"), settings, guard) as behind, pytest.raises(Unsafe):
        read(behind.stream_reply([user(GOOD), assistant("a bad")], PARAMS))
    assert guard.judged == [(GOOD, None), (GOOD, BAD)]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")], "c"),
        ([user("a"), assistant("b"), user("c"), assistant("d")], "c"),
        ([user("a"), assistant("b"), {"role": "tool", "content": "c"}, {"role": "tool", "content": "d"}], "c\n\nd"),
        ([user("a"), {"role": "system", "content": "s"}, user("c")], "a\n\ns\n\nc"),
        ([{"role": "system", "content": "s"}], "s"),
        ([{"role": "system", "content": "s"}, user(" ")], "s\n\n "),
        ([user("a"), assistant("b"), assistant("c")], "a\n\nb\n\nc"),
        ([], ""),
    ],
)
def test_what_is_judged_is_what_was_said_since_the_last_answer(messages, text):
    assert newest(messages) == text


def test_a_completion_is_judged_as_a_text_and_what_follows_it(settings):
    guard, chat = Guard(), saying(GOOD)
    with guarded(chat, settings, guard) as behind:
        assert read(behind.stream_completion(["once", "upon"], PARAMS)) == [GOOD]
        with pytest.raises(Unsafe):
            read(behind.stream_completion(BAD.split(), PARAMS))
    assert guard.judged == [("once upon", None), ("once upon", GOOD), (BAD, None)]
    assert len(chat.asked) == 1


def test_the_steps_of_an_agent_are_judged_and_an_unsafe_one_calls_no_tool(settings):
    guard = Guard()
    with guarded(computing("It is {}."), settings, guard) as behind, Agent(behind).ask(QUESTION) as reply:
        assert str(list(reply)[-1]) == "It is 36."
    judged = [question for question, answer in guard.judged if answer is None]
    assert judged[0] == QUESTION
    assert "36" in judged[1]


def test_of_an_agents_unsafe_answer_nothing_is_told(settings):
    told = []
    with (
        guarded(computing(f"{BAD} {{}}"), settings) as behind,
        Agent(behind).ask(QUESTION) as reply,
        pytest.raises(Unsafe),
    ):
        told.extend(reply)
    assert BAD not in str(told)


def test_who_leaves_frees_the_model_and_what_is_refused_is_told(settings):
    held = threading.Event()
    inner = Scripted(GOOD, gate=held.is_set)
    chat = saying()
    chat.say = lambda _: inner
    with guarded(chat, settings) as behind:
        reply = behind.stream_reply([user(GOOD)], PARAMS)
        reply.__enter__()
        reply.close()
        until(lambda: inner.finish_reason == "cancelled")
        assert list(reply) == []
        chat.say = raising
        with pytest.raises(ModelUnavailable, match="away"):
            read(behind.stream_reply([user(GOOD)], PARAMS))


def raising(_):
    raise ModelUnavailable("The model is away.")


def test_who_leaves_while_the_guard_thinks_asks_no_model(settings):
    chat, guard = saying(GOOD), Guard()

    async def think(*_):
        guard.judged.append("thinking")
        await asyncio.Event().wait()

    guard.judge = think
    with guarded(chat, settings, guard) as behind:
        reply = behind.stream_reply([user(GOOD)], PARAMS)
        until(lambda: guard.judged)
        reply.close()
        assert read(reply) == []
        unread = behind.stream_reply([user(GOOD)], PARAMS)
    assert read(unread) == []  # the server has been stopped
    assert unread.finish_reason == "cancelled"
    assert chat.asked == []
    with pytest.raises(ModelUnavailable, match="being stopped"):
        behind.stream_reply([user(GOOD)], PARAMS)
