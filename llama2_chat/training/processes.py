"""The processes that `accelerate launch` starts, one for each GPU: one prints and writes, and all share the work.

By deploy/fsdp.yaml they share the model, too: each keeps a part of the weights of every layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from llama2_chat.errors import ChatError

if TYPE_CHECKING:
    from llama2_chat.training.options import Options


def processes() -> PartialState:
    """How many there are, and which of them this one is."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    return processes().is_main_process


def print_lines(*lines: str) -> None:
    if is_main_process():
        print(*lines, sep="\n", flush=True)  # a log is read while it grows


def is_divided() -> bool:
    """Whether the model is divided among the processes, by PyTorch's FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_divided(options: Options) -> None:
    """Raise ChatError for what does not work with a divided model, before anything is loaded."""
    for fault in _faults(options) if is_divided() else ():
        raise ChatError(fault)


def _faults(options: Options) -> Iterator[str]:
    # accelerate says by its environment, and in no other way, what a process that it launched is to do.
    if os.environ.get("FSDP_VERSION") != "2":
        yield "A model is divided by FSDP 2 only: accelerate launch --config_file deploy/fsdp.yaml."
    if options.folds:
        yield "--folds trains one model after another, and a model that was divided among GPUs stays so. Leave it out."
    if options.load_in_8bit:
        yield "Weights in 8 bits cannot be divided among GPUs: --load_in_4bit."
    if options.load_in_4bit and options.use_dora:
        yield "DoRA cannot be divided among GPUs above weights in 4 bits: leave out --use_dora or --load_in_4bit."
    if options.method != "sft" and not options.use_peft:
        yield f"--method {options.method} needs --use_peft where the model is divided among GPUs."
