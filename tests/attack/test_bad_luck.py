"""What may happen to an operator: memory, disks and clocks that give out, and signals in mid-answer."""

import errno
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from llama2_chat.errors import DISK_FULL
from llama2_chat.loading import load
from llama2_chat.server import login
from model import ChatModel
from tests.support.certificates import LOCALHOST, SELF_SIGNED, openssl
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.serving import serving
from tests.support.waiting import until

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


# ---- Signals ----


class Paced(Scripted):
    """Says one word, and the other once `free` holds something."""

    def __init__(self, free):
        super().__init__("One ", "two.", gate=lambda: len(self.pieces) != 1 or bool(free))


def make_certificate(folder):
    paths = ("-keyout", folder / "server.key", "-out", folder / "server.crt")
    assert openssl(*SELF_SIGNED, *LOCALHOST, *paths).returncode == 0


@contextmanager
def site(folder, inference_url):
    """`python -W error app.py` with a login, and a client of it."""
    command = [sys.executable, "-W", "error", "app.py", "--port", "0", "--auth-file", folder / "users.txt"]
    command += ["--certfile", folder / "server.crt", "--keyfile", folder / "server.key", "--host", "127.0.0.1"]
    environ = os.environ | {"INFERENCE_URL": inference_url, "DOCUMENTS_DIR": str(folder / "documents")}
    environ |= {"API_KEY_FILE": str(folder / "keys.txt")}
    log = folder / "log.txt"
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, env=environ, stderr=file) as server:
        try:
            until(lambda: "The page is at" in log.read_text() or server.poll() is not None)
            (address,) = re.findall(r"The page is at (\S+)", log.read_text())
            transport = httpx.HTTPTransport(retries=50, verify=False)
            with httpx.Client(base_url=address, transport=transport, timeout=60) as http:
                assert http.post("/login", data=ANNA).status_code == 200
                until(lambda: http.get("/page/state").json()["state"] == "ready")
                yield Site(server, http, log)
        finally:
            server.kill()


class Site:
    def __init__(self, process, http, log):
        self.process, self.http, self.log = process, http, log

    @contextmanager
    def in_mid_answer(self, number):
        """The lines of an answer of which one word is there."""
        with self.http.stream("PUT", f"/page/answers/{number:032x}", json=QUESTION) as answer:
            lines = (json.loads(line) for line in answer.iter_lines() if line.strip())
            next(line for line in lines if "One" in line.get("more", line.get("text", "")))
            yield lines


@pytest.mark.slow
def test_signals_in_mid_answer_end_what_they_should_and_lose_nothing(settings, tmp_path):
    free = []  # until something is in it, an answer is one word
    remote = ScriptedChat(say=lambda messages: Paced(free) if messages[-1]["content"] == "Hi" else Scripted("Hello!"))
    users = tmp_path / "users.txt"
    users.write_text(f"anna:{login.hash_password('1')}\n")
    (keys := tmp_path / "keys.txt").write_text("old\n")
    make_certificate(tmp_path)
    with serving(remote, settings) as inference_url:
        with site(tmp_path, inference_url) as server:
            port = server.http.base_url.port
            before = ssl.get_server_certificate(("127.0.0.1", port))
            with server.in_mid_answer(1) as lines:
                make_certificate(tmp_path)
                users.write_text(users.read_text() + f"bert:{login.hash_password('2')}\n")
                keys.write_text("new\n")
                server.process.send_signal(signal.SIGHUP)
                until(lambda: "keys: 1" in server.log.read_text())
                assert "2 may log in" in server.log.read_text()
                with_key = lambda key: server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})  # noqa: E731
                assert [with_key(key).status_code for key in ("old", "new")] == [401, 200]
                assert ssl.get_server_certificate(("127.0.0.1", port)) != before
                free.append(True)
                assert [*lines][-1]["end"]["reason"] == "stop"
            free.clear()
            with server.in_mid_answer(2):
                server.process.send_signal(signal.SIGINT)
                assert server.process.wait(60) == 0
            assert "Traceback" not in server.log.read_text()
        with site(tmp_path, inference_url) as server:
            kept = server.http.post("/page/files", files={"file": ("a.txt", b"a word")}).json()["id"]
            with server.in_mid_answer(3):
                server.process.kill()
                server.process.wait()
        with site(tmp_path, inference_url) as server:
            until(lambda: server.http.get(f"/page/files/{kept}").json()["status"] == "processed")
            free.append(True)
            with server.in_mid_answer(4) as lines:
                assert [*lines][-1]["end"]["reason"] == "stop"
            assert "Traceback" not in server.log.read_text()
