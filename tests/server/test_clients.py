"""The libraries that people ask OpenAI with, each with a small task for the embedded model: tests/support/clients/.

They cannot be installed beside what the server needs, so they have environments of their own.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.environments import node_environment, python_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SCRIPTS = Path(__file__).parents[1] / "support" / "clients"
PYTHON = [
    "openai==3.3.0",
    "dspy==3.4.1",
    "guidance==0.3.1",
    "instructor==1.17.0",
    "langchain==1.5.2",
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "llm==0.36",
    "openai-agents==0.24.0",
    "pydantic-ai-slim[openai]==2.38.0",
    "smolagents[openai]==1.26.0",
]
# It wants the official library in its second version.
LLAMA_INDEX = ["llama-index-llms-openai-like==0.8.1"]
NODE = ["openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"]
CLIENTS = [
    "openai",
    "dspy",
    "guidance",
    "instructor",
    "langchain",
    "langchain_retrieval",
    "litellm",
    "llm",
    "openai_agents",
    "pydantic_ai",
    "smolagents",
]


@pytest.fixture(scope="module")
def ask(tmp_path_factory, address, chat):
    """Runs a script, which knows nothing of this machine's accounts and settings."""
    home = tmp_path_factory.mktemp("home")
    # LiteLLM would look prices up.
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    def run(program, script):
        command = [program, script, f"{address}v1", chat.status.model]
        child = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environ)
        assert child.returncode == 0, child.stdout + child.stderr

    return run


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return python_environment(tmp_path_factory.mktemp("python"), PYTHON)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_small_task_comes_to_its_end(ask, python, client):
    ask(python, SCRIPTS / f"with_{client}.py")


@pytest.fixture(scope="module")
def python_for_llama_index(tmp_path_factory):
    return python_environment(tmp_path_factory.mktemp("llama-index"), LLAMA_INDEX)


@pytest.mark.parametrize("client", ["llama_index", "llama_index_evaluators"])
def test_a_small_task_comes_to_its_end_with_llama_index(ask, python_for_llama_index, client):
    ask(python_for_llama_index, SCRIPTS / f"with_{client}.py")


def test_a_small_task_comes_to_its_end_in_javascript(ask, tmp_path):
    node = node_environment(tmp_path, NODE)
    ask(node, shutil.copy(SCRIPTS / "with_node.mjs", tmp_path))  # Node looks for packages beside a script
