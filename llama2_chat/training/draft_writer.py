"""Many answers side by side, for training: each chosen as the engine would choose it, with its own random numbers.

On a GPU it is faster than the engine at answers by the thousands, for nobody reads them while they are written: whether
one has ended is looked at every few tokens, and a prompt that waits takes its row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llama2_chat.engine.cuda_graphs import step_kernels
from llama2_chat.engine.kv_pool import BLOCK_SIZE, input_embeddings, probe_keys
from llama2_chat.engine.paged_attention import Scoring
from llama2_chat.engine.sampler import NARROW, SamplerState, draws, is_narrow
from llama2_chat.types import SamplingParams

LOOK_EVERY = 16  # tokens: then answers that have ended leave, and others begin
READ_AT_ONCE = 65_536  # tokens of prompts, with what fills them up


class Asked(NamedTuple):
    """What shall be answered. number: by which the answer is known."""

    number: int
    prompt: list[int]
    params: SamplingParams


class Desk:
    """Rows of texts, each a prompt with as much of its answer as there is."""

    def __init__(
        self, model: PreTrainedModel, at_once: int, columns: int, most: int, stop_ids: Collection[int]
    ) -> None:
        """at_once: rows. columns: tokens of a prompt with its answer, at most. most: tokens of an answer, at most."""
        embeddings = input_embeddings(model).weight
        self._device, self._vocab_size, self._stop_ids = embeddings.device, embeddings.shape[0], stop_ids
        kernels = step_kernels(model)
        self._kernel = kernels.decode_attention if kernels else None
        sample_narrow = kernels.sample_narrow if kernels else None
        if self._device.type == "cpu":
            from llama2_chat.kernels.cpu_sampling import sample_narrow  # compiled, which nobody else needs
        self._model, self._most = model, most
        self._sampler = SamplerState(at_once, self._vocab_size, most, self._device, sample_narrow)
        self.columns = -(-columns // BLOCK_SIZE) * BLOCK_SIZE
        self._waiting: deque[Asked] = deque()
        self._rows: list[Asked | None] = [None] * at_once
        # Of each row: which slot of the sampler is its, what stands in it, where its answer ends at the latest, and
        # whether it has ended. One column more takes what is written to rows that have.
        self._slots = torch.arange(at_once, device=self._device)
        self._texts = torch.zeros(at_once, self.columns + 1, dtype=torch.long, device=self._device)
        self._last = torch.zeros(at_once, dtype=torch.long, device=self._device)
        self._ended = torch.ones(at_once, dtype=torch.bool, device=self._device)
        self._stops = torch.tensor(sorted(stop_ids), device=self._device)
        # Keys and values of each layer, [rows, columns, kv_heads, head_dim].
        shapes = [(at_once, self.columns, keys.shape[1], keys.shape[3]) for keys in probe_keys(model)]
        self._layers = [[torch.zeros(shape, dtype=model.dtype, device=self._device) for _ in "kv"] for shape in shapes]
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}  # recorded, by how many candidates are kept

    def ask(self, asked: Asked) -> None:
        """Let this begin next. Its prompt must be shorter than `columns`, where its answer ends."""
        self._waiting.append(asked)

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[int, list[int]]]:
        """Numbers and answers of these and of those that ask() adds meanwhile, as they end."""
        others, finished = iter(asked), list[tuple[int, list[int]]]()
        while True:
            self._begin(others, len(finished))
            if any(self._rows):
                kept = NARROW if all(is_narrow(row.params) for row in self._rows if row) else self._vocab_size
                for _ in range(LOOK_EVERY):
                    self._step(kept)
            elif not finished:
                return
            yield from finished  # while a GPU computes
            finished = self._finished()

    @torch.inference_mode()
    def _begin(self, others: Iterator[Asked], ended: int) -> None:
        """Let what is asked take the rows that are free, and choose the first tokens.

        ended: answers after which as many may be asked.
        """
        busy = [row for row, asked in enumerate(self._rows) if asked is not None]
        free = [row for row, asked in enumerate(self._rows) if asked is None]
        while len(self._waiting) < len(free) and (one := next(others, None)):
            self._waiting.append(one)
        begun = [(row, self._waiting.popleft()) for row in free[: len(self._waiting)]]
        if not begun and len(busy) + ended <= len(self._rows) / 2:
            self._keep(busy + free[:ended])
        begun.sort(key=lambda each: len(each[1].prompt))
        while begun:
            count = max(1, READ_AT_ONCE // len(begun[-1][1].prompt))
            self._read(begun[-count:])
            del begun[-count:]

    def _read(self, begun: Sequence[tuple[int, Asked]]) -> None:
        for row, asked in begun:
            self._rows[row] = asked
        rows = torch.tensor([row for row, _ in begun], device=self._device)
        prompts, settings = [asked.prompt for _, asked in begun], [asked.params for _, asked in begun]
        ids = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True).to(self._device)
        limits = zip(prompts, settings, strict=True)
        ends = [min(len(prompt) + each.max_new_tokens, self.columns) - 1 for prompt, each in limits]
        self._last[rows], self._ended[rows] = torch.tensor(ends, device=self._device), False
        numbers = torch.stack([draws(each, self._most) for each in settings])
        self._sampler.join_all(self._slots[rows], prompts, settings, numbers)
        hidden = run(self._model, ids, Prompts(self._layers, rows)).last_hidden_state
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        kept = NARROW if all(map(is_narrow, settings)) else self._vocab_size
        self._choose(hidden[torch.arange(len(rows), device=self._device), last], rows, kept)

    @torch.inference_mode()
    def _step(self, kept: int) -> None:
        """The next token of each row; on a GPU as a CUDA graph, whose many small kernels would take longer to launch
        than to run."""
        if self._device.type == "cpu":
            self._compute(kept)
        elif kept in self._steps:
            self._steps[kept].replay()
        else:
            self._compute(kept)  # as it is, which makes ready what cannot be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=next((each.pool() for each in self._steps.values()), None)):
                self._compute(kept)
            self._steps[kept] = graph

    def _compute(self, kept: int) -> None:
        # What has ended goes on at the first place, where there is nothing to attend to.
        at = torch.where(self._ended, 0, self._sampler.positions[self._slots])
        ids = self._sampler.tokens[self._slots]
        width = self.columns if self._device.type != "cpu" else int(at.max()) + 1
        step = NextTokens(self._layers, at, width, self._kernel)
        hidden = run(self._model, ids[:, None], step, at[:, None]).last_hidden_state
        self._choose(hidden[:, -1], torch.arange(len(at), device=self._device), kept)

    def _choose(self, hidden: Tensor, rows: Tensor, kept: int) -> None:
        """The next tokens of these rows. hidden: what the output head gets, [n, H]. rows: int64 [n]."""
        slots = self._slots[rows]
        tokens = self._sampler.sample(self._model.get_output_embeddings()(hidden), slots, kept)
        places = torch.where(self._ended[rows], self.columns, self._sampler.positions[slots])
        self._texts[rows, places] = tokens
        stops = (tokens[:, None] == self._stops).any(1)
        self._ended[rows] = stops | (tokens < 0) | (places >= self._last[rows])

    def _finished(self) -> list[tuple[int, list[int]]]:
        ended = self._ended.tolist()
        rows = [row for row, asked in enumerate(self._rows) if asked and ended[row]]
        texts, finished = self._texts[torch.tensor(rows, dtype=torch.long, device=self._device)].tolist(), []
        for row, text in zip(rows, texts, strict=True):
            asked, self._rows[row] = self._rows[row], None
            assert asked is not None
            said = text[len(asked.prompt) : min(len(asked.prompt) + asked.params.max_new_tokens, self.columns)]
            end = next((n for n, id in enumerate(said) if id in self._stop_ids or id < 0), len(said))
            finished.append((asked.number, said[:end]))
        return finished

    def _keep(self, rows: list[int]) -> None:
        """Let the other rows go."""
        which = torch.tensor(rows, dtype=torch.long, device=self._device)
        self._rows = [self._rows[row] for row in rows]
        self._slots, self._texts, self._last, self._ended = (
            states[which] for states in (self._slots, self._texts, self._last, self._ended)
        )
        for layer in self._layers:
            layer[:] = [states[which] for states in layer]
        self._steps.clear()


def run(model: Any, ids: Tensor, step: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
    """A forward pass of all but the output head over rows of ids, int64 [B, T], that attend by `step`.

    positions: int64 [B, T]; None for each token's place in its row.
    """
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = torch.empty(1, 1, 1, 1, device=ids.device)  # transformers makes none when it is given one
    return model.base_model(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, step=step, **kwargs
    )


class Prompts:
    """Texts side by side that begin in the first column: an AttentionStep of many rows, which attends to and returns
    [B, ...] where that has 1. What fills up a row stands behind its text, which does not attend to it."""

    def __init__(self, layers: Sequence[Sequence[Tensor]] = (), rows: Tensor | None = None) -> None:
        """layers: where their keys and values go, [rows, columns, kv_heads, head_dim] each; none are kept without.
        rows: int64 [B], of these."""
        self._layers, self._rows = layers, rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if self._rows is not None:
            for states, new in zip(self._layers[layer], (key, value), strict=True):
                states[:, : key.shape[2]].index_copy_(0, self._rows, new.transpose(1, 2))
        return scoring.mix(query, key, value, None, is_causal=True).transpose(1, 2)


class NextTokens:
    """The same, of the token that comes next in each row.

    at: int64 [B], where it stands. width: columns of which it sees those up to itself. kernel: decode_attention.
    """

    def __init__(
        self, layers: Sequence[Sequence[Tensor]], at: Tensor, width: int, kernel: Callable[..., Tensor] | None
    ) -> None:
        self._layers, self._at, self._kernel = layers, at, kernel
        rows, columns = layers[0][0].shape[:2]
        self._rows = torch.arange(rows, device=at.device)
        self._seen = (torch.arange(width, device=at.device) <= at[:, None])[:, None, None]
        self._cells = self._rows * columns + at
        self._table = torch.arange(rows * columns // BLOCK_SIZE, dtype=torch.int32, device=at.device).view(rows, -1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        B, kv_heads, _, head_dim = key.shape
        if self._kernel is not None and scoring.is_plain:
            of_tokens = (each.transpose(0, 2) for each in (query, key, value))  # as of one text with B tokens
            kept = (each.view(-1, BLOCK_SIZE, kv_heads, head_dim) for each in self._layers[layer])
            places = self._cells, self._rows, self._at, self._table
            return self._kernel(*of_tokens, None, None, *places, scoring.scale, *kept).transpose(0, 1)
        for states, new in zip(self._layers[layer], (key, value), strict=True):
            states[self._rows, self._at] = new[:, :, 0]
        width = self._seen.shape[-1]
        keys, values = (states[:, :width].transpose(1, 2) for states in self._layers[layer])
        # Queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        shared = query.reshape(B, kv_heads, -1, head_dim)
        return scoring.mix(shared, keys, values, self._seen).reshape(B, 1, -1, head_dim)
