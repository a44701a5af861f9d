"""What each rank of a model does alike: find the others, and make a runner for its part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama2_chat.context import context_window
from llama2_chat.engine.kv_pool import make_pool
from llama2_chat.engine.model_runner import RunnerT, build_runner
from llama2_chat.engine.ranks import sum_products
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.load import Loaded
from llama2_chat.loading.memory import free_bytes

# All ranks are on this machine: nobody else can reach what they open to find each other. Of a rank that has ended,
# processes.py hears; NCCL's own watchdog would end this process with another exit code.
VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


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
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store = dist.FileStore(str(work.meeting), part.of)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=part.rank,
        world_size=part.of,
        device_id=device if on_gpu else None,
    )
    if on_gpu:
        dist.all_reduce(torch.zeros(1, device=device))  # what NCCL keeps is no room for keys and values
    sum_products(loaded.model)
    return build_runner(
        loaded.model,
        lambda: _least(free_bytes(work.checkpoint.headroom_gb, part.rank), device),
        context_length=context_window(loaded.model.config)[0],
        speculate=False,
        make_pool=partial(make_pool, work.checkpoint.kv_cache),
        **vars(work.options),
        runner_type=runner_type,
    )


def _least(free: Mapping[torch.device, int], device: torch.device) -> dict[torch.device, int]:
    """What all ranks have free on their devices: all keep as many blocks, and keep them in the same way."""
    least = torch.tensor(free[device], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return {device: int(least.item())}
