"""The model that is measured, loaded in this process, and the little that a benchmark must know of its inside."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import pydoc_data.topics
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llama2_chat.engine.reply import StreamedReply
from llama2_chat.settings import Settings
from model import ChatModel

GB = 1_000_000_000
RANDOM = random.Random(0)
# The first id of each prompt: no two prompts begin alike, or one would find the other's keys and values in the cache.
FIRST_IDS = itertools.count(1000)


def load(argv: Sequence[str | Path]) -> ChatModel:
    """The model that these flags of app.py ask for. Ends the program with a sentence if it cannot be loaded."""
    chat = ChatModel(Settings.read(list(map(str, argv)))).load()
    atexit.register(chat.close)  # a thread that computes while Python exits would abort the process
    if chat.state != "ready":
        sys.exit(chat.status.error)
    return chat


# ---- Replies that know their tokens' times ----


class TimedReply(StreamedReply):
    """A reply that knows when each token came. Its text would not show it: a character may take several tokens."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.submitted = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def gaps_s(self, since: float = 0) -> list[float]:
        """Seconds between two tokens, of which the later one came after `since`."""
        return [after - before for before, after in itertools.pairwise(self.times) if after > since]


def time_full_answers(chat: ChatModel) -> None:
    """From now on every reply is a TimedReply, and every answer has its full length: stop ids do not end it."""
    chat.reply_type = TimedReply
    chat.serving.engine.stop_ids = set()


@contextlib.contextmanager
def every_reply(chat: ChatModel) -> Iterator[list[TimedReply]]:
    """The replies that anyone requests meanwhile, in the order of their submits."""
    replies: list[TimedReply] = []

    class RecordedReply(TimedReply):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            replies.append(self)

    before, chat.reply_type = chat.reply_type, RecordedReply
    try:
        yield replies
    finally:
        chat.reply_type = before


# ---- Prompts ----


def fresh_ids(chat: ChatModel, tokens: int) -> list[int]:
    """A random prompt that shares no beginning with another."""
    embeddings: Any = chat.serving.model.get_input_embeddings()
    vocab_size = embeddings.num_embeddings
    lowest = min(1000, vocab_size // 2)  # special tokens and those of single bytes are below
    return [next(FIRST_IDS) % vocab_size, *(RANDOM.randrange(lowest, vocab_size) for _ in range(tokens - 1))]


PERPLEXITY_TEXT = "Python's own language reference (pydoc_data.topics)"


def text_ids(tokenizer: Any, tokens: int) -> list[int]:
    """The beginning of Python's own language reference."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]


@torch.inference_mode()
def perplexity(model: Any, input_ids: Sequence[int], window: int = 1024) -> float:
    """exp of the mean negative log-likelihood per token, in windows that are independent of each other."""
    ids = torch.tensor(input_ids, device=model.device).split(window)
    losses = [model(input_ids=part[None], labels=part[None]).loss.float() for part in ids]
    return torch.stack(losses).mean().exp().item()


# ---- Memory ----


def kv_cache_bytes(chat: ChatModel) -> int:
    return chat.serving.engine.runner.kv_bytes


def gpu_gb(measure: Callable[[int], int]) -> str | None:
    """One of torch.cuda's measures for each GPU of this process, such as "8.1 + 8.0"; None if there is none. Ranks have
    processes of their own, and of a GPU as much as the first."""
    measured = map(measure, range(torch.cuda.device_count()))
    return " + ".join(f"{taken / GB:.1f}" for taken in measured if taken) or None
