"""The Hugging Face Space: what README.md and docs/serving.md promise, and the program as the platform runs it.

The slow tests install what a Space installs, run the tracked files as a user who may write none of them, and need
port 7860. What this machine lacks for that is named, and the tests are skipped.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from huggingface_hub import SpaceCard, SpaceHardware
from playwright.sync_api import expect, sync_playwright
from transformers import LlamaConfig

from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, ZERO_GPU, choose, fetch
from llama2_chat.loading.memory import Gpu, Size, check_memory, choose_precision
from llama2_chat.settings import Settings
from tests.support.browser import CHROMIUM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text("utf-8")
CARD = SpaceCard(README).data

HOST = "someone-llama-2-chat.hf.space"


# ---- what README.md and docs/serving.md say ----


def test_the_space_gets_the_gradio_that_is_pinned():
    assert f"gradio=={CARD.sdk_version}\n" in (ROOT / "requirements.txt").read_text()


def test_the_space_runs_a_file_that_is_there_on_a_python_that_is_supported_and_hardware_that_exists():
    assert (CARD.sdk, CARD.license) == ("gradio", "llama2")
    assert (ROOT / CARD.app_file).is_file()
    assert re.search(rf"Python .*{re.escape(CARD.python_version)}", README)
    assert CARD.suggested_hardware in list(SpaceHardware)
    assert CARD.models == [LLAMA_2_MODEL_ID]


def test_the_space_is_described_within_the_limits_of_the_hub():
    assert len(CARD.short_description) <= 60
    assert {CARD.colorFrom, CARD.colorTo} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert re.fullmatch(r"\d+[mh]", CARD.startup_duration_timeout)


SHAPES = {  # hidden, intermediate, layers, heads, key and value heads
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
PRECISIONS = ("bfloat16", "int8", "int4", "nf4")  # the columns of the table in README.md
# What CUDA reports as the whole of it is less than what is sold.
GPUS = {
    "T4 small": Gpu(15_800_000_000, (7, 5)),
    "A10G small": Gpu(23_800_000_000, (8, 6)),
    "L40S": Gpu(47_700_000_000, (8, 9)),
    "A100 large": Gpu(85_000_000_000, (8, 0)),
}


def size_of(model):
    hidden, intermediate, layers, heads, kv_heads = SHAPES[model]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    return replace(Size.of(config), kv_cache=Settings.kv_cache)


def table():
    """(hardware, model, precision, GB) of every claim in the table of the section on Spaces."""
    section = SERVING.partition("## As a Hugging Face Space")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (.+?),? \d+ GB \| (.+) \|$", section, re.MULTILINE):
        for claim in re.findall(r"(\d+B) in (\w+)[^|]*?, ([\d.]+) GB", row[1]):
            yield row[0], *claim


@pytest.mark.parametrize(("hardware", "model", "precision", "gb"), list(table()))
def test_the_hardware_table_says_what_the_program_would_do(hardware, model, precision, gb):
    size, gpus = size_of(model), [GPUS[hardware]]
    chosen, _ = choose_precision("auto", size, gpus)
    check_memory(model, chosen, size, gpus)
    assert (chosen, f"{size.needed_bytes(chosen, 4096) / 1e9:.1f}") == (precision.lower(), gb)


def test_the_hardware_table_is_whole_and_a_t4_computes_in_float16():
    assert {(hardware, model) for hardware, model, *_ in table()} == {
        *((hardware, "13B") for hardware in GPUS),
        ("T4 small", "7B"),
        ("A10G small", "7B"),
        ("L40S", "70B"),
        ("A100 large", "70B"),
    }
    assert choose_precision("none", size_of("7B"), [GPUS["T4 small"]])[0] == "float16"


def test_the_memory_table_of_the_readme_says_what_the_program_computes():
    rows = re.findall(r"^\| Llama 2 (\d+B)" + r" \| ([\d.]+) GB" * 4 + r" \|$", README, re.MULTILINE)
    assert rows == [
        (model, *(f"{size_of(model).needed_bytes(precision, 4096) / 1e9:.1f}" for precision in PRECISIONS))
        for model in SHAPES
    ]


# ---- as the platform builds and runs it ----

ENVIRONMENT = {
    "SYSTEM": "spaces",
    "SPACE_ID": "someone/llama-2-chat",
    "SPACE_AUTHOR_NAME": "someone",
    "SPACE_REPO_NAME": "llama-2-chat",
    "SPACE_HOST": HOST,
    "SPACE_TITLE": CARD.title,
    "GRADIO_ALLOW_FLAGGING": "never",
    "GRADIO_NUM_PORTS": "1",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_THEME": "huggingface",
    "PYTHONUNBUFFERED": "1",
}
USER_ID = 1000  # of a Space's user


def python_of_the_space():
    if sys.version_info[:2] == tuple(map(int, CARD.python_version.split("."))):
        return sys.executable
    return shutil.which(f"python{CARD.python_version}") or pytest.skip(f"Python {CARD.python_version} is not here")


def without_root():
    """The beginning of a command that runs as a user of no rights, who may read the interpreter wherever it lies."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("the tests run as root and setpriv (package util-linux) is not here")
    user = (f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups")
    return ["setpriv", *user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def listing(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


class Space:
    """A home with the program's tracked files in it, read-only, and what a Space installs beside it."""

    def __init__(self, folder, settings):
        self.app, self.home, self.python = folder / "app", folder / "home", folder / "venv" / "bin" / "python"
        self._install(folder)
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, tracked.split("\0")):
            (self.app / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.app / name)
        model = fetch(choose(settings, has_gpu=False), lambda *_: None).base.folder
        shutil.copytree(model, self.home / ".cache" / "llama2-chat" / model.name)
        (self.home / "tmp").mkdir()
        for path in (self.home, *self.home.rglob("*")):
            if os.geteuid() == 0:
                os.chown(path, USER_ID, USER_ID)
        for path in (*self.app.rglob("*"), self.app):
            path.chmod(path.stat().st_mode & 0o555)
        self.before = listing(self.app)

    def _install(self, folder):
        subprocess.run([python_of_the_space(), "-m", "venv", folder / "venv"], check=True)
        pip = [self.python, "-m", "pip", "--disable-pip-version-check"]
        # One command, as the log of a Space's build shows it: everything has to agree.
        packages = [f"gradio[oauth,mcp]=={CARD.sdk_version}", "uvicorn>=0.14.0", "websockets>=10.4", "spaces"]
        reached = subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, "spaces"], capture_output=True)
        if reached.returncode:
            pytest.skip("pip reaches no package index")
        installed = subprocess.run(
            [*pip, "install", "-q", "--no-compile", "-r", ROOT / "requirements.txt", *packages],
            capture_output=True,
            text=True,
        )
        assert installed.returncode == 0, installed.stderr

    @contextmanager
    def running(self, **more):
        """The process and its log, once it is ready to chat."""
        home, temporary = str(self.home), str(self.home / "tmp")
        environ = {**ENVIRONMENT, "HOME": home, "TMPDIR": temporary, "PATH": os.environ["PATH"]}
        # What is imported is compiled at the first start and kept for the second; pip would compile all it installs.
        environ["PYTHONPYCACHEPREFIX"] = temporary
        command = [*without_root(), self.python, CARD.app_file]
        log = self.home.parent / "log"
        with (
            log.open("w") as output,
            subprocess.Popen(command, cwd=self.app, env=environ | more, stdout=output, stderr=output) as process,
        ):
            try:
                yield log
            finally:
                process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def space(settings):
    if os.name != "posix":
        pytest.skip("Spaces run on Linux")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("the program's files are listed by git, and this is no git checkout")
    # Not tmp_path, which other users may not enter.
    with tempfile.TemporaryDirectory(prefix="space-") as folder:
        Path(folder).chmod(0o755)
        yield Space(Path(folder), settings)


@pytest.fixture(scope="module")
def running(space):
    """Where the Space answers."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", 7860))
        except OSError:
            pytest.skip("port 7860 is taken on this machine")
    with space.running() as log:
        wait_until_ready("http://127.0.0.1:7860", log)
        yield "http://127.0.0.1:7860"
    assert "Traceback" not in log.read_text()


def wait_until_ready(address, log, seconds=600):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(f"{address}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


long_enough_to_install = pytest.mark.timeout(1800)


@pytest.mark.slow
@long_enough_to_install
def test_a_space_answers_from_a_folder_that_it_cannot_write(running, space):
    assert httpx.get(f"{running}/healthz").json()["model"] == "SmolLM2-135M-Instruct"
    assert Client(running, verbose=False).predict("Say hello.", api_name="/chat", max_new_tokens=8).strip()
    assert listing(space.app) == space.before


@pytest.mark.slow
@long_enough_to_install
def test_behind_the_proxy_of_spaces_every_address_is_https_and_no_cookie_is_set(running):
    proxied = {"Host": HOST, "X-Forwarded-Host": HOST, "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}
    with httpx.Client(base_url=running, headers=proxied) as client:
        assert client.get("/config").json()["root"] == f"https://{HOST}"
        page = client.get("/")
        assert f"http://{HOST}" not in page.text
        assert "set-cookie" not in page.headers
        assert not client.cookies


@pytest.mark.slow
@long_enough_to_install
def test_the_page_of_the_space_chats_in_its_frame_without_third_party_cookies_and_nobody_else_may_frame_it(running):
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--no-proxy-server", "--test-third-party-cookie-phaseout"]
        # Chromium would let no page of the internet frame one of this machine, which here stands for the Space's host.
        arguments.append("--disable-features=LocalNetworkAccessChecks")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        frame = f"<iframe src='{running}' style='width: 100%; height: 700px'></iframe>"
        for outside in ("https://huggingface.co/spaces/someone/llama-2-chat", "https://elsewhere.example/"):
            page.route(outside, lambda route: route.fulfill(body=frame, content_type="text/html"))
        page.goto("https://huggingface.co/spaces/someone/llama-2-chat")
        inside = page.frame_locator("iframe")
        inside.locator("#chat").get_by_role("button", name="Settings").click()
        inside.get_by_role("spinbutton", name="Max new tokens").fill("8")
        inside.get_by_role("textbox", name="Message").fill("Say hello.")
        inside.get_by_role("textbox", name="Message").press("Enter")
        expect(inside.get_by_text("cut off at ‘Max new tokens’")).to_be_visible()
        expect(inside.locator(".insecure")).to_have_count(0)
        with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
            page.goto("https://elsewhere.example/")
        expect(page.frame_locator("iframe").get_by_role("textbox", name="Message")).to_have_count(0)
        browser.close()


@pytest.mark.slow
@long_enough_to_install
def test_on_zero_gpu_the_space_serves_the_small_model_and_says_why(space):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    zero = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": "http://127.0.0.1:9", "PORT": str(port)}
    with space.running(**zero) as log:
        wait_until_ready(f"http://127.0.0.1:{port}", log)
        assert "SmolLM2" in httpx.get(f"http://127.0.0.1:{port}/healthz").json()["model"]
    assert ZERO_GPU in log.read_text()
