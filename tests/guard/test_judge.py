"""The server of the guard: what it is asked, and everything that is no verdict."""

import asyncio
from dataclasses import replace

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.guard import Judge
from llama2_chat.guard.verdict import LLAMA_GUARD, Verdict
from llama2_chat.remote.client import use_our_http
from llama2_chat.server.probes import NotApplicable, PlannedStart, probe_guard
from tests.support.odd_server import HEAD, OddServer, event, reset, silence, status, words


@pytest.fixture
def server():
    use_our_http()
    server = OddServer()
    server.models = [{"id": "Llama-Guard-3-8B"}]
    server.answer = words("\n\n", "sa", "fe")
    yield server
    server.close()


@pytest.fixture
def judge(settings, server):
    return Judge(replace(settings, guard_url=server.url, guard_key="secret"), verdict_s=10)


def verdict(judge, *said):
    return asyncio.run(judge.judge(*said))


def test_a_verdict_costs_twenty_tokens_at_most_and_is_held_by_a_grammar(judge, server):
    assert verdict(judge, "why?") == Verdict(True)
    (asked,) = server.requests
    assert asked["model"] == "Llama-Guard-3-8B"
    assert asked["messages"] == [{"role": "user", "content": "why?"}]
    assert (asked["max_tokens"], asked["temperature"]) == (20, 0)
    assert asked["structured_outputs"] == {"regex": LLAMA_GUARD.grammar}
    assert server.headers["authorization"] == "Bearer secret"


def test_a_server_that_rejects_the_grammar_is_asked_without_from_then_on(judge, server):
    def strict(asked):
        rejected = status(400, {"error": {"message": "unknown field"}})
        return rejected if "structured_outputs" in asked else words("unsafe\nS1")

    server.answer = strict
    assert verdict(judge, "why?") == verdict(judge, "why?", "so") == Verdict(False, ("S1",))
    assert ["structured_outputs" in asked for asked in server.requests] == [True, False, False, False]


def test_a_server_that_goes_on_with_an_answer_instead_of_judging_it_is_found_out(judge, server):
    """As llama.cpp's does: what the guard says then is the rest of the answer."""
    server.answer = lambda asked: words("" if asked["messages"][-1]["content"] == "safe" else "safe")
    with pytest.raises(ChatError, match="--no-prefill-assistant"):
        verdict(judge, "why?", "My verdict on myself is:")
    (asked,) = server.requests
    assert "structured_outputs" not in asked
    server.answer = words("safe")
    assert verdict(judge, "why?", "so").safe
    assert verdict(judge, "why?", "so").safe
    assert len(server.requests) == 4  # once it is known to judge, nothing more is asked


def test_a_question_that_is_rejected_either_way_leaves_the_grammar_on(judge, server):
    server.answer = status(400, {"error": {"message": "roles must alternate"}})
    with pytest.raises(ChatError):
        verdict(judge, "why?")
    server.answer = words("safe")
    assert verdict(judge, "why?").safe
    assert "structured_outputs" in server.requests[-1]


@pytest.mark.parametrize(
    "answer",
    [
        words("safe", finish="length"),
        words("safe", finish="content_filter"),
        words(),
        words("I think it is safe."),
        status(500, {"error": "out of memory"}),
        status(200, "<html>safe</html>", "text/html"),
        [HEAD, event("safe"), reset],
        [b"safe"],
    ],
)
def test_what_is_no_whole_verdict_is_none(judge, server, answer):
    server.answer = answer
    with pytest.raises(ChatError):
        verdict(judge, "why?")


def test_a_guard_that_is_silent_is_not_waited_for(settings, server):
    server.answer = [HEAD, event("sa"), silence]
    with pytest.raises(ChatError, match="stopped responding"):
        verdict(Judge(replace(settings, guard_url=server.url, guard_model="guard"), verdict_s=0.2), "why?")


def test_a_server_with_several_models_needs_a_name(judge, server):
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ChatError, match="GUARD_MODEL"):
        verdict(judge, "why?")


def test_the_check_before_a_start_asks_the_guard(settings, server):
    start = PlannedStart(replace(settings, guard_url=server.url))
    assert "what it cannot judge is refused" in probe_guard(start)
    server.answer = words("unsafe\nS1")
    with pytest.raises(ChatError, match="talk about the sky unsafe"):
        probe_guard(start)
    server.answer = status(401, {})
    with pytest.raises(ChatError, match=r"The guard's server rejects the key\. Set GUARD_KEY"):
        probe_guard(start)
    with pytest.raises(NotApplicable):
        probe_guard(PlannedStart(settings))
