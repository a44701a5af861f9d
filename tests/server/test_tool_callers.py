"""What the libraries get that people let use tools: tool_callers.py runs them, in an environment of their own."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.types import SamplingParams
from tests.support.environments import environment
from tests.support.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# The official library as all of them take it: pip would look for it for minutes.
PACKAGES = [
    "langchain-openai==1.7.3",
    "pydantic-ai-slim==2.38.0",
    "openai-agents==0.24.0",
    "instructor==1.17.0",
    "openai==3.3.0",
]
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def callers(tmp_path_factory, chat, settings):
    """What came of each task."""
    python = environment(tmp_path_factory.mktemp("tool-callers"), PACKAGES)
    with serving(chat, replace(settings, sampling=LIKELIEST)) as address:
        script = Path(__file__).parents[1] / "support" / "tool_callers.py"
        command = [python, script, f"{address}v1", chat.status.model]
        child = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("task", ["openais", "langchain", "pydantic_ai", "openai_agents", "instructors"])
def test_a_small_task_with_a_tool_comes_to_its_end(callers, task):
    assert "raised" not in callers[task]


@pytest.mark.parametrize("task", ["openais", "langchain"])
def test_a_call_is_the_same_whole_and_streamed(callers, task):
    whole = callers[task]["whole"]
    assert callers[task]["streamed"] == (json.loads(whole["arguments"]) if task == "openais" else whole)


def test_an_agent_takes_the_same_steps_through_responses_and_chats(callers):
    steps = callers["openai_agents"]
    assert steps["responses"] == steps["chat"] == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]


def test_an_object_by_a_call_has_the_shape_that_was_asked_for(callers):
    found = [callers["langchain"]["structured"], callers["pydantic_ai"]["object"], callers["instructors"]["object"]]
    assert [sorted(city) for city in found] == [["country", "name"]] * 3
