"""How much memory of a GPU steps take, found by computing them, and a KV pool that leaves them so much.

Libraries take memory outside of PyTorch when they first compute something, and what is free lies in pieces at times: so
the pool is made, the longest steps are computed over it, and it is made smaller if too little is left.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import PreTrainedModel

from llama2_chat.engine.kv_pool import BLOCK_SIZE, GB, KVPool, input_embeddings
from llama2_chat.engine.sampler import SamplerState
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.self_check import check_request
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

NEGLIGIBLE_BYTES = 64 * 2**20  # PyTorch takes memory in pieces
LEAST_LACK_BYTES = 256 * 2**20  # by which a pool gets smaller where memory ran out beside it

FreeBytes = Callable[[], Mapping[torch.device, int]]


@torch.inference_mode()
def activation_bytes(model: PreTrainedModel, tokens: int) -> int:
    """GPU memory that a step of so many tokens takes for a moment, measured."""
    device = input_embeddings(model).weight.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def rehearse(way: EagerWay, sampler: SamplerState, tokens: int) -> None:
    """Compute the steps that take most: a prompt of so many tokens with logits after each, and a full batch whose next
    tokens are chosen among all there are. It goes to the padding slot and to block 0."""
    request = check_request(tokens, sampler.vocab_size)
    request.slot, request.computed = sampler.padding, tokens - 1
    request.blocks.own = [0] * -(-tokens // BLOCK_SIZE)
    way.prefill([Chunk(request, 0, tokens)], everywhere=True)
    step = way.decode([request] * sampler.padding)
    sampler.sample(step.logits, step.slots, sampler.vocab_size)
    if sampler.device.type == "cuda":
        torch.cuda.synchronize(sampler.device)


def leaving(left_bytes: int, free_bytes: FreeBytes) -> dict[torch.device, int]:
    """What is free of each device when so much of it is left alone."""
    return {device: max(free - left_bytes, 0) for device, free in free_bytes().items()}


def pool_beside_steps(
    make_pool: Callable[[FreeBytes], KVPool],
    free_bytes: FreeBytes,
    step_bytes: int,
    rehearse: Callable[[KVPool], None],
) -> KVPool:
    """A pool that leaves so many bytes of each device to the steps, also once these have been computed.

    make_pool: takes what is free as KVPool does.
    free_bytes: of each device what pool and steps may have; asked again after each rehearsal.
    rehearse: computes the longest steps over a pool.

    Raises ModelUnavailable as KVPool does, if nothing is left for it.
    """
    left, lack, settled = step_bytes, 0, False
    while True:
        pool = make_pool(partial(leaving, left, free_bytes))
        try:
            rehearse(pool)
            free = free_bytes()
            lack = step_bytes - min(free[device] for device in pool.devices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("Memory ran out while the longest steps were tried: %s", first_line(error))
            lack = max(2 * lack, LEAST_LACK_BYTES)
        if lack <= NEGLIGIBLE_BYTES:
            return pool
        log.info("Steps need %.1f GB more than %s tokens of keys and values leave them", lack / GB, f"{pool.tokens:,}")
        left += lack if settled else 0  # what libraries took at first is not free the next time
        settled = True
        del pool
        gc.collect()  # what failed over it may still hold it
