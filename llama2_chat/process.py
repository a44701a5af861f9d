"""Python processes of their own for what could crash, hang or eat memory: a hostile schema, a broken GPU driver; and
memory that this one gives back, and a log without which it goes on."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama2_chat import ROOT

CGROUP = Path("/sys/fs/cgroup")  # version 2
# What ends a process from outside, and no limit of its own: the system where memory is short, an operator, or whoever
# started it. None of them ends one on Windows.
FROM_OUTSIDE = {getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)}

# What Python needs to start and to find its packages, and nothing that may be a secret. The last two: where
# pip install --user puts them.
VARIABLES = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "SYSTEMROOT", "LD_LIBRARY_PATH"),
    *("PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE", "PYTHONUTF8", "HOME", "APPDATA"),
)


def python_environment() -> dict[str, str]:
    """The variables for a process that reads what strangers sent: no HF_TOKEN, no API_KEY."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def python_command(function: str) -> list[str]:
    """The command line that calls a function of this project, named as "package.module:function".

    Works from a clone that is not installed, in any working directory, in which it looks for no modules (-P).
    """
    module, _, name = function.partition(":")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {name}; {name}()"
    optimized = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []  # --check finds what a start would
    return [sys.executable, *optimized, "-P", "-c", code]


def share_cores(cgroup: Path = CGROUP) -> None:
    """Have no more threads compute than a container has cores, and have them wait for each other asleep after some
    0.1 ms. Before PyTorch is imported.

    Else there would be one for each core of the computer, and the system would stop all of them for most of the time;
    and they would wait awake for milliseconds, in which another program could compute and their own other thread
    cannot, at each of a hundred products of a token. cgroup: the folder where Linux tells what a container may have.
    """
    with suppress(OSError, ValueError):  # no container, or "max": no limit of its own
        quota, period = map(int, (cgroup / "cpu.max").read_text().split())
        if (cores := max(1, quota // period)) < (os.cpu_count() or 1):
            os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # of GNU's OpenMP, which PyTorch brings on Linux


def trim_memory() -> None:
    """Give the system back what was freed: glibc keeps most of it for later, hundreds of megabytes at times."""
    with suppress(AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def collect_garbage_later() -> None:
    """Look through all that there is for garbage, a last time: from now on Python looks only at what comes later.

    What a loaded model brings, half a million objects and more, takes it half a second each time, and meanwhile nobody
    gets a token.
    """
    gc.collect()
    gc.freeze()


def collect_garbage_again(once: bool) -> None:
    """Let Python look through all that there is again: a model that was loaded is closed, and soon garbage.

    once: and then only at what comes later, for another model is in use.
    """
    gc.callbacks[:] = [each for each in gc.callbacks if each is not _freeze_after_all]
    gc.unfreeze()
    if once:
        gc.callbacks.append(_freeze_after_all)


def _freeze_after_all(phase: str, info: Mapping[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.callbacks.remove(_freeze_after_all)
        gc.freeze()


def outlive_stderr() -> None:
    """From now on what cannot be written to standard error is lost, and nothing else: its disk may be full, or its
    terminal gone."""
    if os.name == "posix":  # on Windows a console is no file
        file = io.BufferedWriter(_LossyFile(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _LossyFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)
