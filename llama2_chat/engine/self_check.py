"""Whether a runner gives what the model alone gives: as long prompts as it takes to see, and two in one step.

The model alone reads each prompt in the same chunks: products in 8 bits on a GPU depend on the rows that they share.
What rounding makes of its logits by itself, a runner's may be off as well: a model of many layers in 4 bits, whose sums
come out in another order each time, is as far from itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llama2_chat.context import ropes
from llama2_chat.engine.kv_pool import KVPool, input_embeddings
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import draws
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.errors import ModelUnavailable
from llama2_chat.types import SamplingParams

SHORT, LONGER = 25, 39  # tokens; odd, so that the last block has room for one more
LONGEST_ON_CPU, LONGEST_ON_GPU = 8_192, 65_536  # a longer prompt would make starting slow
# How far logits may lie apart, relative to their length. Rounding adds up from layer to layer.
TOLERANCE, TOLERANCE_OF_FIRST_LAYERS, TOLERANCE_IN_FLOAT32 = 0.1, 0.04, 0.001


class SelfCheck:
    """The prompts to compare on, and the comparison.

    windows: of each layer how many tokens it attends to, None for all.
    context_length, longest_chunk: tokens.
    pool: whose way of keeping keys and values the model alone has, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[int | None],
        context_length: int,
        longest_chunk: int,
        pool: KVPool,
    ) -> None:
        self._model, self._longest_chunk, self._pool = model, longest_chunk, pool
        self._depth = 1 + max(windows.index(window) for window in windows)
        on_cpu = input_embeddings(model).weight.device.type == "cpu"
        longest = min(context_length - 2, LONGEST_ON_CPU if on_cpu else LONGEST_ON_GPU)
        marks = [mark for mark in {*windows, *_trained_lengths(model)} if mark and mark < longest]
        # Half of the ids lie before the window of the last one.
        length = min(max([LONGER, *(2 * mark for mark in marks)]), longest)
        self.lengths: Sequence[int] = [length - 1 + length % 2, SHORT] if longest > SHORT else [longest]

    def agrees(
        self,
        requests: Sequence[Request],
        prefill: Callable[[Sequence[Chunk]], Tensor],
        decode: Callable[[Sequence[Request], int], Tensor],
    ) -> bool:
        """Whether logits agree: of all requests together in the model's first layers, and of a short one in all of it.
        Raises ModelUnavailable where the model alone has none.

        prefill(chunks): logits [n, V] after those that are the last of their requests.
        decode(requests, token): logits [n, V] after one more token of each.
        """

        def compare(requests: Sequence[Request], tolerance: float) -> bool:
            steps = self._steps(requests)
            for chunks in steps:
                prefilled = prefill(chunks)
            for request in requests:
                request.computed = len(request.ids)
            token = requests[0].ids[0]
            found = [prefilled, decode(requests, token)]
            rows = len(input_embeddings(self._model).weight)
            if any(len(logits) != len(requests) or logits.shape[1] < rows for logits in found):
                raise ModelUnavailable(
                    f"{type(self._model).__name__} scores other tokens than it reads, so it cannot go on with what it "
                    "has written. Choose a Llama 2, or another model that continues text."
                )
            expected = [self._alone(request, steps, token, self._pool) for request in requests]
            exact = expected
            if not self._pool.is_exact:  # what differs in its last bit may get another code
                exact = [self._alone(request, steps, token) for request in requests]
            if not all(logits.isfinite().all() and logits.any() for alone in expected for logits in alone):
                raise ModelUnavailable(
                    "This model's scores are no numbers, or all the same: its weights are damaged, or too large for "
                    "16 bits. Copy or download them again, or choose another model."
                )

            def agree(tolerance: float) -> bool:
                return all(
                    _agree(logits, torch.stack(alone), torch.stack(unrounded), tolerance)
                    for logits, alone, unrounded in zip(
                        found, zip(*expected, strict=True), zip(*exact, strict=True), strict=True
                    )
                )

            return agree(tolerance) or agree(tolerance + self._sway(requests[-1], steps, token, expected[-1]))

        in_float32 = self._model.dtype == torch.float32 and self._pool.is_exact
        with _cut(self._model, self._depth):
            together = compare(requests, TOLERANCE_IN_FLOAT32 if in_float32 else TOLERANCE_OF_FIRST_LAYERS)
        one = requests[-1]
        return together and compare([replace(one, ids=one.ids[:SHORT])], TOLERANCE)

    def _steps(self, requests: Sequence[Request]) -> list[list[Chunk]]:
        """All ids, in two steps or more, so that the requests end together."""
        most = max(len(request.ids) for request in requests)
        size = min(-(-most // 2), self._longest_chunk)
        steps = []
        for left in reversed(range(0, most, size)):  # tokens that come after this step
            ends = [(request, len(request.ids) - left) for request in requests if len(request.ids) > left]
            steps.append([Chunk(request, max(end - size, 0), end) for request, end in ends])
        return steps

    def _alone(
        self, request: Request, steps: Sequence[Sequence[Chunk]], token: int, pool: KVPool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [V] after the last id of a request, and after one more token, without the pool or the others.

        pool: as which keys and values are rounded; None for as they are.
        """
        cache = _CacheAsKept(self._model, pool) if pool else DynamicCache(config=self._model.config)
        read = [chunk.ids for chunks in steps for chunk in chunks if chunk.request is request]
        logits = [self._forward(ids, cache) for ids in (*read, [token])]
        return logits[-2], logits[-1]

    def _sway(
        self, request: Request, steps: Sequence[Sequence[Chunk]], token: int, expected: tuple[Tensor, Tensor]
    ) -> float:
        """How far logits of the model alone move, relative to their length, with the last bits of what it reads."""
        with _rounded_otherwise(self._model):
            otherwise = self._alone(request, steps, token, self._pool)
        return max(
            float(torch.linalg.norm(moved.float() - logits.float()) / torch.linalg.norm(logits.float()))
            for moved, logits in zip(otherwise, expected, strict=True)
        )

    def _forward(self, ids: list[int], cache: DynamicCache) -> Tensor:
        device = input_embeddings(self._model).weight.device
        output: Any = self._model(
            torch.tensor([ids], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1].to(device)


class _CacheAsKept(DynamicCache):
    """Keys and values of a model alone, rounded as a pool rounds them."""

    def __init__(self, model: PreTrainedModel, pool: KVPool) -> None:
        super().__init__(config=model.config)
        self._pool = pool

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(*self._pool.as_kept(key_states, value_states), layer_idx, *args, **kwargs)


def check_request(length: int, vocab_size: int) -> Request:
    """A prompt of this length. Its first half is one id again and again, which weighs much where a layer sees it that
    should not."""
    ids = [(7 * max(i, length // 2) + 3) % vocab_size for i in range(length)]
    params = SamplingParams()
    return Request(ids, params, _NoReader(), limit=1, draws=draws(params, 1))


class _NoReader:
    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


def _agree(found: Tensor, expected: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Whether each row of logits, [n, V], is what was expected; never where it is not a number.

    exact: what would be expected if keys and values were not rounded. As far as that is, it may be off as well.
    """
    found, expected, exact = found.float(), expected.float(), exact.float()
    errors, moved, length = (torch.linalg.norm(x, dim=1) for x in (found - expected, exact - expected, expected))
    return bool((errors < tolerance * length + moved).all())


def _trained_lengths(model: PreTrainedModel) -> Iterator[int]:
    """Tokens past which a model's positions were stretched after it was trained on so many."""
    for rope in ropes(model.config.get_text_config(decoder=True)):
        if trained := rope.get("original_max_position_embeddings"):
            yield int(trained)


@contextmanager
def _rounded_otherwise(model: PreTrainedModel) -> Iterator[None]:
    """Of what comes into the model's first layer one number in eight is off by its last bit while this lasts: about as
    much as one rounding makes of all of them."""

    def move(embeddings: nn.Module, inputs: object, states: Tensor) -> Tensor:
        states = states.clone()
        states[..., ::8] *= 1 + torch.finfo(states.dtype).eps
        return states

    handle = input_embeddings(model).register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _cut(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """The model has only so many layers while this lasts."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    parent, name, layers = next(  # parents come before what they hold, so these are no experts of a layer
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    )
    setattr(parent, name, layers[:depth])
    try:
        yield
    finally:
        setattr(parent, name, layers)
