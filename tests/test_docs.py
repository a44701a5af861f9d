"""What the documentation names is there: files, folders, headings, flags, variables, metrics."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from llama2_chat.settings import SHOWN_SAMPLING, Settings

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# notes.md is a diary: it names things as they were called on its dates.
CURRENT = [page for page in PAGES if page.name != "notes.md"]
ROOMS = sorted(path.parent.name for path in (ROOT / "llama2_chat").glob("*/__init__.py"))
# A path in backquotes: from the top, or in docs/architecture.md from llama2_chat/.
PATH = re.compile(rf"`((?:llama2_chat|tests|scripts|deploy|data|docs|\.github|{'|'.join(ROOMS)})/[\w./-]*|\.ci/run)`")


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@cache
def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def source(*folders):
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return "\n".join(path.read_text("utf-8") for path in (ROOT / "app.py", ROOT / "model.py", *files))


@each(PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@each(CURRENT)
def test_every_file_that_is_named_is_there(page):
    for path in PATH.findall(page.read_text("utf-8")):
        assert (ROOT / path).exists() or (ROOT / "llama2_chat" / path).exists(), path


@pytest.mark.parametrize("room", ROOMS)
def test_the_architecture_names_every_file(room):
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for path in (ROOT / "llama2_chat" / room).glob("*.py"):
        assert path.name == "__init__.py" or f"`{room}/{path.name}`" in text


def test_every_environment_variable_of_serving_is_read():
    names = {name for knob in fields(Settings) for name in knob.metadata.get("env", ())}
    names |= {name.upper() for name in SHOWN_SAMPLING} | set(re.findall(r'"([A-Z_]+)"', source("llama2_chat")))
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    named = set(re.findall(r"^\| `([A-Z_]+)[=`]", text, re.MULTILINE))
    assert {"MODEL_ID", "API_KEY"} <= named <= names


def test_every_metric_that_is_named_is_counted():
    for name in re.findall(r"`chat_(\w+?)(?:_total)?`", (ROOT / "docs" / "serving.md").read_text("utf-8")):
        assert re.search(f'"(chat_)?{name}"', source("llama2_chat")), name


OTHERS_FLAGS = {  # of vllm, llama.cpp, ray, pip, hf, accelerate, docker, and argparse
    *("--tokenizer", "--tensor-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend"),
    *("--head", "--address", "--index-url", "--repo-type", "--num_processes", "--restart", "--help"),
    *("--no-prefill-assistant", "--config_file", "--ipc", "--shm-size"),
}


@each(CURRENT)
def test_every_flag_that_is_named_exists(page):
    given = {f"--{knob.name.replace('_', '-')}" for knob in fields(Settings)}
    given |= set(re.findall(r'"(--[\w-]+)"', source("llama2_chat", "scripts")))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text("utf-8"))) <= given | OTHERS_FLAGS


@each([ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"])
def test_every_name_of_the_code_is_in_the_code(page):
    known = {"mypy", *re.findall(r"\w+", source("llama2_chat", "scripts", "tests"))}
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", prose):
        assert (ROOT / name).is_file() or set(name.split(".")) - {"py"} <= known, name
