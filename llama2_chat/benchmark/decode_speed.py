"""One user's tokens per second: the engine's, and transformers' generate() on the same weights."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from llama2_chat.benchmark.local_model import load, text_ids
from llama2_chat.loading.quantize import precision_of
from llama2_chat.types import SamplingParams
from model import ChatModel

GREEDY = SamplingParams(temperature=0, max_new_tokens=128)


def decode_speed(chat: ChatModel, prompt_tokens: int = 20, params: SamplingParams = GREEDY) -> float:
    """Tokens per second after the first."""
    with chat.stream_completion(text_ids(chat.serving.tokenizer, prompt_tokens), params) as reply:
        list(reply)
    tokens_per_second = reply.timing.tokens_per_second
    assert tokens_per_second is not None  # there were several tokens
    return tokens_per_second


@functools.cache
def unquantized_model() -> ChatModel:
    """The embedded model in bfloat16."""
    return load(["--quantization", "none"])


def unquantized_generate_speed() -> float:
    return generate_speeds(unquantized_model())[0]


def generate_speeds(chat: ChatModel, prompt_tokens: int = 20, params: SamplingParams = GREEDY) -> tuple[float, float]:
    """Tokens per second of generate(): after the first token, and of the whole answer."""
    model: Any = chat.serving.model
    ids = torch.tensor([text_ids(chat.serving.tokenizer, prompt_tokens)], device=model.device)
    sampling: dict[str, Any] = {}
    if params.temperature:
        sampling = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k")}

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            do_sample=params.temperature > 0,
            repetition_penalty=params.repetition_penalty,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            **sampling,
        )
        return time.perf_counter() - started

    with torch.inference_mode(), _plain_layers(model):
        first, whole = seconds(1), seconds(params.max_new_tokens)
    return (params.max_new_tokens - 1) / (whole - first), params.max_new_tokens / whole


@contextlib.contextmanager
def _plain_layers(model: PreTrainedModel) -> Iterator[None]:
    """With bitsandbytes' own layers, where loading/quantize.py has put faster ones in their place."""
    if precision_of(model) != "nf4":  # importing bitsandbytes prints warnings where there is no GPU
        yield
        return
    from bitsandbytes.nn import Linear4bit

    faster = [(module, type(module)) for module in model.modules() if isinstance(module, Linear4bit)]
    for module, _ in faster:
        module.__class__ = Linear4bit
    try:
        yield
    finally:
        for module, kind in faster:
            module.__class__ = kind
