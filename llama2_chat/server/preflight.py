"""Checks everything that a start needs, one line each, before starting.

    python app.py --check       with the flags of the start; --json for programs; exit code 1 if something is wrong

What is probed stands in probes.py and gpu_probes.py. The probes run in a process of their own, because a driver that
hangs or a library that crashes then costs one line: a process can be killed inside any C call, and a thread cannot.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import IO, Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.process import python_command
from llama2_chat.server import gpu_probes, probes
from llama2_chat.server.gpu_probes import one_clause
from llama2_chat.server.probes import NotApplicable, PlannedStart
from llama2_chat.settings import Settings


class Probe(NamedTuple):
    run: Callable[[PlannedStart], str]
    limit_s: float  # generous: the first import of PyTorch from a slow disk takes half a minute
    needs: str = ""  # the probe that must pass before this one is run
    if_late: str = "Try once more."


DRIVER = "Run nvidia-smi; if that hangs too, restart the computer."
NETWORK = "Check the network connection, and whether the disk answers."
PROBES = {
    "Python": Probe(probes.probe_python, 30),
    "packages": Probe(probes.probe_packages, 30),
    "GPU": Probe(gpu_probes.probe_gpu, 90, if_late=DRIVER),
    "model": Probe(probes.probe_model, 90, "GPU", NETWORK),
    "tokenizer": Probe(probes.probe_tokenizer, 60, "model"),
    "GPU memory": Probe(gpu_probes.probe_gpu_memory, 60, "model", DRIVER),
    "bitsandbytes": Probe(
        gpu_probes.probe_bitsandbytes, 60, "GPU", "Reinstall bitsandbytes, or set QUANTIZATION=none."
    ),
    "int4, int8": Probe(gpu_probes.probe_packed, 120, "GPU", "Try once more, or set QUANTIZATION=nf4."),
    "disk": Probe(probes.probe_disk, 60, "model"),
    "server": Probe(probes.probe_server, 150, if_late=NETWORK),
    "key": Probe(probes.probe_key, 15, "server"),
    "answer": Probe(probes.probe_answer, 15, "key"),
    "port": Probe(probes.probe_port, 15),
    "certificate": Probe(probes.probe_certificate, 30),
    "access": Probe(probes.probe_access, 15),
    "folders": Probe(probes.probe_folders, 15, if_late="Check whether the disk answers."),
    "tools": Probe(probes.probe_tools, 15),
    "presets": Probe(probes.probe_presets, 15),
    "guard": Probe(probes.probe_guard, 60, if_late=NETWORK),
    "embeddings": Probe(probes.probe_embeddings, 150, if_late=NETWORK),
}
# For a model that is loaded by the start.
LOCAL = ("GPU", "model", "tokenizer", "GPU memory", "bitsandbytes", "int4, int8", "disk")
REMOTE = ("server", "key", "answer")  # for one that INFERENCE_URL names


@dataclass(frozen=True)
class Finding:
    """What a probe found, in a sentence each. ok is None where the probe does not apply."""

    name: str
    ok: bool | None
    detail: str
    next_step: str = ""
    seconds: float = 0.0


def main(settings: Settings) -> int:
    """Print the findings as they come, or as one JSON document. 0 if all are there and none is bad, else 1."""
    findings = []
    if isinstance(sys.stdout, io.TextIOWrapper):
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
    interrupted = len(findings) < len(_applicable(settings))
    return 1 if interrupted or any(finding.ok is False for finding in findings) else 0


def run(settings: Settings, names: Iterable[str] | None = None) -> Iterator[Finding]:
    """The findings of these probes, by default of all that apply, one after another, each within its time limit."""
    failed: set[str] = set()
    with contextlib.closing(_Worker(settings)) as worker:
        for name in names or _applicable(settings):
            started, needs = time.monotonic(), PROBES[name].needs
            skipped = Finding(name, None, f"skipped, because it depends on {needs}")
            finding = skipped if needs in failed else worker.ask(name)
            if needs in failed or finding.ok is False:
                failed.add(name)
            yield replace(finding, seconds=round(time.monotonic() - started, 2))


def _applicable(settings: Settings) -> list[str]:
    return [name for name in PROBES if name not in (LOCAL if settings.inference_urls else REMOTE)]


def run_probe(name: str, start: PlannedStart) -> Finding:
    """What one probe finds, in this process. Whatever it raises becomes a sentence."""
    try:
        return Finding(name, True, PROBES[name].run(start))
    except NotApplicable as reason:
        return Finding(name, None, str(reason))
    except ChatError as error:
        return _failure(name, error.detail)
    except ImportError as error:
        what = f"The package {error.name}" if error.name else "A package"
        return _failure(
            name, f"{what} is missing or broken ({one_clause(error)}). Run: pip install -r requirements.txt"
        )
    except Exception as error:
        what = f"This probe ended with an unexpected {type(error).__name__} ({one_clause(error)})"
        return _failure(name, f"{what}. Start without --check: the log then says where it comes from.")


def _failure(name: str, sentences: str) -> Finding:
    """All errors are written alike: first what is wrong, then what to do."""
    what, stop, step = sentences.partition(". ")
    return Finding(name, False, what + stop.strip(), step)


def _lines(finding: Finding) -> str:
    marks, arrow = {True: "✓", False: "✗", None: "–"}, "→"
    try:
        "".join([*marks.values(), arrow]).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        marks, arrow = {True: "ok", False: "NO", None: "--"}, "->"
    indent = " " * (len(marks[True]) + 14)
    lines = [f"{marks[finding.ok]} {finding.name:<13}{finding.detail}"]
    lines += [f"{indent}{arrow} {finding.next_step}"] if finding.next_step else []
    width = shutil.get_terminal_size((100_000, 24)).columns  # into a pipe, lines stay whole
    wrap = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))


# ---- The process that runs the probes ----


class _Worker:
    """Runs one probe at a time in another process. After a probe that gave no answer the next gets a new process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: _Process | None = None

    def ask(self, name: str) -> Finding:
        if self._process is None:
            self._process = _Process()
            self._process.send(self._settings)
        self._process.send(name)
        limit_s, if_late = PROBES[name].limit_s, PROBES[name].if_late
        try:
            answer = self._process.answers.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            return _failure(name, f"No answer within {limit_s:g} s. {if_late}")
        if answer is None:
            self.close()
            return _failure(name, f"This probe crashed Python, as a start would. {if_late}")
        return Finding(**answer)

    def close(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()


class _Process:
    """The other process, and what comes from it: findings as dictionaries, and None at its end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            python_command("llama2_chat.server.preflight:answer_probes"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self.answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self.answers), daemon=True).start()

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the process has died, and `answers` will say so
            pickle.dump(message, self._stdin)
            self._stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):  # stuck in the kernel, it ends when it can
            self._process.wait(1)
            self._stdin.close()


def _read(pipe: IO[bytes], answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    with pipe, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            answers.put(pickle.load(pipe))
    answers.put(None)


def answer_probes() -> None:
    """What that process runs: settings and then names of probes come in at stdin, findings go out at stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print what they like, elsewhere
    start = PlannedStart(pickle.load(sys.stdin.buffer))
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(asdict(run_probe(pickle.load(sys.stdin.buffer), start)), answers)
            answers.flush()
