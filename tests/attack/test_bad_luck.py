"""What may happen to an operator: memory, disks and clocks that give out."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from llama2_chat.errors import DISK_FULL
from llama2_chat.loading import load
from llama2_chat.server import login
from model import ChatModel
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving

ROOT = Path(__file__).parents[2]
SETTINGS = {"maxNewTokens": 8, "temperature": 1, "topP": 1, "topK": 0, "repetitionPenalty": 1}
QUESTION = {"messages": [{"role": "user", "content": "Hi"}], "settings": SETTINGS}
ANNA = {"username": "anna", "password": "1"}


def run_out(*_):
    torch.empty(2**60)


@pytest.mark.parametrize("step", ["_load_for_serving", "quantize_int8"])
def test_memory_that_runs_out_while_loading_or_quantising_is_said_with_what_was_needed(
    settings, tiny, monkeypatch, step
):
    # Quantising on a CPU ended in "an unexpected error".
    monkeypatch.setattr(load, step, run_out)
    chat = ChatModel(replace(settings, model_id=str(tiny), quantization="int8")).load()
    assert chat.state == "failed"
    assert "memory ran out while" in chat.status.error
    assert "it needs about 0.0 GB" in chat.status.error
    assert "Choose a smaller model" in chat.status.error


@pytest.fixture(scope="module")
def http(settings, tmp_path_factory):
    """Of somebody who has logged in."""
    folder = tmp_path_factory.mktemp("site")
    site = replace(settings, auth_file=folder / "users.txt", documents_dir=folder / "documents")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(login, "_fits", lambda hashed, password: hashed == password)
        with (
            serving(ScriptedChat(), site, login.Users({"anna": "1"})) as address,
            httpx.Client(base_url=address) as http,
        ):
            assert http.post("/login", data=ANNA).status_code == 200
            yield http


def test_a_disk_that_is_full_while_a_document_comes_in_is_said(http, monkeypatch):
    # "Something went wrong on the server", and a traceback.
    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
    answer = http.post("/page/files", files={"file": ("a.txt", b"word " * 500_000)})
    assert (answer.status_code, answer.json()["error"]["message"]) == (507, DISK_FULL)
    monkeypatch.undo()
    assert http.post("/page/files", files={"file": ("a.txt", b"word " * 500_000)}).status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_stops_nothing():
    # The server did not start, and a model whose progress was shown did not load.
    program = "import sys; from llama2_chat.process import outlive_stderr; outlive_stderr()\n"
    program += "print('ü', file=sys.stderr, flush=True); print('on'); sys.exit('told to nobody')"
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (run.stdout, run.returncode) == ("on\n", 1)


def test_a_clock_that_jumps_ends_no_session_and_no_answer(http, monkeypatch):
    real = time.time
    for number, years in enumerate((10, -10)):
        monkeypatch.setattr(time, "time", lambda jump=years * 365 * 24 * 3600: real() + jump)
        assert http.get("/page/state").status_code == 200
        assert "Hello!" in http.put(f"/page/answers/{number:032x}", json=QUESTION).text
        assert http.post("/login", data={**ANNA, "password": "wrong"}).status_code == 400
        assert http.post("/login", data=ANNA).status_code == 200
    monkeypatch.undo()
    for number in range(2):
        assert "Hello!" in http.get(f"/page/answers/{number:032x}").text  # still kept
