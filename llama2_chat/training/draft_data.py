"""What a model says when nobody asks: questions that it makes up, and its answers, for a head that guesses at those."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
from torch import Tensor

from llama2_chat.errors import ChatError
from llama2_chat.types import Message, SamplingParams
from model import ChatModel

log = logging.getLogger("llama2_chat")

QUESTION = SamplingParams(max_new_tokens=200, temperature=1, top_p=0.95, top_k=0, repetition_penalty=1)
LIKELIEST_SHARE = 4  # of so many answers one is the likeliest, as programs ask for it; the others as the page does
UNDER_WAY = 768  # requests
FOLLOW_UPS = 0.25  # of the answers are to a second question


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer."""

    ids: list[int]
    prompt_tokens: int
    params: SamplingParams  # with the seed


class _Ids:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._ended = threading.Event()

    def put(self, value: Tensor) -> None:
        self.ids.append(int(value))

    def end(self) -> None:
        self._ended.set()

    def whole(self) -> list[int]:
        self._ended.wait()
        return self.ids


def make_answers(chat: ChatModel, count: int, params: SamplingParams, seed: int = 0) -> list[Answer]:
    """So many answers to questions that the model makes up itself; a part of them are second ones.

    params: what they are sampled with; each has a seed of its own. The same call gives the same answers on a CPU.
    """
    first = round(count * (1 - FOLLOW_UPS))
    answers, talks = _round(chat, [[] for _ in range(first)], params, seed)
    again, _ = _round(chat, talks[: count - first], params, seed + first)
    return answers + again


def _round(
    chat: ChatModel, talks: Sequence[list[Message]], params: SamplingParams, seed: int
) -> tuple[list[Answer], list[list[Message]]]:
    """One more question and answer of each conversation; what failed is left out."""
    tokenizer = chat.serving.tokenizer
    before = [_before_a_question(chat, talk) for talk in talks]
    questions = _generate(chat, before, [replace(QUESTION, seed=seed + n) for n in range(len(talks))])
    asked: list[list[Message]] = []
    for talk, ids in zip(talks, questions, strict=True):
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        if text:
            asked.append([*talk, {"role": "user", "content": text}])
    prompts, kept = [], []
    for talk in asked:
        try:
            prompts.append(chat.encode(talk))
        except ChatError:
            continue
        kept.append(talk)
    settings = [replace(params, seed=seed + n) for n in range(len(prompts))]
    settings[::LIKELIEST_SHARE] = [replace(each, temperature=0) for each in settings[::LIKELIEST_SHARE]]
    said = _generate(chat, prompts, settings)
    answers, longer = [], []
    for talk, prompt, ids, setting in zip(kept, prompts, said, settings, strict=True):
        if ids:
            answers.append(Answer([*prompt, *ids], len(prompt), setting))
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            longer.append([*talk, Message(role="assistant", content=text)])
    return answers, longer


def _before_a_question(chat: ChatModel, talk: list[Message]) -> list[int]:
    """What stands before the user's next words: what conversations have in common that go on with different ones."""
    one, other = (chat.encode([*talk, Message(role="user", content=words)]) for words in ("One", "What"))
    return [id for id, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _generate(chat: ChatModel, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    readers: list[_Ids] = []
    for prompt, each in zip(prompts, params, strict=True):
        if len(readers) >= UNDER_WAY:
            readers[-UNDER_WAY].whole()
        readers.append(_Ids())
        chat.serving.engine.submit(prompt, each, readers[-1])
    return [reader.whole() for reader in readers]


def save_answers(answers: Sequence[Answer], file: Path) -> None:
    """Ids, lengths and settings, small enough to be kept."""
    ids = np.concatenate([np.array(answer.ids) for answer in answers])
    np.savez_compressed(
        file,
        ids=ids.astype(np.uint16 if ids.max() < 2**16 else np.uint32),
        lengths=[len(answer.ids) for answer in answers],
        prompts=[answer.prompt_tokens for answer in answers],
        seeds=[answer.params.seed or 0 for answer in answers],
        temperatures=[answer.params.temperature for answer in answers],
    )


def read_answers(file: Path, params: SamplingParams) -> list[Answer]:
    """What save_answers() wrote. params: with which make_answers() was called."""
    with np.load(file) as saved:
        starts = np.cumsum([0, *saved["lengths"]])
        ids = saved["ids"].tolist()
        return [
            Answer(
                ids[starts[n] : starts[n + 1]], int(prompt), replace(params, seed=int(seed), temperature=float(heat))
            )
            for n, (prompt, seed, heat) in enumerate(
                zip(saved["prompts"], saved["seeds"], saved["temperatures"], strict=True)
            )
        ]
