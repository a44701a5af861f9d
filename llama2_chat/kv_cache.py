"""Which KV_CACHE is taken where, and how much memory it takes. What is kept then is kernels/kv_codes.py's to know."""

from __future__ import annotations

from collections.abc import Collection

from llama2_chat.errors import ModelUnavailable

SCALE_BYTES = 2  # of a token and head, in 8 bits
FP8_CAPABILITY = (8, 9)  # of a GPU, from which Triton's kernels read and write it
# With fewer tokens than this for each of MAX_BATCH requests, memory is what limits how many are answered at once.
ENOUGH_TOKENS = 1_024


def head_bytes(head_dim: int, bits: int) -> int:
    """Of the keys of one token and head, or its values."""
    return head_dim * bits // 8 + (SCALE_BYTES if bits == 8 else 0)


def choose_format(kv_cache: str, capabilities: Collection[tuple[int, int]], room: int, wanted: int) -> str | None:
    """ "int8" or "fp8", or None for keys and values as the model computes them.

    kv_cache: a KV_CACHE; capabilities: of the GPUs, none on a CPU; room: tokens that there is memory for as the model
    computes them; wanted: enough_tokens().
    Raises ModelUnavailable for a format that one of the GPUs cannot compute with.
    """
    check_format(kv_cache, capabilities)
    if kv_cache != "auto":
        return None if kv_cache == "none" else kv_cache
    # Also where there is fp8, int8 is as fast and loses a sixth as much: docs/measured.md.
    return "int8" if capabilities and room < wanted else None


def check_format(kv_cache: str, capabilities: Collection[tuple[int, int]]) -> None:
    """Raise ModelUnavailable for a KV_CACHE that GPUs of these capabilities cannot compute with."""
    if kv_cache == "fp8" and capabilities and min(capabilities) < FP8_CAPABILITY:
        raise ModelUnavailable(
            "KV_CACHE=fp8 needs a GPU of compute capability 8.9 or higher. Set KV_CACHE=int8, which takes as little "
            "memory, or unset it."
        )


def enough_tokens(max_batch: int, context_length: int) -> int:
    """Room for so many that KV_CACHE=auto does not look for more."""
    return max_batch * min(context_length, ENOUGH_TOKENS)
