"""What each rank of a model does alike: find the others, and make a runner for its part."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama2_chat.context import context_window
from llama2_chat.engine.cuda_graphs import step_kernels
from llama2_chat.engine.kv_pool import make_pool
from llama2_chat.engine.model_runner import RunnerT, build_runner
from llama2_chat.engine.ranks import sum_products
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.load import Loaded
from llama2_chat.loading.memory import free_bytes
from llama2_chat.loading.parts import Part

log = logging.getLogger("llama2_chat")

# All ranks are on this machine: nobody else can reach what they open to find each other. Of a rank that has ended,
# processes.py hears; NCCL's own watchdog would end this process with another exit code.
VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
MEETING_S = 60  # a few seconds are usual, once all have loaded
NOT_MET = (
    "The GPUs of this model have not reached each other for %d seconds. Some computers let them wait for ever: "
    "NCCL_P2P_DISABLE=1 lets them talk through this computer's memory, TENSOR_PARALLEL=1 does without."
)


@dataclass(frozen=True)
class RunnerOptions:
    """As build_runner() takes them."""

    max_batch: int | None = None
    compile: bool = True
    deterministic: bool = False
    host_bytes: int = 0  # for each rank


@dataclass(frozen=True)
class Work:
    """What a rank needs to know. All but the checkpoint's part is the same for all."""

    checkpoint: Checkpoint
    meeting: Path  # a file that does not exist yet, by which the ranks find each other
    options: RunnerOptions


def join(work: Work, loaded: Loaded, runner_type: type[RunnerT]) -> RunnerT:
    """Meet the other ranks, which do the same now, and make the runner of a part that is loaded.

    Raises ModelUnavailable as build_runner() does.
    """
    part, device = work.checkpoint.part, loaded.model.device
    assert part is not None
    with _warning_after(MEETING_S) if part.rank == 0 else nullcontext():  # it comes last, when all have loaded
        _meet(work.meeting, part, device)
        reach = os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
        if reach and work.options.compile and step_kernels(loaded.model):  # which recorded steps alone have
            from llama2_chat.kernels import sum_and_norm  # which needs Triton

            sum_and_norm.connect(loaded.model.config.hidden_size, device)
    sum_products(loaded.model)
    return build_runner(
        loaded.model,
        lambda: _least(free_bytes(work.checkpoint.headroom_gb, part.rank), device),
        context_length=context_window(loaded.model.config)[0],
        speculate=False,
        make_pool=partial(make_pool, work.checkpoint.kv_cache),
        rehearsed=False,  # all ranks keep as many blocks: none may try again by itself
        **vars(work.options),
        runner_type=runner_type,
    )


def _meet(meeting: Path, part: Part, device: torch.device) -> None:
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(str(meeting), part.of),
        rank=part.rank,
        world_size=part.of,
        device_id=device if on_gpu else None,
    )
    met = torch.zeros(1, device=device)
    dist.all_reduce(met)  # what NCCL keeps from now on is no room for keys and values
    met.item()


def leave() -> None:
    """Give back what meeting the others took, once they have ended. May wait for ever for one that ended too soon."""
    with suppress(ImportError):  # no Triton here
        from llama2_chat.kernels import sum_and_norm

        sum_and_norm.disconnect()
    dist.destroy_process_group()


@contextmanager
def _warning_after(seconds: float) -> Iterator[None]:
    """Nothing that waits for another GPU can be interrupted, but whoever waits for it may be told."""
    timer = threading.Timer(seconds, log.warning, (NOT_MET, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _least(free: Mapping[torch.device, int], device: torch.device) -> dict[torch.device, int]:
    """What all ranks have free on their devices: all keep as many blocks, and keep them in the same way."""
    least = torch.tensor(free[device], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return {device: int(least.item())}
