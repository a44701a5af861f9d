"""A server with readers of its page and its API for minutes, hostile ones among them at first: whether the healthy get
errors or wait long, and whether anything is left behind.

The server is a process of its own, looked at from outside. Each reader has an address, and a login or a key. The
hostile ones are in a process of low priority, which takes what server and healthy readers leave of the cores: an
attacker brings a computer along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from llama2_chat import ROOT
from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.healthy_readers import visit, warm_up
from llama2_chat.benchmark.hostile_readers import Target
from llama2_chat.page.answering import UNREAD_S
from llama2_chat.process import python_command
from llama2_chat.server.login import hash_password

MB = 1_000_000
MOST_GROWTH_MB = 20
MOST_SLOWER = 3  # times, of the p95 to the first token, beside hostile readers
HOSTILE_PART = 2 / 3  # of the time; the rest is the healthy readers' alone
SETTLES_S = UNREAD_S + 30  # once all have left: for so long the page keeps answers going for a reader who comes back
STATE = re.compile(r"^chat_(?:requests_running|requests_waiting|kv_cache_used_tokens) (\S+)", re.MULTILINE)


@dataclass
class SoakState:
    """What has happened so far."""

    minutes: float  # that the soak lasts
    started: float = field(default_factory=time.perf_counter)
    answers: int = 0
    abandoned: int = 0  # answers whose healthy reader went away in the middle
    lost: int = 0  # answers that ended without an end
    errors: list[str] = field(default_factory=list)
    # Seconds to the first word, of healthy readers, beside hostile ones and alone.
    beside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)  # of hostile readers, by kind
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)  # minute, bytes, threads, descriptors

    @property
    def minute(self) -> float:
        return (time.perf_counter() - self.started) / 60

    @property
    def is_over(self) -> bool:
        return self.minute >= self.minutes

    @property
    def is_hostile(self) -> bool:
        return self.minute < self.minutes * HOSTILE_PART

    def first_word(self, asked_at: float) -> None:
        """A healthy reader who asked then, as time.perf_counter() has it, sees the first word of the answer."""
        seconds = time.perf_counter() - asked_at
        (self.beside if self.is_hostile else self.alone).append(seconds)

    def resident_mb(self, minute: float) -> float:
        """The median of the last samples before this minute: a step in progress takes some memory for itself."""
        return statistics.median([size for at, size, *_ in self.samples if at <= minute][-5:]) / MB


def measure(minutes: float, readers: int = 32, hostile: int = 16) -> Iterator[Figures]:
    """What readers of the embedded model got, and what the server had and kept meanwhile."""
    with tempfile.TemporaryDirectory() as folder, _serving(Path(folder), readers) as target:
        process, files = psutil.Process(target.pid), _files(Path(folder))
        asyncio.run(warm_up(target))
        descriptors, state = process.num_fds(), SoakState(minutes)
        asyncio.run(_run(state, target, process, readers, hostile))
        left_over = _settled(target, process, descriptors)
        early = 2 if minutes > 2 else minutes / 5
        before, after = state.resident_mb(early), process.memory_info().rss / MB
        threads = max(number for at, _, number, _ in state.samples if at <= early)
        figures = {
            "minutes": minutes,
            "healthy readers · hostile ones, for the first two thirds": f"{readers} · {hostile}",
            "answers": state.answers,
            "left in the middle": state.abandoned,
            "attempts of hostile readers": ", ".join(f"{kind} {count}" for kind, count in state.attempts.items()),
            "errors": len(state.errors),
            "first error": next(iter(state.errors), None),
            "lost answers": state.lost,
            "first word beside hostile readers, p50 · p95, s": _percentiles(state.beside),
            "first word without them, p50 · p95, s": _percentiles(state.alone),
            "beside / without, p95": _p(0.95, state.beside) / _p(0.95, state.alone),
            f"resident memory at minute {early:g}, MB": before,
            "resident memory after the last has left, MB": after,
            "growth, MB": after - before,
            f"threads until minute {early:g} · at the end": f"{threads} · {process.num_threads()}",
            "descriptors before the first · most · at the end": (
                f"{descriptors} · {max(sample[3] for sample in state.samples)} · {process.num_fds()}"
            ),
            "temporary files left": _files(Path(folder)) - files,
            "still in the engine": left_over,
        }
        kept = not state.errors and not state.lost and not left_over and after - before < MOST_GROWTH_MB
        kept = kept and process.num_fds() <= descriptors and process.num_threads() <= threads
        kept = kept and figures["temporary files left"] == 0 and figures["beside / without, p95"] <= MOST_SLOWER
        yield {**figures, "every promise kept": kept}


async def _run(state: SoakState, target: Target, process: psutil.Process, readers: int, hostile: int) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch(state, process))
        for number in range(readers):
            group.create_task(visit(target, number, state))
        group.create_task(_harass(target, hostile, state))


async def _harass(target: Target, hostile: int, state: SoakState) -> None:
    command = python_command("llama2_chat.benchmark.hostile_readers:main")
    others = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    over_at = time.time() + 60 * (state.minutes * HOSTILE_PART - state.minute)
    printed, _ = await others.communicate(json.dumps([asdict(target), hostile, over_at]).encode())
    state.attempts, failures = json.loads(printed)
    state.errors += failures


async def _watch(state: SoakState, process: psutil.Process) -> None:
    shown_minute = 0
    while not state.is_over:
        size = process.memory_info().rss
        state.samples.append((state.minute, size, process.num_threads(), process.num_fds()))
        if state.minute >= shown_minute + 1:
            shown_minute += 1
            print(f"minute {shown_minute}: {state.answers} answers, {size / MB:.0f} MB", file=sys.stderr)
        await asyncio.sleep(state.minutes / 4)  # seconds: 240 samples


@contextlib.contextmanager
def _serving(folder: Path, readers: int) -> Iterator[Target]:
    """app.py with a login and a key for each healthy reader, and one of each for all hostile ones."""
    password, users = secrets.token_hex(8), folder / "users.txt"
    hashed = hash_password(password)  # all have the same one: each takes a while to make
    users.write_text("".join(f"{name}:{hashed}\n" for name in ("hostile", *(f"reader{n}" for n in range(readers)))))
    keys = [secrets.token_hex(16) for _ in range(readers + 1)]
    (folder / "tmp").mkdir()
    environ = {**os.environ, "API_KEY": ",".join(keys), "AUTH_FILE": str(users), "TMPDIR": str(folder / "tmp")}
    environ |= {"CLIENT_LIMIT": "32", "BODY_LIMIT_MB": "10", "DOCUMENTS_DIR": str(folder / "documents")}
    command = [sys.executable, str(ROOT / "app.py"), "--port", "0"]
    log = folder / "log.txt"
    with log.open("w") as file, subprocess.Popen(command, env=environ, stderr=file) as server:
        try:
            while "is ready in" not in log.read_text():
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.2)
            (url,) = re.findall(r"The page is at (\S+?)/?\n", log.read_text())
            yield Target(url, server.pid, password, keys)
        finally:
            server.terminate()


def _settled(target: Target, process: psutil.Process, descriptors: int) -> int:
    """Requests and tokens that the engine still holds, once it holds none and all connections are closed, or after a
    while."""
    import httpx

    give_up_at, left = time.monotonic() + SETTLES_S, 1
    while (left or process.num_fds() > descriptors) and time.monotonic() < give_up_at:
        metrics = httpx.get(f"{target.url}/metrics", headers=target.key(0)).text
        left = int(sum(map(float, STATE.findall(metrics))))
        time.sleep(0.5)
    return left


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in (folder / "tmp").rglob("*"))


def _p(part: float, seconds: list[float]) -> float:
    return sorted(seconds)[int(part * (len(seconds) - 1))] if seconds else float("nan")


def _percentiles(seconds: list[float]) -> str:
    return f"{_p(0.5, seconds):.2f} · {_p(0.95, seconds):.2f}"
