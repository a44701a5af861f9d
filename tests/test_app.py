"""The program's start: what reaches the log, and which model it takes."""

import logging
import re
from pathlib import Path

import pytest

import app
import model
from llama2_chat.remote import RemoteModel
from llama2_chat.settings import Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stderr(monkeypatch, capsys):
    """What a start writes to stderr, whose log nobody has set up before."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    level = app.log.level
    app.log_to_stderr()
    yield lambda: capsys.readouterr().err
    app.log.setLevel(level)


def test_a_line_of_the_program_reaches_stderr(stderr):
    app.log.info("compiled 3 of 6 batch sizes")
    assert "compiled 3 of 6 batch sizes" in stderr()


def test_every_file_writes_to_the_one_log():
    files = [
        ROOT / "app.py",
        ROOT / "model.py",
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "llama2_chat").rglob("*.py"),
    ]
    loggers = re.findall(r"^\w+ = .*getLogger.*$", "\n".join(file.read_text("utf-8") for file in files), re.MULTILINE)
    assert set(loggers) == {'log = logging.getLogger("llama2_chat")'}


def test_of_other_libraries_only_warnings_reach_stderr(stderr):
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble")
    written = stderr()
    assert "trouble" in written
    assert "chatter" not in written


def test_presets_that_make_no_sense_stop_the_start_with_a_sentence(stderr, monkeypatch, tmp_path):
    file = tmp_path / "presets.json"
    file.write_text('{"presets": []}')
    monkeypatch.setattr("sys.argv", ["app.py", "--presets", str(file)])
    assert app.main() == 1
    assert "presets.json: it must hold" in stderr()


def test_servers_answer_if_any_are_named_and_else_a_model_in_this_process():
    assert isinstance(app.make_backend(Settings(inference_url="http://gpu-1:8000")), RemoteModel)
    assert isinstance(app.make_backend(Settings()), model.ChatModel)
