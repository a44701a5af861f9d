"""Guesses at what an answer says next, made by a model: a head that goes on from what the served model has computed, or
a small model with the same vocabulary.

Its keys and values lie in the same blocks as the served model's, so conversations that begin alike share them, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama2_chat.engine.drafts import Guess
from llama2_chat.engine.kv_pool import input_embeddings, probe_keys
from llama2_chat.engine.paged_attention import ATTENTION, AttentionStep, attention_windows
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import LikelyTokens, SamplerState
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.kernels.packed import PackedLinear

log = logging.getLogger("llama2_chat")

MOST_ROWS = 32  # tokens of a step, each of which reads the keys and values of its request by itself
MOST_FEATURES = 64  # of tokens that wait to be read: while nothing is guessed, they are few or many at once


@dataclass
class Reading:
    """Ids that are read next, those of some requests one after another."""

    chunks: Sequence[Chunk]
    features: Tensor  # [T, H], of the token before each id

    @cached_property
    def ids(self) -> Tensor:
        """int64 [T]"""
        return torch.tensor([id for chunk in self.chunks for id in chunk.ids], device=self.features.device)

    @cached_property
    def last(self) -> Tensor:
        """Where the last id of each request is, int64 [N]."""
        return torch.tensor([chunk.end - chunk.start for chunk in self.chunks]).cumsum(0) - 1


class DraftNet(Protocol):
    """What guesses. Features of a token are what it goes on from; H is 0 where it needs none."""

    bytes: float  # of weights that it reads for a guess

    @property
    def feature_layers(self) -> Sequence[int]: ...  # of the served model: what it computed behind so many is heard, too

    @property
    def ids(self) -> Tensor | None: ...  # int64 [v]: the tokens that it knows; None for all

    def probe(self) -> list[Tensor]:
        """Keys of one token as each of its layers makes them, [1, kv_heads, 1, head_dim]."""

    def features(self, of_layers: Sequence[Tensor], hidden: Tensor) -> Tensor:
        """What it goes on from, of what the served model has computed behind feature_layers and hands to its output
        head."""

    def read(self, reading: Reading, way: EagerWay) -> object: ...

    def guess(
        self, reading: Reading, way: EagerWay, likely: LikelyTokens, lengths: Sequence[int], least: Sequence[float]
    ) -> list[list[Guess]]:
        """Read, and guess what each request says next: one guess and, as long as all of its guesses so far are likelier
        than its `least`, another one, up to so many."""


class SteppedNet:
    """What guesses in one step after the other."""

    ids: Tensor | None

    def forward(self, ids: Tensor, features: Tensor, step: AttentionStep) -> tuple[Tensor, Tensor]:
        """Of tokens, int64 [T], behind tokens of these features [T, H]: what logits() takes, and their own features."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, v] of [n, H]."""
        raise NotImplementedError

    def read(self, reading: Reading, way: EagerWay) -> tuple[Tensor, Tensor]:
        """What logits() takes after the last id of each request, and features."""
        hidden, features = self.forward(reading.ids, reading.features, way.step(reading.chunks, MOST_ROWS))
        return hidden[reading.last], features[reading.last]

    def guess(
        self, reading: Reading, way: EagerWay, likely: LikelyTokens, lengths: Sequence[int], least: Sequence[float]
    ) -> list[list[Guess]]:
        guesses: list[list[Guess]] = [[] for _ in lengths]
        going, chances = [*range(len(lengths))], [1.0] * len(lengths)
        hidden, features = self.read(reading, way)
        while True:
            best, chance = likely.choose(self.logits(hidden), torch.tensor(going))
            tokens = (best if self.ids is None else self.ids[best]).tolist()
            for n, token, each in zip(going, tokens, chance.tolist(), strict=True):
                chances[n] *= each
                guesses[n].append(Guess(token, chances[n]))
            kept = [place for place, n in enumerate(going) if len(guesses[n]) < lengths[n] and chances[n] > least[n]]
            if not kept:
                return guesses
            going, features = [going[place] for place in kept], features[kept]
            ids = torch.tensor([tokens[place] for place in kept], device=features.device)
            ends = [(reading.chunks[n].request, reading.chunks[n].end + len(guesses[n])) for n in going]
            newest = [Chunk(request, end - 1, end) for request, end in ends]
            hidden, features = self.forward(ids, features, way.step(newest, MOST_ROWS))


class HeadNet(SteppedNet):
    """An EagleHead behind a model, whose embeddings and output head it takes."""

    def __init__(self, head: EagleHead, model: PreTrainedModel) -> None:
        head.config._attn_implementation = ATTENTION
        self.head, self.embeddings, self.ids = head, input_embeddings(model), head.ids
        self.output = _some_rows(model.get_output_embeddings(), head.ids)
        self.bytes = _bytes(head) + _bytes(self.output)
        self.feature_layers = head.feature_layers
        if isinstance(self.output, Int8Linear):
            from llama2_chat.engine.cpu_llama import speed_up_head  # which compiles what nobody else needs

            speed_up_head(head)

    def probe(self) -> list[Tensor]:
        config: Any = self.head.config
        like = self.embeddings.weight
        keys = like.new_zeros(1, config.num_key_value_heads, 1, config.head_dim)
        return [keys] * config.num_hidden_layers

    def forward(self, ids: Tensor, features: Tensor, step: AttentionStep) -> tuple[Tensor, Tensor]:
        hidden = self.head(self.embeddings(ids)[None], features[None], step.positions[None], step=step)[0]
        return hidden, hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def features(self, of_layers: Sequence[Tensor], hidden: Tensor) -> Tensor:
        return self.head.fused(of_layers, hidden)


class ModelNet(SteppedNet):
    """A small model with the vocabulary of the served one."""

    ids = None
    feature_layers = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.bytes = model, _bytes(model)
        attention_windows(model)
        if isinstance(model.get_output_embeddings(), Int8Linear):
            from llama2_chat.engine.cpu_llama import speed_up_llama  # which compiles what nobody else needs

            speed_up_llama(model)
        self._mask = torch.empty(1, 1, 1, 1, device=input_embeddings(model).weight.device)

    def probe(self) -> list[Tensor]:
        return probe_keys(self._model)

    def forward(self, ids: Tensor, features: Tensor, step: AttentionStep) -> tuple[Tensor, Tensor]:
        body: Any = self._model.base_model
        output = body(
            input_ids=ids[None],
            position_ids=step.positions[None],
            attention_mask=self._mask,
            use_cache=False,
            step=step,
        )
        return output.last_hidden_state[0], features

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.get_output_embeddings()(hidden)

    def features(self, of_layers: Sequence[Tensor], hidden: Tensor) -> Tensor:
        return hidden[:, :0]


@dataclass
class _Row:
    """How far the guessing model has read a request."""

    next: int  # the first of its ids that has not been read
    features: Tensor  # [n, H] of the served model, of the token before that and those that follow it


class Drafter:
    """Guesses for running requests. Used by the engine's thread alone.

    model: the served one. way: how steps of `net` find their keys and values.
    """

    def __init__(self, net: DraftNet, model: PreTrainedModel, way: EagerWay, sampler: SamplerState) -> None:
        self._net, self._way, self._sampler = net, way, sampler
        self.cost = net.bytes / _bytes(model)  # of a guess, where a token of the served model costs 1
        self._rows: WeakKeyDictionary[Request, _Row] = WeakKeyDictionary()
        self._heard: dict[int, Tensor] = {}  # what was computed behind so many layers, [T, H]; 0 for the whole model
        body: Any = model.base_model
        listening = {behind: body.layers[behind - 1] for behind in net.feature_layers} | {0: body}
        self._hooks = [each.register_forward_hook(partial(self._hear, behind)) for behind, each in listening.items()]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hear(self, behind: int, module: nn.Module, args: Any, output: Any) -> None:
        self._heard[behind] = (output if isinstance(output, Tensor) else output.last_hidden_state)[0]

    def hear(self, states: dict[int, Tensor]) -> None:
        """What a step has computed that is not the model's own forward: as _heard."""
        self._heard = states

    def read(self, chunks: Sequence[Chunk], *, prompts: bool = False) -> None:
        """After the served model has computed these chunks. prompts: all of their ids are certain, and read at once."""
        try:
            self._read(chunks, prompts)
        except Exception:
            log.exception("A model that guesses could not read; these answers go on without its guesses")
            for chunk in chunks:
                chunk.request.stop_model()

    def _read(self, chunks: Sequence[Chunk], prompts: bool) -> None:
        heard, self._heard = self._heard, {}
        if all(chunk.request.confidence is None for chunk in chunks):
            return
        features = self._net.features([heard[behind] for behind in self._net.feature_layers], heard[0])
        for chunk, own in zip(chunks, features.split([chunk.end - chunk.start for chunk in chunks]), strict=True):
            if chunk.request.confidence is not None:
                self._append(chunk, own)
        if prompts and (read := [chunk for chunk in chunks if chunk.request.confidence is not None]):
            whole = [Chunk(chunk.request, self._rows[chunk.request].next, chunk.end) for chunk in read]
            self._net.read(self._reading(whole), self._way)

    def _append(self, chunk: Chunk, features: Tensor) -> None:
        row = self._rows.get(chunk.request)
        known = chunk.start - row.next + 1 if row else -1  # whose tokens have been chosen since
        if row is None or not 0 <= known <= len(row.features):
            # What came before was not seen, such as blocks found in the KV cache: the first token stands in for it.
            row = self._rows[chunk.request] = _Row(chunk.start, features[:1])
            known = 1
        row.features = row.features[:known]
        if known > MOST_FEATURES:  # the newest token may be in flight
            known_ids = Chunk(chunk.request, row.next, min(chunk.start + 1, len(chunk.request.ids)))
            self._net.read(self._reading([known_ids]), self._way)
        row.features = torch.cat((row.features, features))

    def draft(self, requests: Sequence[Request], lengths: Sequence[int], least: Sequence[float]) -> list[list[Guess]]:
        """So many guesses at most at what each request says next, behind such as are likelier than `least`. There are
        blocks for their keys and values."""
        guesses: list[list[Guess]] = [[] for _ in requests]
        going = [n for n, request in enumerate(requests) if self._is_ready(request) and lengths[n]]
        if not going:
            return guesses
        reading = self._reading([Chunk(requests[n], self._rows[requests[n]].next, len(requests[n].ids)) for n in going])
        likely = self._sampler.likely(torch.tensor([requests[n].slot for n in going]), self._net.ids)
        limits = [lengths[n] for n in going], [least[n] for n in going]
        made = self._net.guess(reading, self._way, likely, *limits)
        for n, each in zip(going, made, strict=True):
            guesses[n] = each
        return guesses

    def _is_ready(self, request: Request) -> bool:
        row = self._rows.get(request)
        return row is not None and 0 < len(request.ids) - row.next <= len(row.features)

    def _reading(self, chunks: Sequence[Chunk]) -> Reading:
        """These ids come next, and will have been read."""
        features = []
        for chunk in chunks:
            row, count = self._rows[chunk.request], chunk.end - chunk.start
            features.append(row.features[:count])
            row.next, row.features = chunk.end, row.features[count:]
        return Reading(chunks, torch.cat(features))


def _bytes(module: nn.Module) -> float:
    """Of the weights of its linear layers."""
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "out_features")]
    return sum(layer.in_features * layer.out_features * _weight_bytes(layer) for layer in layers)


def _weight_bytes(layer: Any) -> float:
    """Of one weight."""
    if isinstance(layer, Int8Linear):
        return 1
    if isinstance(layer, PackedLinear):
        return layer.bits / 8
    weight = getattr(layer, "weight", None)  # of layers that are joined or adapted those within them count
    if weight is None:
        return 0
    return 0.5 if weight.dtype == torch.uint8 else float(weight.element_size())  # NF4: two in a byte


def _some_rows(output: nn.Module, ids: Tensor | None) -> nn.Module:
    """An output head for these ids alone."""
    if ids is None:
        return output
    if isinstance(output, Int8Linear):
        rows = output.codes[ids].float() * (output.scale[ids] * (127 * 128))[:, None]
    else:
        weight: Any = output.weight
        rows = weight[ids.to(weight.device)]
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=False)
    return Int8Linear(linear) if isinstance(output, Int8Linear) else linear
