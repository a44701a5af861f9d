"""Of the processes that `accelerate launch` starts, one prints and writes."""

from __future__ import annotations

from accelerate import PartialState


def is_main_process() -> bool:
    return PartialState().is_main_process


def print_lines(*lines: str) -> None:
    if is_main_process():
        print(*lines, sep="\n", flush=True)  # a log is read while it grows
