"""The routes by which the page asks: an answer outlives its reader's connection, and is nobody else's."""

import json
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from llama2_chat.agent import Calculator
from llama2_chat.agent.steps import write
from llama2_chat.errors import Busy
from llama2_chat.page import answering as page_answering
from llama2_chat.page import answers as page_answers
from llama2_chat.page.answering import Answering
from llama2_chat.page.routes import DECISIONS, Decisions, page_router
from llama2_chat.page.visitors import Visitors
from llama2_chat.presets import NO_PRESETS
from llama2_chat.server.limits import LONG_TEXT, ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.types import SamplingParams, Status
from tests.support.scripted import READY, Scripted, ScriptedChat, raising
from tests.support.serving import listening
from tests.support.tool_users import QUESTION as TOOL_QUESTION
from tests.support.tool_users import a_tool, computing
from tests.support.waiting import until

ID, OTHER = "0" * 32, "1" * 32
SETTINGS = {"maxNewTokens": 64, "temperature": 0.6, "topP": 0.9, "topK": 50, "repetitionPenalty": 1.1}
QUESTION = {"messages": [{"role": "user", "content": "Hi"}], "settings": SETTINGS}


class Gate:
    """Opened by set(), it lets a whole answer out; by one(), a single piece."""

    def __init__(self):
        self._open, self._pieces = threading.Event(), threading.Semaphore(0)
        self.set, self.one = self._open.set, self._pieces.release

    def __call__(self):
        return self._open.is_set() or self._pieces.acquire(blocking=False)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def chat(gate):
    return ScriptedChat(say=lambda messages: Scripted("Once ", "upon ", "a time.", gate=gate))


@contextmanager
def site(chat, limiter=None, gradio=None, metrics=None, tools=(), decisions=DECISIONS):
    def build():
        app, limit = FastAPI(), limiter or ConcurrencyLimiter(0)
        visitors = Visitors(gradio, has_login=gradio is not None)
        answering = Answering(chat, limit, metrics or Metrics(chat))
        app.include_router(page_router(answering, limit, SamplingParams(), visitors, tools, decisions=decisions))
        return uvicorn.Config(app, port=0, log_level="warning")

    with listening(build) as port:
        yield f"http://127.0.0.1:{port}/page/"


@pytest.fixture
def address(chat):
    with site(chat) as address:
        yield address


@pytest.fixture
def anna(address):
    with visitor(address) as http:
        yield http


@contextmanager
def visitor(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        http.get("state")
        yield http


def events(response):
    return [json.loads(line) for line in response.iter_lines() if line]


def whole(response):
    """All the text of a stream that has ended, and its end."""
    *pieces, end = events(response)
    return "".join(each.get("text", "") + each.get("more", "") for each in pieces), end["end"]


def test_an_answer_streams_as_it_grows_and_ends_with_what_it_cost(anna, gate):
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        lines = (json.loads(line) for line in response.iter_lines() if line)
        assert next(lines)["text"] == ""
        gate.one()
        assert "Once " in next(line["more"] for line in lines if "more" in line)
        gate.set()
        *_, last = lines
    assert last["end"]["reason"] == "stop"
    assert last["end"]["completionTokens"] == 3


def test_whoever_was_cut_off_reads_on_and_the_question_was_asked_once(anna, chat, gate):
    # A reload lost the answer under way.
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        next(response.iter_lines())
    gate.one()
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        next(response.iter_lines())
    gate.set()
    assert whole(anna.get(f"answers/{ID}"))[0] == "Once upon a time."
    assert len(chat.asked) == 1


def test_long_questions_are_encoded_one_after_another_and_a_short_one_waits_for_none_of_them():
    encoding, released = [], threading.Event()

    def say(messages):
        if len(messages[-1]["content"]) > LONG_TEXT:
            encoding.append(messages)
            assert released.wait(60)
        return Scripted("Read.")

    long = {**QUESTION, "messages": [{"role": "user", "content": "x" * (LONG_TEXT + 1)}]}
    with site(ScriptedChat(say=say)) as address, ExitStack() as stack:
        readers = [stack.enter_context(visitor(address)) for _ in range(3)]
        streams = [
            stack.enter_context(http.stream("PUT", f"answers/{number:032}", json=long))
            for number, http in enumerate(readers, 1)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            next(each)  # it is under way
        until(lambda: encoding)
        with visitor(address) as another:
            assert whole(another.put(f"answers/{ID}", json=QUESTION))[0] == "Read."
        assert len(encoding) == 1
        released.set()
        until(lambda: len(encoding) == 3)


WITH_TOOLS = {"messages": [{"role": "user", "content": TOOL_QUESTION}], "settings": {**SETTINGS, "useTools": True}}
STEP = {"name": "calculator", "input": '"15% of 240"', "result": "36", "failed": False}


def test_steps_come_before_the_answer_and_stay_for_whoever_reads_it_again():
    with site(computing(), tools=(Calculator(),)) as address, visitor(address) as http:
        read = events(http.put(f"answers/{ID}", json=WITH_TOOLS))
        again = events(http.get(f"answers/{ID}"))
    (step,) = [event["step"] for event in read if "step" in event]
    assert step.pop("seconds") < 5
    assert step == STEP
    assert read.index(next(event for event in read if "step" in event)) < read.index(
        next(event for event in read if event.get("more"))
    )
    assert again[0]["text"] == "It is 36."
    assert [each["result"] for each in again[0]["steps"]] == ["36"]
    assert read[-1]["end"]["reason"] == "stop"


def test_a_tool_that_is_being_called_is_told_of_and_stop_does_not_wait_for_it():
    released = threading.Event()
    slow = a_tool("calculator", lambda input: str(released.wait(30)))
    with (
        site(computing(), tools=(slow,)) as address,
        visitor(address) as http,
        http.stream("PUT", f"answers/{ID}", json=WITH_TOOLS) as response,
    ):
        lines = (json.loads(line) for line in response.iter_lines() if line)
        assert next(line["calling"] for line in lines if "calling" in line)["input"] == '"15% of 240"'
        http.delete(f"answers/{ID}")
        *_, last = lines
    released.set()
    assert last["end"]["reason"] == "cancelled"


def test_a_question_with_tools_comes_with_the_latest_exchanges_and_their_steps():
    chat = computing()
    said = [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Old."},
        {"role": "user", "content": TOOL_QUESTION},
        {"role": "assistant", "content": "36.", "steps": [{**STEP, "seconds": 0.1}]},
        {"role": "user", "content": "Unanswered"},
        {"role": "user", "content": "Hello"},
    ]
    question = {"messages": said, "settings": {**WITH_TOOLS["settings"], "toolsMemory": 1, "systemPrompt": "Be kind."}}
    with site(chat, tools=(Calculator(),)) as address, visitor(address) as http:
        assert whole(http.put(f"answers/{ID}", json=question))[0] == "Hello!"
        assert http.post("fit", json=question).json()["droppedMessages"] == 2
    contents = [message["content"] for message in chat.asked[0][0]]
    assert contents[-5:] == [
        TOOL_QUESTION,
        write("calculator", "15% of 240"),
        "Result of 15% of 240: 36",
        write("answer", "36."),
        "Unanswered\n\nHello",
    ]
    assert "Old." not in "".join(contents)
    assert contents[0].endswith("Be kind.")


@pytest.mark.parametrize(
    ("tools", "change", "sentence"),
    [
        ((), {}, "offers no tools"),
        ((Calculator(),), {"settings": {**WITH_TOOLS["settings"], "toolsMemory": 99}}, "tools_memory must be"),
        (
            (Calculator(),),
            {"messages": [{"role": "user", "content": "Hi", "steps": [{**STEP, "input": "["}]}]},
            "input is not JSON",
        ),
    ],
    ids=["no tools", "memory", "a broken step"],
)
def test_a_question_with_tools_that_makes_no_sense_is_refused_in_words(tools, change, sentence):
    with site(computing(), tools=tools) as address, visitor(address) as http:
        end = whole(http.put(f"answers/{ID}", json={**WITH_TOOLS, **change}))[1]
    assert end["refused"]
    assert sentence in end["error"]


@pytest.mark.parametrize(("allow", "result"), [(True, "done"), (False, "This call was not allowed.")])
def test_a_call_that_asks_first_waits_for_its_visitor_and_for_nobody_else(allow, result):
    tool = a_tool("calculator", lambda input: "done")
    tool.asks_first, tool.version = True, "v1"
    with (
        site(computing(), tools=(tool,)) as address,
        visitor(address) as http,
        visitor(address) as mallory,
        http.stream("PUT", f"answers/{ID}", json=WITH_TOOLS) as response,
    ):
        lines = (json.loads(line) for line in response.iter_lines() if line)
        asks = next(line["calling"]["asks"] for line in lines if "asks" in line.get("calling", {}))
        assert asks == {"call": 1, "description": "does it", "version": "v1"}
        said = {"call": asks["call"], "allow": allow}
        assert mallory.post(f"answers/{ID}/confirm", json=said).status_code == 404
        assert http.post(f"answers/{ID}/confirm", json={**said, "call": 7}).status_code == 204  # of no call that waits
        assert http.post(f"answers/{ID}/confirm", json=said).status_code == 204
        step = next(line["step"] for line in lines if "step" in line)
        assert [*lines][-1]["end"]["reason"] == "stop"
    assert (step["result"], step["failed"]) == (result, not allow)


def test_calls_of_tools_are_counted_and_a_refused_question_with_tools_goes_back(chat):
    metrics = Metrics(chat)
    with site(computing(), metrics=metrics, tools=(Calculator(),)) as address, visitor(address) as http:
        http.put(f"answers/{ID}", json=WITH_TOOLS)
    assert b'chat_tool_calls_total{outcome="ok",tool="calculator"} 1.0' in metrics.text()

    def refuse(messages):
        raise Busy("The line is full.")

    with site(ScriptedChat(say=refuse), tools=(Calculator(),)) as address, visitor(address) as http:
        end = whole(http.put(f"answers/{ID}", json=WITH_TOOLS))[1]
    assert (end["error"], end["refused"]) == ("The line is full.", True)


def test_an_adapter_is_asked_by_its_name_and_its_answers_are_counted():
    chat = ScriptedChat(replace(READY, adapters=("law",)))
    metrics = Metrics(chat)
    with site(chat, metrics=metrics) as address, visitor(address) as http:
        assert http.get("state").json()["adapters"] == ["law"]
        question = QUESTION | {"settings": SETTINGS | {"adapter": "law"}}
        assert whole(http.put(f"answers/{ID}", json=question))[0] == "Hello!"
        assert whole(http.put(f"answers/{OTHER}", json=QUESTION))[0] == "Hello!"
    assert [params.adapter for _, params in chat.asked] == ["law", ""]
    assert b'chat_adapter_answers_total{adapter="law"} 1.0' in metrics.text()
    assert b'chat_adapter_completion_tokens_total{adapter="law"} 1.0' in metrics.text()


def test_stop_ends_an_answer_for_all_its_readers_and_keeps_what_was_written(anna, gate):
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        gate.one()
        lines = (json.loads(line) for line in response.iter_lines() if line)
        assert any("more" in line for line in lines)
        assert anna.delete(f"answers/{ID}").status_code == 204
        *_, last = lines
    assert last["end"]["reason"] == "cancelled"
    assert whole(anna.get(f"answers/{ID}"))[0] == "Once "


def test_somebody_elses_answer_can_be_neither_read_nor_stopped_nor_taken_over(address, anna, gate):
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response, visitor(address) as mallory:
        next(response.iter_lines())
        refusals = [
            mallory.get(f"answers/{ID}"),
            mallory.delete(f"answers/{ID}"),
            mallory.put(f"answers/{ID}", json=QUESTION),
        ]
        gate.set()
        assert whole(anna.get(f"answers/{ID}"))[1]["reason"] == "stop"
    assert {refusal.status_code for refusal in refusals} == {404}
    assert "Once" not in "".join(refusal.text for refusal in refusals)


def test_without_a_login_nothing_can_be_asked_where_one_is_needed(chat):
    gradio = SimpleNamespace(tokens={"token": "anna"}, cookie_id="x")
    with site(chat, gradio=gradio) as address, httpx.Client(base_url=address) as http:
        for method, path in [("GET", "state"), ("PUT", f"answers/{ID}"), ("GET", f"answers/{ID}"), ("POST", "fit")]:
            refusal = http.request(method, path, json=None if method == "GET" else QUESTION)
            assert (refusal.status_code, refusal.json()["error"]["message"]) == (401, "Please log in first.")
        assert http.get("state", headers={"Cookie": "access-token-unsecure-x=token"}).json()["logOutToken"]


def test_an_answer_to_which_nobody_listens_is_given_up(anna, monkeypatch):
    monkeypatch.setattr(page_answering, "UNREAD_WAITING_S", 0.2)
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        next(response.iter_lines())
    time.sleep(1)
    assert whole(anna.get(f"answers/{ID}"))[1]["reason"] == "unread"


def test_an_answer_is_kept_for_a_while_after_its_end_and_then_forgotten(anna, gate, monkeypatch):
    monkeypatch.setattr(page_answers, "KEPT_S", 1.0)
    gate.set()
    assert whole(anna.put(f"answers/{ID}", json=QUESTION))[0] == "Once upon a time."
    until(lambda: anna.get(f"answers/{ID}").status_code == 404)


def test_when_there_are_too_many_the_oldest_that_has_ended_makes_room(anna, gate, monkeypatch):
    monkeypatch.setattr(page_answers, "MOST_ANSWERS", 1)
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        next(response.iter_lines())
        assert anna.put(f"answers/{OTHER}", json=QUESTION).status_code == 429
        gate.set()
        assert whole(anna.get(f"answers/{ID}"))[1]["reason"] == "stop"
    assert whole(anna.put(f"answers/{OTHER}", json=QUESTION))[0] == "Once upon a time."
    assert anna.get(f"answers/{ID}").status_code == 404


def test_one_address_cannot_keep_everybody_else_out(anna, gate, monkeypatch):
    monkeypatch.setattr(page_answers, "MOST_OF_ONE", 1)
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION):
        refused = anna.put(f"answers/{OTHER}", json=QUESTION)
        assert (refused.status_code, "your address" in refused.json()["error"]["message"]) == (429, True)
        gate.set()
        assert whole(anna.get(f"answers/{ID}"))[0] == "Once upon a time."
    assert anna.put(f"answers/{OTHER}", json=QUESTION).status_code == 200


def test_what_waits_for_the_model_to_load_counts_in_its_owners_share_too(chat):
    chat.status = Status(phase="load")
    with (
        site(chat, ConcurrencyLimiter(1)) as address,
        visitor(address) as http,
        http.stream("PUT", f"answers/{ID}", json=QUESTION) as response,
    ):
        next(response.iter_lines())
        refused = whole(http.put(f"answers/{OTHER}", json=QUESTION))[1]
    assert refused["error"].startswith("You have 1 answers on their way")


def test_a_running_answer_counts_in_its_owners_share(chat, gate):
    with (
        site(chat, ConcurrencyLimiter(1)) as address,
        visitor(address) as anna,
        anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response,
    ):
        gate.one()
        assert any("more" in line for line in response.iter_lines())
        refused = whole(anna.put(f"answers/{OTHER}", json=QUESTION))[1]
        gate.set()
    assert refused["refused"]
    assert refused["error"].startswith("You have 1 answers on their way")


def test_what_the_model_refuses_is_said_in_its_own_words_and_marked(anna, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", raising(Busy("The line is full.")))
    end = whole(anna.put(f"answers/{ID}", json=QUESTION))[1]
    assert (end["reason"], end["error"], end["refused"]) == ("error", "The line is full.", True)


def test_what_goes_wrong_inside_is_for_the_log_and_keeps_what_was_written(anna, chat, gate):
    gate.set()
    chat.say = lambda messages: Scripted("Once", error=RuntimeError("CUDA secret"))
    text, end = whole(anna.put(f"answers/{ID}", json=QUESTION))
    assert (text, end["reason"], end["refused"]) == ("Once", "error", False)
    assert "log has the details" in end["error"]


def test_a_message_waits_while_the_model_loads_and_says_for_what(anna, chat, gate):
    gate.set()
    chat.status = Status(phase="download", done_bytes=120_000_000, total_bytes=269_000_000)
    with anna.stream("PUT", f"answers/{ID}", json=QUESTION) as response:
        lines = (json.loads(line) for line in response.iter_lines() if line)
        waiting = next(line["waiting"] for line in lines if "waiting" in line)
        chat.status = READY
        *_, last = lines
    assert waiting == "Downloading the model: 120 of 269 MB"
    assert last["end"]["reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"settings": {**SETTINGS, "seed": "lucky"}}, "seed must be a whole number"),
        ({"settings": {**SETTINGS, "temperature": 99}}, "temperature must be a number from 0 to 5"),
        ({"messages": [{"role": "user", "content": "  "}]}, "Please type a message first."),
    ],
    ids=["seed", "temperature", "blank"],
)
def test_a_question_that_makes_no_sense_is_refused_in_words(anna, change, sentence):
    end = whole(anna.put(f"answers/{ID}", json={**QUESTION, **change}))[1]
    assert end["refused"]
    assert sentence in end["error"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": {"file": "/etc/passwd"}}]}, "content"),
    ],
    ids=["none", "role", "a file"],
)
def test_a_body_that_is_no_conversation_is_refused(anna, change, sentence):
    refusal = anna.put(f"answers/{ID}", json={**QUESTION, **change})
    assert refusal.status_code == 400
    assert sentence in refusal.json()["error"]["message"]


@pytest.mark.parametrize("id", ["1", "x" * 32, "0" * 33])
def test_an_id_that_could_be_guessed_is_refused(anna, id):
    assert anna.put(f"answers/{id}", json=QUESTION).status_code == 400


def test_the_conversation_reaches_the_model_as_it_was_said(anna, chat, gate):
    gate.set()
    said = [
        {"role": "user", "content": "def f():\n    return 1"},
        {"role": "assistant", "content": "An answer"},
        {"role": "user", "content": "half \ud83d, whole \ud83d\ude00"},
    ]
    body = json.dumps({"messages": said, "settings": {**SETTINGS, "systemPrompt": "Be brief.", "seed": "7"}})
    anna.put(f"answers/{ID}", content=body, headers={"Content-Type": "application/json"})
    ((messages, params),) = chat.asked
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1:3] == said[:2]
    assert messages[3]["content"] == "half \ufffd, whole \U0001f600"
    assert params == replace(SamplingParams(), max_new_tokens=64, seed=7, client="127.0.0.1")


SHOWN = {"question": "Where is Oslo on {{today}}?", "answer": "In Norway."}
GUIDED = {
    **SETTINGS,
    "systemPrompt": "It is {{today}}, says {{nobody}}.",
    "examples": [SHOWN],
    "reminder": "(Briefly.)",
    "today": "2026-11-28",
}


def test_examples_and_reminder_reach_the_model_with_the_visitors_day_and_what_was_said_has_none_of_them(
    anna, chat, gate
):
    gate.set()
    said = [{"role": "user", "content": "{{today}}?"}, {"role": "assistant", "content": "A"}, QUESTION["messages"][0]]
    anna.put(f"answers/{ID}", json={"messages": said, "settings": GUIDED})
    ((messages, _),) = chat.asked
    assert messages == [
        {"role": "system", "content": "It is Saturday, 28 November 2026, says {{nobody}}."},
        {"role": "user", "content": "Where is Oslo on Saturday, 28 November 2026?", "is_example": True},
        {"role": "assistant", "content": "In Norway.", "is_example": True},
        *said[:2],
        {"role": "user", "content": "Hi\n\n(Briefly.)"},
    ]


def test_with_tools_examples_stand_behind_those_of_the_tools_and_the_newest_question_is_reminded():
    chat = computing()
    said = [{"role": "user", "content": "First"}, {"role": "assistant", "content": "Old."}, QUESTION["messages"][0]]
    question = {"messages": said, "settings": {**GUIDED, "useTools": True}}
    with site(chat, tools=(Calculator(),)) as address, visitor(address) as http:
        http.put(f"answers/{ID}", json=question)
    contents = [message["content"] for message in chat.asked[0][0]]
    assert contents[-5:] == [
        "Where is Oslo on Saturday, 28 November 2026?",
        write("answer", "In Norway."),
        "First",
        write("answer", "Old."),
        "Hi\n\n(Briefly.)",
    ]


def test_half_an_example_is_refused_in_words_and_the_message_goes_back(anna, chat):
    settings = {**SETTINGS, "examples": [{"question": "Where is Oslo?", "answer": " "}]}
    end = whole(anna.put(f"answers/{ID}", json={**QUESTION, "settings": settings}))[1]
    assert "needs a question and an answer" in end["error"]
    assert end["refused"]
    assert not chat.asked


def test_the_page_is_told_which_controls_it_shows_and_the_rest_stands_at_its_defaults(settings, chat):
    decisions = Decisions.of(replace(settings, settings="basic", notice="Down on Friday."), NO_PRESETS)
    with site(chat, decisions=decisions) as address, visitor(address) as http:
        state = http.get("state").json()
    assert state["controls"] == ["systemPrompt", "maxNewTokens", "temperature"]
    assert (state["announcement"], state["defaults"]["topP"]) == ("Down on Friday.", 0.9)
    assert Decisions.of(replace(settings, settings="hidden"), NO_PRESETS).controls == ()
    assert Decisions.of(settings, NO_PRESETS) == DECISIONS
