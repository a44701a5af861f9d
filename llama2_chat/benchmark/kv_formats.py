"""What keys and values in 8 bits lose: perplexity of a text and its likeliest tokens, beside those with exact ones.

Any model that app.py can load, MODEL_ID. The text goes through the engine: each token sees what is kept of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.embedded import PERPLEXITY_TOKENS
from llama2_chat.benchmark.local_model import PERPLEXITY_TEXT, load, text_ids
from llama2_chat.types import SamplingParams
from model import ChatModel

FORMATS = ("none", "int8", "fp8")
WINDOW = 1024  # tokens of the text that see each other
TELLING = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=1, logprobs=1, prompt_logprobs=True)
ANSWER = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=64)
QUESTIONS = (
    "Tell me about llamas.",
    "How do I bake bread?",
    "Why is the sky blue?",
    "Write a short story about the sea.",
    "What is a prime number?",
    "Name three rivers of Europe.",
    "How does a bicycle stay upright?",
    "Write a poem about winter.",
    "What did the Romans eat?",
    "Explain what a loan is.",
)


class _Said(NamedTuple):
    perplexity: float
    likeliest: list[str]  # before each token of the text
    answers: list[str]
    room: int  # tokens


def measure() -> Iterator[Figures]:
    yield {"perplexity text": f"{PERPLEXITY_TOKENS:,} tokens of {PERPLEXITY_TEXT}"}
    found: dict[str, _Said] = {}
    for name in FORMATS:
        chat = load(["--kv-cache", name])
        if not found:
            yield {"model": chat.status.model, "precision": chat.status.precision, "device": chat.status.device}
        found[name] = _ask(chat)
        chat.close()
        yield {f"KV_CACHE={name}, {what}": figure for what, figure in _beside(found[name], found[FORMATS[0]]).items()}


def _ask(chat: ChatModel) -> _Said:
    ids = text_ids(chat.serving.tokenizer, PERPLEXITY_TOKENS)
    losses, likeliest = [], []
    for start in range(0, len(ids), WINDOW):
        with chat.stream_completion(ids[start : start + WINDOW], TELLING) as reply:
            "".join(reply)
            for told in reply.prompt_logprobs[1:]:
                losses.append(-(told.chosen.logprob or 0.0))
                likeliest.append(told.top[0].token)
    answers = []
    for question in QUESTIONS:
        with chat.stream_reply([{"role": "user", "content": question}], ANSWER) as reply:
            answers.append("".join(reply))
    room = chat.occupancy.kv_capacity_tokens if chat.occupancy else 0
    return _Said(math.exp(sum(losses) / len(losses)), likeliest, answers, room)


def _beside(said: _Said, exact: _Said) -> dict[str, float]:
    alike = sum(map(str.__eq__, said.likeliest, exact.likeliest))
    return {
        "room, tokens": said.room,
        "perplexity": said.perplexity,
        "perplexity / exact": said.perplexity / exact.perplexity,
        "likeliest tokens as exact": alike / len(exact.likeliest),
        f"greedy answers as exact, of {len(QUESTIONS)}": sum(map(str.__eq__, said.answers, exact.answers)),
    }
