"""What would go wrong, asked before it does: a line for each thing that a start of the page needs.

    python app.py --check       with the flags of the start; --json for programs; exit code 1 if something is wrong

The probes go through the rooms that a start goes through, so the sentences are theirs. They run in a process of their
own, which a driver that hangs or a library that crashes takes down alone. Probes import what they need themselves:
a package that is missing costs one line and not the screen.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pickle
import platform
import queue
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.process import python_command
from llama2_chat.server.listen import open_listener
from llama2_chat.settings import Settings

if TYPE_CHECKING:
    from llama2_chat.loading.choose import Checkpoint, Plan
    from llama2_chat.loading.disk import Files
    from llama2_chat.remote import RemoteModel

REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ("3.11", "3.12")
NVIDIA_SMI_LIMIT_S = 30  # below the probe's own limit, which would leave the tool running


@dataclass(frozen=True)
class Finding:
    """What a probe found, in a sentence each. ok is None where the probe does not apply."""

    name: str
    ok: bool | None
    detail: str
    next_step: str = ""
    seconds: float = 0.0


class Skip(Exception):
    """The probe does not apply here, and why."""


def main(settings: Settings) -> int:
    """Print the findings as they come, or as one JSON document. 0 if all are there and none is bad, else 1."""
    findings = []
    sys.stdout.reconfigure(errors="replace")  # a path may hold what this terminal cannot show
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for finding in run(settings):
                findings.append(finding)
                if not settings.json:
                    print(_lines(finding), flush=True)
        if settings.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1), flush=True)
    except BrokenPipeError:  # the reader has what it wanted, as `| head` has; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(len(findings) < len(_probes(settings)) or any(finding.ok is False for finding in findings))


def run(settings: Settings, names: Iterable[str] | None = None) -> Iterator[Finding]:
    """The findings of these probes, by default of all that apply, one after another, each within its time limit."""
    unwell: set[str] = set()
    with contextlib.closing(_Worker(settings)) as worker:
        for name in names or _probes(settings):
            started, needs = time.monotonic(), PROBES[name].needs
            if needs in unwell:
                finding = Finding(name, None, f"not looked at before {needs} is well")
            else:
                finding = worker.ask(name)
            if needs in unwell or finding.ok is False:
                unwell.add(name)
            yield replace(finding, seconds=round(time.monotonic() - started, 2))


def _probes(settings: Settings) -> list[str]:
    return [name for name in PROBES if name not in (HERE if settings.inference_urls else ELSEWHERE)]


def look(name: str, start: Start) -> Finding:
    """What one probe finds, in this process. Whatever it raises becomes a sentence."""
    try:
        return Finding(name, True, PROBES[name].look(start))
    except Skip as reason:
        return Finding(name, None, str(reason))
    except ChatError as error:
        return _bad(name, str(error))
    except ImportError as error:
        what = f"The package {error.name}" if error.name else "A package"
        return _bad(name, f"{what} is missing or broken ({_short(error)}). Run: pip install -r requirements.txt")
    except Exception as error:
        what = f"This probe ended with an unexpected {type(error).__name__} ({_short(error)})"
        return _bad(name, f"{what}. Start without --check: the log then says where it comes from.")


def _bad(name: str, sentences: str) -> Finding:
    """Everybody's are made alike: first what is wrong, then what to do."""
    what, stop, step = sentences.partition(". ")
    return Finding(name, False, what + stop.strip(), step)


def _short(error: Exception) -> str:
    """Its first line, without an end of a sentence in it."""
    return (str(error).strip().split("\n")[0][:160] or type(error).__name__).rstrip(".").replace(". ", "; ")


def _lines(finding: Finding) -> str:
    marks = {True: "✓", False: "✗", None: "–", "then": "→"}
    try:
        "".join(marks.values()).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        marks = {True: "ok", False: "NO", None: "--", "then": "->"}
    indent = " " * (len(marks[True]) + 14)
    lines = [f"{marks[finding.ok]} {finding.name:<13}{finding.detail}"]
    lines += [f"{indent}{marks['then']} {finding.next_step}"] if finding.next_step else []
    width = shutil.get_terminal_size((100_000, 24)).columns  # where nobody watches, as in a pipe, lines stay whole
    wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))


# ---- The process that does the looking ----


class _Worker:
    """Answers one question at a time, in a process that can be ended inside any C call, as no thread can.

    After an answer that did not come the next question gets a new process.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen | None = None

    def ask(self, name: str) -> Finding:
        if self._process is None:
            self._start()
        self._send(name)
        limit_s, if_late = PROBES[name].limit_s, PROBES[name].if_late
        try:
            answer = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            return _bad(name, f"No answer within {limit_s:g} s. {if_late}")
        if answer is None:
            self.close()
            return _bad(name, f"Looking at it crashed Python, as the start would. {if_late}")
        return Finding(**answer)

    def close(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):  # stuck in the kernel, it ends when it can
                process.wait(1)
                process.stdin.close()

    def _start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(python_command("llama2_chat.server.preflight:answer_probes"), **pipes)
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        self._send(self._settings)

    def _send(self, what: object) -> None:
        with contextlib.suppress(OSError):  # the process has died, and ask() will say so
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()


def _read(pipe: IO[bytes], answers: queue.SimpleQueue) -> None:
    with pipe, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            answers.put(pickle.load(pipe))
    answers.put(None)


def answer_probes() -> None:
    """What the process runs: settings and then names of probes come in at stdin, findings go out at stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print what they like, elsewhere
    start = Start(pickle.load(sys.stdin.buffer))
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(asdict(look(pickle.load(sys.stdin.buffer), start)), answers)
            answers.flush()


# ---- The probes: each returns what is well, or raises what is not ----


class Start:
    """The start that is being looked at. What several probes need is found out once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def plan(self) -> Plan:
        from llama2_chat.loading.choose import choose

        return choose(self.settings)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """None if it is the embedded model, which is still to be made."""
        from llama2_chat.loading.choose import fetch
        from llama2_chat.loading.small_model import embedded_is_here

        if self.plan.is_embedded and not embedded_is_here(self.plan.cache_dir):
            return None
        return fetch(self.plan, lambda *_: None)

    @cached_property
    def model(self) -> RemoteModel:
        """Whose servers have each been asked for a token."""
        from llama2_chat.remote import RemoteModel

        return RemoteModel(self.settings).probe()

    @cached_property
    def files(self) -> list[Files]:
        """What holds weights."""
        checkpoint = self.checkpoint
        return [files for files in (checkpoint.base, checkpoint.adapter) if files] if checkpoint else []


def python(start: Start) -> str:
    version = platform.python_version()
    if version.rpartition(".")[0] not in PYTHONS:
        raise ChatError(
            f"This is Python {version}, and the packages are pinned for {' and '.join(PYTHONS)}. "
            f"Make an environment with Python {PYTHONS[0]}."
        )
    return version


def packages(start: Start) -> str:
    from packaging.requirements import Requirement

    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    wrong = []
    for one in wanted:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} is {version} instead of {str(one.specifier).removeprefix('==')}")
    if wrong:
        raise ChatError(f"{', '.join(wrong)}. Run: pip install -r {REQUIREMENTS.name}")
    return f"all {len(wanted)} as pinned"


def gpu(start: Start) -> str:
    card, trouble = _nvidia_smi()
    import torch

    if not torch.cuda.is_available():
        if trouble:
            raise ChatError(f"nvidia-smi fails ({trouble}). Install the NVIDIA driver anew, and restart the computer.")
        if card is None:
            raise Skip("none here, so the model runs on the CPU")
        if torch.version.cuda is None:
            raise ChatError(f"PyTorch {torch.__version__} does not compute on this {card.name}. {card.remedy()}")
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            ones = torch.ones(16, 16, device=index)
            (ones @ ones).sum().item()
    except RuntimeError as error:
        if "No CUDA GPUs are available" in str(error):
            raise Skip("hidden by CUDA_VISIBLE_DEVICES, so the model runs on the CPU") from error
        name = card.name if card else "the GPU"
        remedy = card.remedy() if card else "Update the NVIDIA driver."
        raise ChatError(f"PyTorch {torch.__version__} cannot use {name}: {_short(error)}. {remedy}") from error
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{one.name} (compute capability {one.major}.{one.minor})" for one in found)
    return f"{names}, driver {card.driver if card else 'unknown'}"


class _Card(NamedTuple):
    name: str
    driver: str
    capability: str

    def remedy(self) -> str:
        """How to get a PyTorch that this GPU and its driver can run."""
        driver, capability = float(self.driver.partition(".")[0]), float(self.capability)
        if driver < 525 or capability < 5:
            return "Use a driver of 525 or later, and a GPU of compute capability 5.0 or higher."
        # CUDA 13 begins at driver 580 and Turing; the builds for 12.6 serve what is older.
        cuda = "cu130" if driver >= 580 and capability >= 7.5 else "cu126"
        pin = next(line for line in REQUIREMENTS.read_text("utf-8").splitlines() if line.startswith("torch=="))
        return f"Run: pip install {pin}+{cuda} --index-url https://download.pytorch.org/whl/{cuda}"


def _nvidia_smi() -> tuple[_Card | None, str]:
    """The first GPU, as far as the driver's own tool knows, and what the tool complains about."""
    if not (tool := shutil.which("nvidia-smi")):
        return None, ""
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_LIMIT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {NVIDIA_SMI_LIMIT_S:g} s"
    said = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
    if "No devices were found" in said:
        return None, ""
    if done.returncode or said.count(", ") != 2:
        return None, said.rstrip(".").replace(". ", "; ")
    return _Card(*said.split(", ")), ""


def model(start: Start) -> str:
    from llama2_chat.loading.choose import LLAMA_2_MODEL_ID
    from llama2_chat.loading.hub import check_reachable
    from llama2_chat.loading.load import check_headers, measure
    from llama2_chat.loading.memory import visible_gpus
    from llama2_chat.loading.small_model import check_index

    plan, checkpoint = start.plan, start.checkpoint
    if plan.is_embedded:
        if visible_gpus() and not start.settings.model_id and not start.settings.zero_gpu:
            check_reachable(LLAMA_2_MODEL_ID, cache_dir=plan.hub_cache_dir)  # what a start would log and go on
        if checkpoint is None:
            check_index()
        return f"{plan.model_id}. {plan.why}"
    measure(start.files[0])
    for files in start.files:
        check_headers(files)
    for files in start.files:
        if (missing := files.missing()) and files.repo:
            check_reachable(files.repo, next(iter(missing)), files.cache_dir)
            return f"{plan.model_id}. The Hub lets this account download it."
    return f"{plan.model_id}. All of it is here."


def tokenizer(start: Start) -> str:
    from llama2_chat import prompt
    from llama2_chat.loading.load import load_tokenizer

    if start.checkpoint is None:
        raise Skip("comes with the model, at the first start")
    if prompt.recognise(load_tokenizer(start.checkpoint)) == prompt.LLAMA_2_FORMAT:
        return f"gives Meta's ids, in all {len(prompt.GOLDEN)} golden dialogs"
    return "has a chat template of its own, and it can write a conversation"


def gpu_memory(start: Start) -> str:
    from llama2_chat.loading.load import measure
    from llama2_chat.loading.memory import GB, MIN_CONTEXT_TOKENS, check_memory, choose_precision, visible_gpus

    checkpoint, gpus = start.checkpoint, visible_gpus()
    if not gpus:
        raise Skip("the model runs on the CPU")
    if checkpoint is None:
        raise Skip("known after the first start; the small model needs little")
    size = measure(checkpoint.base)
    precision, _ = choose_precision(checkpoint.quantization, size, gpus)
    check_memory(checkpoint.model_id, precision, size, gpus)
    free = sum(gpu.free_bytes for gpu in gpus)
    alone, tokens = size.needed_bytes(precision, 0), min(size.context, MIN_CONTEXT_TOKENS)
    users = (free - alone) // (tokens * size.kv_bytes_per_token)
    return (
        f"{free / GB:.1f} GB free; {alone / GB:.1f} GB for the model in {precision} and to work in, "
        f"the rest for {users:,} conversations of {tokens:,} tokens"
    )


def bitsandbytes(start: Start) -> str:
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    weight = torch.randn(256, 256).to(device, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for rows in (1, 64):  # decoding and prefill: two kernels
        x = torch.randn(rows, 256).to(device, dtype)
        exact, got = x @ weight.T, bitsandbytes.matmul_4bit(x, packed.t(), state)
        if not (got - exact).norm() < 0.2 * exact.norm():  # 0.1 is usual; NaN must not pass
            raise ChatError(f"A matrix product in NF4 on {device} comes out wrong. Set QUANTIZATION=none.")
    return f"quantises to NF4 and multiplies on {device}"


def disk(start: Start) -> str:
    from llama2_chat.loading.hub import to_download
    from llama2_chat.loading.small_model import CONVERSION_BYTES, check_cache

    if start.checkpoint is None:
        folder, needed = start.plan.cache_dir, CONVERSION_BYTES
        check_cache(folder)
    else:
        folder = start.checkpoint.base.folder
        needed = sum(sum(to_download(files).values()) for files in start.files)
    free = f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
    return f"{needed / 1e9:,.1f} GB still to be written, {free}" if needed else f"nothing to download, {free}"


def server(start: Start) -> str:
    from llama2_chat.remote.faults import CONNECTION_FAULTS

    _raise_first(start, CONNECTION_FAULTS)
    return f"{', '.join(server.name for server in start.model.servers)} can be reached"


def key(start: Start) -> str:
    from llama2_chat.remote.faults import WRONG_KEY

    _raise_first(start, (WRONG_KEY,))
    return "accepted" if start.settings.inference_key else "none is set, and none is asked for"


def answer(start: Start) -> str:
    _raise_first(start)
    model = start.model
    length = f" of {model.context_length:,} tokens" if model.context_length else ""
    return f"{model.status.model}{length} answers. {model.status.why}"


def _raise_first(start: Start, kind: Container[str] | None = None) -> None:
    """The first fault of this kind, or of any, that one of the model's servers has."""
    for name, fault in start.model.faults:
        if kind is None or fault in kind:
            raise ChatError(f"{name}: {fault}")


def port(start: Start) -> str:
    with open_listener(start.settings) as listener:
        return f"{start.settings.host} port {listener.getsockname()[1]} is free"


def certificate(start: Start) -> str:
    settings = start.settings
    if not settings.https:
        raise Skip("not needed without --https")
    from llama2_chat.server import tls

    if not settings.certfile and not settings.keyfile and tls.needs_new_certificate(tls.CERTS):
        return f"the start will make one in {tls.CERTS}"
    found = tls.get_certificate(settings.certfile, settings.keyfile, settings.key_password)
    tls.server_context(lambda: found)
    return f"{found.certfile} for {', '.join(found.hosts)}, until {found.not_after:%Y-%m-%d}"


def access(start: Start) -> str:
    from llama2_chat.server import login

    settings = start.settings
    page = f"{len(login.read(settings.auth_file)):,} may log in" if settings.auth_file else ""
    keys = f"{len(settings.api_keys):,} API keys" if settings.api_keys else ""
    if keys or page:
        return f"{page or 'no login'}, {keys or 'no API key, so programs cannot ask'}"
    if settings.on_loopback:
        raise Skip("only this machine is served, so no key or login is needed")
    return "whoever reaches the port may use page and API: neither AUTH_FILE nor API_KEY is set"


class _Probe(NamedTuple):
    look: Callable[[Start], str]
    limit_s: float  # generous: the first import of PyTorch from a slow disk takes half a minute
    needs: str = ""  # a probe without whose success this one has nothing to look at
    if_late: str = "Try once more."


DRIVER = "Run nvidia-smi; if that hangs too, restart the computer."
NETWORK = "Check the network connection, and whether the disk answers."
PROBES = {
    "Python": _Probe(python, 30),
    "packages": _Probe(packages, 30),
    "GPU": _Probe(gpu, 90, if_late=DRIVER),
    "model": _Probe(model, 90, "GPU", NETWORK),
    "tokenizer": _Probe(tokenizer, 60, "model"),
    "GPU memory": _Probe(gpu_memory, 60, "model", DRIVER),
    "bitsandbytes": _Probe(bitsandbytes, 60, "GPU", "Reinstall bitsandbytes, or set QUANTIZATION=none."),
    "disk": _Probe(disk, 60, "model"),
    "server": _Probe(server, 150, if_late=NETWORK),
    "key": _Probe(key, 15, "server"),
    "answer": _Probe(answer, 15, "key"),
    "port": _Probe(port, 15),
    "certificate": _Probe(certificate, 30),
    "access": _Probe(access, 15),
}
HERE = ("GPU", "model", "tokenizer", "GPU memory", "bitsandbytes", "disk")  # for a model that is loaded by the start
ELSEWHERE = ("server", "key", "answer")  # for one that INFERENCE_URL names
