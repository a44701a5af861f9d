"""A head that guesses, trained on a model's own answers: to find tokens as likely as the model does.

A guess rests on guesses before it, so training does, too: the head goes on from its own features several times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from llama2_chat.errors import ChatError
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.training.draft_data import Answer
from llama2_chat.training.draft_options import DraftOptions

STEP_WEIGHT = 0.85  # of each guess in a row, times that of the one before
WARMUP_STEPS = 50
HIDDEN = -1e9  # as an attention score


@dataclass(frozen=True)
class Batch:
    """Answers behind their prompts, filled up with id 0, and what the model computes for them."""

    ids: Tensor  # int64 [B, T]
    learned: Tensor  # bool [B, T]: whether the token after it is one of an answer
    features: Tensor  # [B, T, H]


def new_head(model: PreTrainedModel, answers: Sequence[Answer], size: int) -> EagleHead:
    """An untrained head, in float32.

    size: of its vocabulary, the tokens that these answers have most often; 0 for all.
    """
    config = LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": 1})
    vocabulary = None
    if 0 < size < config.vocab_size:
        vocabulary = _counts(answers, config.vocab_size).topk(size).indices.sort().values
    return EagleHead(config, vocabulary=vocabulary).to(model.device, torch.float32)


def share_that_it_says(head: EagleHead, answers: Sequence[Answer]) -> float:
    """Of the answers' tokens those that are in its vocabulary."""
    counts = _counts(answers, head.config.vocab_size)
    return 1.0 if head.ids is None else float(counts[head.ids.cpu()].sum() / counts.sum())


def _counts(answers: Sequence[Answer], size: int) -> Tensor:
    """How often each token is in these answers, int64 [V]."""
    counts = torch.zeros(size, dtype=torch.long)
    for answer in answers:
        counts += torch.tensor(answer.ids[answer.prompt_tokens :]).bincount(minlength=size)
    return counts


def make_batches(model: PreTrainedModel, answers: Sequence[Answer], options: DraftOptions) -> list[Batch]:
    """Answers of about the same length side by side. Raises ChatError if none fits into options.max_length."""
    batches: list[Batch] = []
    rows: list[Answer] = []
    fitting = [answer for answer in answers if answer.prompt_tokens < options.max_length]
    if not fitting:
        raise ChatError(f"No prompt is shorter than {options.max_length} tokens, with its answer: raise --max_length.")
    for answer in sorted(fitting, key=lambda answer: len(answer.ids)):
        if rows and min(len(answer.ids), options.max_length) * (len(rows) + 1) > options.batch_tokens:
            batches.append(make_batch(model, rows, options.max_length))
            rows = []
        rows.append(answer)
    return [*batches, make_batch(model, rows, options.max_length)]


@torch.no_grad()
def make_batch(model: Any, answers: Sequence[Answer], max_length: int) -> Batch:
    T = min(max_length, max(len(answer.ids) for answer in answers))
    ids = torch.zeros(len(answers), T, dtype=torch.long)
    learned = torch.zeros(len(answers), T, dtype=torch.bool)
    for row, answer in enumerate(answers):
        kept = answer.ids[:T]
        ids[row, : len(kept)] = torch.tensor(kept)
        learned[row, answer.prompt_tokens - 1 : len(kept) - 1] = True
    ids = ids.to(model.device)
    features = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return Batch(ids, learned.to(model.device), features.to(torch.bfloat16))


def unrolled(head: EagleHead, embedded: Tensor, features: Tensor, guesses: int) -> Iterator[Tensor]:
    """The head's features [B, T, H], first from the model's, then so many times in all from its own: those at t stand
    for what the model would compute at t.

    embedded, features: [B, T, H], of the tokens. In the n-th pass a token sees what was known when guessing began n
    tokens before it, and the guesses since.
    """
    B, T, _ = features.shape
    layer = head.layers[0]
    attention = layer.self_attn
    cos, sin = (turn[:, None] for turn in head.rotary_emb(features, torch.arange(T, device=features.device)[None]))
    causal = torch.ones(T, T, dtype=torch.bool, device=features.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(guesses):
        # Behind each token stand the features of the one before; the first one's stand in for what is not there.
        hidden = head.fc(torch.cat((embedded, torch.cat((features[:, :1], features[:, :-1]), 1)), -1))
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            project(normed).view(B, T, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (states * cos + rotate_half(states) * sin for states in (q, k))
        keys.append(k.repeat_interleave(attention.num_key_value_groups, 1))
        values.append(v.repeat_interleave(attention.num_key_value_groups, 1))
        scores = (q @ keys[0].transpose(2, 3)).masked_fill(~causal.tril(-step), HIDDEN)
        own = [(q * _later(keys[n], step - n)).sum(-1, keepdim=True) for n in range(1, step + 1)]
        weights = (torch.cat((scores, *own), -1) * attention.scaling).softmax(-1)
        mixed = weights[..., :T] @ values[0]
        for n in range(1, step + 1):
            mixed = mixed + weights[..., T + n - 1, None] * _later(values[n], step - n)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))
        features = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        yield features


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
        self._optimizer = torch.optim.AdamW(
            head.parameters(), options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.steps, self.total = 0, max(1, round(options.epochs * len(batches)))
        self._seconds = 0.0  # that earlier runs took

    def run(self) -> Iterator[tuple[int, float, float]]:
        """Train the head in place. Yields after each step how many there have been, its loss, and which share of all is
        over, in steps or in time, whichever ends first."""
        options, before, started = self._options, self._seconds, time.monotonic()
        while (spent := self._spent) < 1:
            rate = options.learning_rate * min(1, (self.steps + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * spent)) / 2
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(self._model, self.head, self._batches[self._next], options.guesses)
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self._optimizer.step()
            self.steps, self._seconds = self.steps + 1, before + time.monotonic() - started
            yield self.steps, loss.item(), self._spent

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
    at, features, weight, total = batch.learned, batch.features.float(), 1.0, 0.0
    embedded, output = embeddings(model, batch.ids), output_rows(model, head)
    loss = torch.zeros((), device=features.device)
    with torch.autocast(features.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        chances = F.softmax((features[at] @ output.T).float(), -1)
        for guessed in unrolled(head, embedded, features, guesses):
            logits = (guessed[at] @ output.T).float()
            loss = loss - weight * (chances * F.log_softmax(logits, -1)).sum(-1).mean()
            total, weight = total + weight, weight * STEP_WEIGHT
    return loss / total


def embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    embed: Any = model.get_input_embeddings()
    return embed(ids).float()


def output_rows(model: PreTrainedModel, head: EagleHead) -> Tensor:
    """[v, H]: those of the model's output head that belong to the head's vocabulary."""
    weight: Any = model.get_output_embeddings().weight
    return (weight if head.ids is None else weight[head.ids]).float()
