"""A head that guesses, trained on a model's own answers: to find tokens as likely as the model does.

A guess rests on guesses before it, so training does, too: the head goes on from its own features several times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from llama2_chat.errors import ChatError
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.training.draft_data import Answer
from llama2_chat.training.draft_options import DraftOptions
from llama2_chat.training.draft_writer import Prompts, run

STEP_WEIGHT = 0.85  # of each guess in a row, times that of the one before
WARMUP_STEPS = 50
HIDDEN = -1e9  # as an attention score
FEATURE_PARTS = (0.1, 0.5)  # of the model's layers: behind so many the head takes in what they have computed, too
GPU_MULTIPLE = 128  # tokens, of lengths of batches
PLACES_MULTIPLE = 2048  # tokens of a batch behind which guesses are looked at


class Batch(NamedTuple):
    """Answers behind their prompts, filled up with id 0."""

    ids: Tensor  # int64 [B, T]
    at: Tensor  # int64 [n], of the B * T: tokens behind which guesses are looked at
    weights: Tensor  # float32 [n], of what is learned there; together 1
    states: Tensor | None = None  # what states_of() computes for them, where that is kept


def new_head(model: PreTrainedModel, answers: Sequence[Answer], size: int) -> EagleHead:
    """An untrained head, in float32.

    size: of its vocabulary, the tokens that these answers have most often; 0 for all.
    """
    body: Any = model.model
    deep, norm, embedded = len(body.layers), body.norm.weight.float(), body.embed_tokens.weight.float()
    behind = sorted({round(deep * part) for part in FEATURE_PARTS} - {0, deep})
    own = {"num_hidden_layers": 1, "output_norm": True, "feature_layers": behind}
    # Embeddings are small beside features: a head would hardly read in them which token is the newest one.
    own["embedding_scale"] = float(norm.square().mean().sqrt() / embedded.square().mean().sqrt())
    config = LlamaConfig.from_dict(model.config.to_dict() | own)
    vocabulary = None
    if 0 < size < config.vocab_size:
        vocabulary = _counts(answers, config.vocab_size).topk(size).indices.sort().values
    head = EagleHead(config, input_norm=True, vocabulary=vocabulary)
    with torch.no_grad():
        head.norm.weight.copy_(norm)
        if behind:
            head.fuse.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size)
    return head.to(model.device, torch.float32)


def share_that_it_says(head: EagleHead, answers: Sequence[Answer]) -> float:
    """Of the answers' tokens those that are in its vocabulary."""
    counts = _counts(answers, head.config.vocab_size)
    return 1.0 if head.ids is None else float(counts[head.ids.cpu()].sum() / counts.sum())


def _counts(answers: Sequence[Answer], size: int) -> Tensor:
    """How often each token is in these answers, int64 [V]."""
    ids = [id for answer in answers for id in answer.ids[answer.prompt_tokens :]]
    return torch.tensor(ids, dtype=torch.long).bincount(minlength=size)


def make_batches(
    model: PreTrainedModel, head: EagleHead, answers: Sequence[Answer], options: DraftOptions
) -> list[Batch]:
    """Answers of about the same length side by side; on a GPU of few shapes, for each of which steps are recorded.

    Raises ChatError if none fits into options.max_length.
    """
    batches: list[Batch] = []
    rows: list[Answer] = []
    multiple = 1 if model.device.type == "cpu" else min(GPU_MULTIPLE, options.max_length)
    fitting = [answer for answer in answers if answer.prompt_tokens < options.max_length]
    if not fitting:
        raise ChatError(f"No prompt is shorter than {options.max_length} tokens, with its answer: raise --max_length.")

    def finish() -> None:
        T = min(options.max_length, -(-max(len(answer.ids) for answer in rows) // multiple) * multiple)
        computed = len(rows) if multiple == 1 else options.batch_tokens // T
        batch = make_batch(rows, T, computed, 1 if multiple == 1 else PLACES_MULTIPLE, model.device)
        if (
            model.device.type == "cpu"
        ):  # a GPU has computed them again sooner than they would come from the host's memory
            batch = batch._replace(states=states_of(model, head, batch.ids))
        batches.append(batch)
        rows.clear()

    for answer in sorted(fitting, key=lambda answer: len(answer.ids)):
        T = min(options.max_length, -(-len(answer.ids) // multiple) * multiple)
        if rows and T * (len(rows) + 1) > options.batch_tokens:
            finish()
        rows.append(answer)
    finish()
    return batches


def make_batch(answers: Sequence[Answer], T: int, B: int, multiple: int, device: torch.device) -> Batch:
    """As many tokens of each answer as fit into T, in so many rows. multiple: of tokens behind which is looked."""
    ids = torch.zeros(B, T, dtype=torch.long)
    learned = torch.zeros(B, T, dtype=torch.bool)
    for row, answer in enumerate(answers):
        kept = answer.ids[:T]
        ids[row, : len(kept)] = torch.tensor(kept)
        learned[row, answer.prompt_tokens - 1 : len(kept) - 1] = True
    at = learned.flatten().nonzero()[:, 0]
    weights = torch.full((len(at),), 1 / max(len(at), 1))
    padding = (0, -len(at) % multiple)
    return Batch(ids.to(device), F.pad(at, padding).to(device), F.pad(weights, padding).to(device))


@torch.no_grad()
def states_of(model: PreTrainedModel, head: EagleHead, ids: Tensor) -> Tensor:
    """[B, T, n * H] in 16 bits: what the model computes for ids [B, T] behind each of the head's feature_layers, and
    what its output head gets."""
    output = run(model, ids, Prompts(), output_hidden_states=bool(head.feature_layers))
    states = [*(output.hidden_states[n] for n in head.feature_layers), output.last_hidden_state]
    return torch.cat(states, -1).to(torch.bfloat16)


def parts_of(states: Tensor, head: EagleHead) -> tuple[list[Tensor], Tensor]:
    """Of states_of(): behind each of the head's feature_layers, and features, float32 [B, T, H]."""
    *of_layers, features = states.float().chunk(len(head.feature_layers) + 1, -1)
    return of_layers, features


def unrolled(head: EagleHead, embedded: Tensor, features: Tensor, guesses: int) -> Iterator[Tensor]:
    """The head's features [B, T, H], first from the model's, then so many times in all from its own: those at t stand
    for what the model would compute at t.

    embedded, features: [B, T, H], of the tokens; features are fused. In the n-th pass a token sees what was known when
    guessing began n tokens before it, and the guesses since.
    """
    places = torch.arange(features.shape[1], device=features.device)
    turns = head.rotary_emb(features, places[None])
    layers = [_UnrolledLayer(layer, turns) for layer in head.layers]
    for _ in range(guesses):
        # Behind each token stand the features of the one before; the first one's stand in for what is not there.
        hidden = head.joined(embedded, torch.cat((features[:, :1], features[:, :-1]), 1))
        for layer in layers:
            hidden = layer.forward(hidden)
        features = head.norm(hidden)
        yield features


class _UnrolledLayer:
    """A layer of a head in one pass after the other, with the keys and values of all of them."""

    def __init__(self, layer: Any, turns: tuple[Tensor, Tensor]) -> None:
        self._layer, (self._cos, self._sin) = layer, (turn[:, None] for turn in turns)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, T, H]."""
        B, T, _ = hidden.shape
        layer, attention = self._layer, self._layer.self_attn
        keys, values, step = self._keys, self._values, len(self._keys)
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            project(normed).view(B, T, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (states * self._cos + rotate_half(states) * self._sin for states in (q, k))
        keys.append(k.repeat_interleave(attention.num_key_value_groups, 1))
        values.append(v.repeat_interleave(attention.num_key_value_groups, 1))
        unseen = torch.ones(T, T, dtype=torch.bool, device=hidden.device).triu(1 - step)
        scores = (q @ keys[0].transpose(2, 3)).masked_fill(unseen, HIDDEN)
        own = [(q * _later(keys[n], step - n)).sum(-1, keepdim=True) for n in range(1, step + 1)]
        weights = (torch.cat((scores, *own), -1) * attention.scaling).softmax(-1)
        mixed = weights[..., :T] @ values[0]
        for n in range(1, step + 1):
            mixed = mixed + weights[..., T + n - 1, None] * _later(values[n], step - n)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _later(states: Tensor, tokens: int) -> Tensor:
    """states [B, heads, T, head_dim], moved on by so many tokens."""
    return F.pad(states, (0, 0, tokens, 0))[:, :, : states.shape[2]]


class Training:
    """A head that learns from batches. What save() leaves can be gone on with, and gives the head that it would have
    been."""

    def __init__(
        self, model: PreTrainedModel, head: EagleHead, batches: Sequence[Batch], options: DraftOptions
    ) -> None:
        self._model, self.head, self._batches, self._options = model, head, batches, options
        self._on_gpu = model.device.type == "cuda"
        rate: Any = torch.tensor(0.0, device=model.device) if self._on_gpu else 0.0  # a recorded step takes no number
        self._optimizer = torch.optim.AdamW(
            head.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, capturable=self._on_gpu
        )
        # Of each shape of a batch a step, the batch that it reads, and its loss.
        self._recorded: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.steps, self.total = 0, max(1, round(options.epochs * len(batches)))
        self._seconds = 0.0  # that earlier runs took

    def run(self) -> Iterator[tuple[int, float, float]]:
        """Train the head in place. Yields after each step how many there have been, its loss, and which share of all is
        over, in steps or in time, whichever ends first."""
        options, before, started = self._options, self._seconds, time.monotonic()
        while (spent := self._spent) < 1:
            rate = options.learning_rate * min(1, (self.steps + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * spent)) / 2
            for group in self._optimizer.param_groups:
                if self._on_gpu:
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            batch = self._batches[self._next]
            loss = self._replay(batch) if self._on_gpu else self._step(batch)
            self.steps, self._seconds = self.steps + 1, before + time.monotonic() - started
            yield self.steps, loss.item(), self._spent

    def _step(self, batch: Batch) -> Tensor:
        loss = _loss(self._model, self.head, batch, self._options.guesses)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def _replay(self, batch: Batch) -> Tensor:
        """A step as a CUDA graph: its thousands of small kernels take longer to launch than to run."""
        shape = (*batch.ids.shape, len(batch.at))
        if shape not in self._recorded:
            own, stream = Batch(*(each.clone() for each in batch[:3])), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(own)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=next((g.pool() for g, *_ in self._recorded.values()), None)):
                loss = self._step(own)
            self._recorded[shape] = graph, own, loss
        graph, own, loss = self._recorded[shape]
        for kept, new in zip(own[:3], batch[:3], strict=True):
            kept.copy_(new)
        graph.replay()
        return loss

    @property
    def _spent(self) -> float:
        return max(self.steps / self.total, self._seconds / 60 / (self._options.minutes or math.inf))

    @property
    def _next(self) -> int:
        """Which batch: all of them in an order that is another one each time."""
        times, place = divmod(self.steps, len(self._batches))
        order = torch.Generator().manual_seed(self._options.seed + times)
        return int(torch.randperm(len(self._batches), generator=order)[place])

    def save(self, file: Path) -> None:
        states = {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict(), "steps": self.steps}
        aside = file.with_suffix(".tmp")
        torch.save(states | {"seconds": self._seconds, "what": self._what}, aside)
        aside.replace(file)

    def go_on(self, file: Path) -> None:
        """Raises ChatError if it was saved of other answers or options, or is damaged."""
        try:
            states = torch.load(file, map_location=self._model.device, weights_only=True)
            is_same = states["what"] == self._what
            if is_same:
                self.head.load_state_dict(states["head"])
                self._optimizer.load_state_dict(states["optimizer"])
                self.steps, self._seconds = states["steps"], states["seconds"]
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, UnpicklingError) as error:
            raise ChatError(f"{file} is damaged. Delete it, and the head is trained from its beginning.") from error
        if not is_same:
            raise ChatError(
                f"{file} is a head half trained on other answers or with other options. Give these again, choose "
                "another --output_dir, or delete it."
            )

    @property
    def _what(self) -> list[object]:
        """What must be the same when it goes on."""
        o = self._options
        ids = sum(int(batch.ids.sum()) for batch in self._batches)
        began = [o.model, str(o.start_from)]
        return [*began, o.vocabulary, o.epochs, o.minutes, o.learning_rate, o.guesses, o.seed, len(self._batches), ids]


def _loss(model: PreTrainedModel, head: EagleHead, batch: Batch, guesses: int) -> Tensor:
    """Of all guesses in a row: how unlike the model's own their chances of tokens are."""
    embedded, output, weight, total = embeddings(model, batch.ids), output_rows(model, head), 1.0, 0.0
    states = states_of(model, head, batch.ids) if batch.states is None else batch.states
    of_layers, features = parts_of(states, head)
    loss = torch.zeros((), device=embedded.device)
    with torch.autocast(embedded.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        chances = F.softmax((features.flatten(0, 1)[batch.at] @ output.T).float(), -1)
        for states in unrolled(head, embedded, head.fused(of_layers, features), guesses):
            logits = (states.flatten(0, 1)[batch.at] @ output.T).float()
            choice = -(chances * F.log_softmax(logits, -1)).sum(-1)
            loss = loss + weight * (batch.weights * choice).sum()
            total, weight = total + weight, weight * STEP_WEIGHT
    return loss / total


def embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    embed: Any = model.get_input_embeddings()
    return embed(ids).float()


def output_rows(model: PreTrainedModel, head: EagleHead) -> Tensor:
    """[v, H]: those of the model's output head that belong to the head's vocabulary."""
    weight: Any = model.get_output_embeddings().weight
    return (weight if head.ids is None else weight[head.ids]).float()
