"""Whatever a tool does, its call is a step that people and models can read."""

import threading
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace

import pytest

from llama2_chat.agent import tool as tools
from llama2_chat.agent.tool import MAX_CALLS, MAX_RESULT_CHARACTERS, call
from llama2_chat.errors import ChatError


def a_tool(run, name="tool", timeout_s=30):
    return SimpleNamespace(name=name, timeout_s=timeout_s, run=run)


def raising(error):
    def run(input):
        raise error

    return run


def test_a_result_is_a_step_with_name_input_and_seconds():
    step = call(a_tool(lambda input: input * 2), "ab", Future(), 30)
    assert (step.name, step.input, step.result, step.failed) == ("tool", "ab", "abab", False)
    assert 0 <= step.seconds < 5


def test_a_refusal_is_a_failed_step_with_the_tools_own_sentence():
    step = call(a_tool(raising(ChatError("No such city."))), "x", Future(), 30)
    assert (step.result, step.failed) == ("No such city.", True)


@pytest.mark.parametrize(
    "error", [RuntimeError("password=1"), SystemExit(1), CancelledError(), TimeoutError()], ids=repr
)
def test_any_other_error_is_logged_and_told_without_its_words(error, caplog):
    step = call(a_tool(raising(error)), "x", Future(), 30)
    assert (step.result, step.failed) == ("The tool failed.", True)
    assert "The tool tool failed" in caplog.text


@pytest.mark.parametrize("result", [None, b"bytes", 42])
def test_a_result_that_is_no_text_is_a_failed_step(result):
    assert call(a_tool(lambda input: result), "x", Future(), 30).failed


def test_a_megabyte_is_a_failed_step_that_holds_none_of_it():
    step = call(a_tool(lambda input: "x" * 10**6), "x", Future(), 30)
    assert step.failed
    assert "1,000,000 characters" in step.result
    assert call(a_tool(lambda input: "x" * MAX_RESULT_CHARACTERS), "x", Future(), 30).failed is False


def test_half_a_character_in_a_result_is_replaced():
    assert call(a_tool(lambda input: "\ud83d"), "x", Future(), 30).result == "�"


@pytest.mark.parametrize(("own_s", "left_s"), [(0.01, 30), (30, 0.01), (30, -1)])
def test_a_tool_that_hangs_is_a_failed_step_after_its_time_or_what_is_left(own_s, left_s):
    released = threading.Event()
    step = call(a_tool(lambda input: released.wait(30) and "late", timeout_s=own_s), "x", Future(), left_s)
    released.set()
    assert step.failed
    assert "did not answer within" in step.result


def test_a_tool_whose_calls_all_hang_is_not_called_again_until_one_returns():
    released, tool = threading.Event(), a_tool(lambda input: str(released.wait(30)), name="hangs", timeout_s=0.001)
    for _ in range(MAX_CALLS):
        call(tool, "x", Future(), 30)
    assert call(tool, "x", Future(), 30).result == "The tool is busy with other calls."
    assert call(a_tool(lambda input: "fine", name="another"), "x", Future(), 30).result == "fine"
    released.set()
    tools._places["hangs"].acquire(timeout=30)
    tools._places["hangs"].release()
    assert call(a_tool(lambda input: "fine", name="hangs"), "x", Future(), 30).result == "fine"


def test_cancelling_a_call_ends_the_wait_at_once():
    released, outcome = threading.Event(), Future()
    threading.Timer(0, outcome.cancel).start()
    with pytest.raises(CancelledError):
        call(a_tool(lambda input: str(released.wait(30))), "x", outcome, 30)
    released.set()
