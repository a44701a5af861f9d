"""Many answers on a CPU, for training: written by the engine in 8 bits, as visitors get them there.

Its compiled steps are many times as fast as rows of a Desk in 16 bits, whose products many processors compute slowly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import Tensor

from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import BLOCK_SIZE, probe_keys
from llama2_chat.engine.model_runner import ModelRunner, build_runner
from llama2_chat.engine.request import Request
from llama2_chat.loading import load
from llama2_chat.training.base_model import BaseModel, no_progress
from llama2_chat.training.draft_writer import Asked


def served_engine(base: BaseModel, at_once: int, max_length: int) -> Engine:
    """With the model in 8 bits and room for so many texts of so many tokens."""
    model = load.load(replace(base.checkpoint, quantization="int8"), no_progress).model
    text_tokens = (-(-max_length // BLOCK_SIZE) + 1) * BLOCK_SIZE  # one block is padding, of all of them
    token_bytes = sum(2 * keys.numel() * keys.element_size() for keys in probe_keys(model))
    free = {torch.device("cpu"): at_once * text_tokens * token_bytes}
    runner: ModelRunner = build_runner(model, lambda: free, max_length, max_batch=at_once)
    return Engine(runner, base.stop_ids, queue_limit=2 * at_once)


class EngineDesk:
    """What Desk is without an engine: answers come as they end."""

    def __init__(self, engine: Engine, columns: int) -> None:
        """columns: tokens of a prompt with its answer, at most."""
        self._engine, self.columns = engine, columns
        self._waiting: deque[Asked] = deque()
        self._ended: SimpleQueue[_Written] = SimpleQueue()

    def ask(self, asked: Asked) -> None:
        """Let this begin next. Its prompt must be shorter than `columns`, where its answer ends."""
        self._waiting.append(asked)

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[int, list[int]]]:
        """Numbers and answers of these and of those that ask() adds meanwhile, as they end."""
        others, writing, requests = iter(asked), 0, dict[int, Request]()
        while True:
            while writing < 2 * self._engine.runner.max_batch:  # a half waits, so that no row does
                one = self._waiting.popleft() if self._waiting else next(others, None)
                if one is None:
                    break
                params = replace(
                    one.params, max_new_tokens=min(one.params.max_new_tokens, self.columns - len(one.prompt))
                )
                requests[one.number] = self._engine.submit(one.prompt, params, _Written(one.number, self._ended))
                writing += 1
            if not writing:
                return
            written = self._ended.get()
            writing -= 1
            failed = requests.pop(written.number).error  # the engine has logged it
            yield written.number, [] if failed else written.ids


class _Written:
    """A streamer that keeps the ids of an answer until it has ended."""

    def __init__(self, number: int, ended: SimpleQueue[_Written]) -> None:
        self.number, self.ids, self._ended = number, list[int](), ended

    def put(self, value: Tensor) -> None:
        self.ids.append(int(value))

    def end(self) -> None:
        self._ended.put(self)
