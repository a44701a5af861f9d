"""What the libraries get that people put between their program and OpenAI's API: callers.py runs them.

They need the openai library in a version below ours, so they have an environment of their own.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.types import SamplingParams
from tests.support.environments import environment
from tests.support.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PACKAGES = ["langchain-openai==1.7.3", "llama-index-llms-openai-like==0.8.1"]
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20)


def ask(chat, max_new_tokens=20):
    question = [{"role": "user", "content": "Name a colour."}]
    with chat.stream_reply(question, replace(LIKELIEST, max_new_tokens=max_new_tokens)) as reply:
        return "".join(reply)


@pytest.fixture(scope="module")
def callers(tmp_path_factory, chat, settings):
    """What callers.py has to tell of each library."""
    python = environment(tmp_path_factory.mktemp("callers"), PACKAGES)
    ask(chat, 1)  # a prompt from the KV cache may differ in its last bits from one that is computed
    with serving(chat, replace(settings, sampling=LIKELIEST)) as address:
        command = [python, Path(__file__).parents[1] / "support" / "callers.py", f"{address}v1", chat.status.model]
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("library", ["langchain", "llama_index"])
def test_the_libraries_get_what_the_page_would_get_streamed_and_whole(callers, chat, library):
    answers = callers[library]
    assert answers["whole"] == answers["streamed"] == ask(chat)


@pytest.mark.parametrize("library", ["langchain", "llama_index"])
def test_the_libraries_get_json_that_follows_a_schema(callers, library):
    colour = callers[library]["object"]
    assert sorted(colour) == ["blue", "green", "red"]
    assert all(value in range(256) for value in colour.values())


@pytest.mark.parametrize("library", ["langchain", "llama_index"])
def test_what_is_refused_reaches_the_program_as_a_sentence(callers, library):
    assert "'num_beams' with this value is not available here" in callers[library]["refusal"]


def test_usage_batches_coroutines_and_plain_completions_work(callers, chat):
    assert len(list(filter(None, callers["langchain"]["batch"]))) == 4
    assert 0 < callers["langchain"]["usage"] <= 20
    assert callers["llama_index"]["async"] == ask(chat)
    assert callers["llama_index"]["completion"]
