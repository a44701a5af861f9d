"""What a model says when nobody asks: questions that it makes up, and its answers, for a head that guesses at those."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama2_chat import prompt
from llama2_chat.engine.sampler import NARROW
from llama2_chat.errors import ChatError
from llama2_chat.training.base_model import BaseModel
from llama2_chat.training.draft_engine import EngineDesk
from llama2_chat.training.draft_writer import Asked, Desk
from llama2_chat.types import Message, SamplingParams

QUESTION = SamplingParams(max_new_tokens=96, temperature=1, top_p=0.95, top_k=NARROW, repetition_penalty=1)
LIKELIEST_SHARE = 4  # of so many answers one is the likeliest, as programs ask for it; the others as the page does
# Left to itself a model makes up long tasks, and few of the short questions that people ask.
BEGINNINGS = (
    *("What is", "What are", "What was", "Which", "Who", "When", "Where", "Why", "Is", "Are", "Can", "Should I"),
    *("How do I", "How can I", "How does", "How many", "Tell me", "Explain", "Describe", "Compare", "List", "Give me"),
    *("Write a", "Write a short", "Write me", "Help me", "Can you", "Make", "Suggest", "I want to", "I have", "My"),
)
FOLLOW_UPS = 0.25  # of the answers are to a second question


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer."""

    ids: list[int]
    prompt_tokens: int
    params: SamplingParams  # with the seed


class Writer(NamedTuple):
    """Which model answers were written by."""

    name: str
    fingerprint: str  # Files.fingerprint() of it, and of an adapter

    @classmethod
    def of(cls, base: BaseModel) -> Writer:
        files = filter(None, (base.checkpoint.base, base.checkpoint.adapter))
        return cls(base.checkpoint.model_id, " ".join(each.fingerprint() for each in files))


def make_answers(
    tokenizer: PreTrainedTokenizerBase, desk: Desk | EngineDesk, count: int, params: SamplingParams, seed: int = 0
) -> Iterator[Answer]:
    """So many answers, as they end, to questions that the model makes up itself; a part of them are second ones.

    desk: where the model writes them. params: what they are sampled with; each has a seed of its own. The same call
    gives the same answers on a CPU. Some fail, and are left out.
    """
    first = round(count * (1 - FOLLOW_UPS))
    talks: dict[int, _Talk] = {}

    def questions() -> Iterator[Asked]:
        for number in range(first):
            talks[number] = _Talk(tokenizer, number, seed + number)
            yield talks[number].question()

    for number, said in desk.answers(asked for asked in questions() if len(asked.prompt) < desk.columns):
        talk, asked = talks[number], None
        if talk.asks:
            asked = talk.answer(said, params)
        elif said:
            yield Answer([*talk.prompt, *said], len(talk.prompt), talk.params)
            again = (number + 1) * (count - first) // first > number * (count - first) // first
            if again and len(talk.messages) == 1:
                talk.go_on(said, seed + first + number)
                asked = talk.question()
        if asked and len(asked.prompt) < desk.columns:
            desk.ask(asked)
        else:
            del talks[number]


@dataclass
class _Talk:
    """A conversation that a model has with itself."""

    tokenizer: PreTrainedTokenizerBase
    number: int
    seed: int
    messages: list[Message] = field(default_factory=list)
    asks: bool = True  # or else answers
    begun: list[int] = field(default_factory=list)  # with what a question begins
    prompt: list[int] = field(default_factory=list)  # of an answer
    params: SamplingParams = QUESTION  # the same

    def question(self) -> Asked:
        """What a user's next words follow."""
        self.asks, random = True, Random(self.seed)
        text = random.choice(BEGINNINGS) if random.random() < 0.5 else ""
        self.begun = self.tokenizer.encode(text, add_special_tokens=False)
        before = _before_a_question(self.tokenizer, self.messages) + self.begun
        return Asked(self.number, before, replace(QUESTION, seed=self.seed))

    def answer(self, said: list[int], params: SamplingParams) -> Asked | None:
        """What an answer to this question follows; None if it is none."""
        text = _text(self.tokenizer, [*self.begun, *said]).strip()
        self.messages.append(Message(role="user", content=text))
        try:
            self.prompt = prompt.encode(self.tokenizer, self.messages)
        except ChatError:
            return None
        self.asks = False
        heat = params.temperature if self.seed % LIKELIEST_SHARE else 0
        self.params = replace(params, seed=self.seed, temperature=heat)
        return Asked(self.number, self.prompt, self.params) if text else None

    def go_on(self, said: list[int], seed: int) -> None:
        self.messages.append(Message(role="assistant", content=_text(self.tokenizer, said)))
        self.seed = seed


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _before_a_question(tokenizer: PreTrainedTokenizerBase, talk: list[Message]) -> list[int]:
    """What stands before the user's next words."""
    if not talk:
        return [*_opening(tokenizer)]
    behind = len(_with(tokenizer, [], "One")) - len(_opening(tokenizer))
    return _with(tokenizer, talk, "One")[:-behind]


@cache
def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What conversations have in common that begin with different words."""
    one, other = (_with(tokenizer, [], words) for words in ("One", "What"))
    return tuple(id for id, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _with(tokenizer: PreTrainedTokenizerBase, talk: list[Message], words: str) -> list[int]:
    return prompt.encode(tokenizer, [*talk, Message(role="user", content=words)])


def save_answers(answers: Sequence[Answer], writer: Writer, file: Path) -> None:
    """Ids, lengths, settings and whose they are, small enough to be kept. Cut off, it leaves the file as it was."""
    ids = np.concatenate([np.array(answer.ids) for answer in answers])
    aside = file.with_suffix(".tmp.npz")
    np.savez_compressed(
        aside,
        ids=ids.astype(np.uint16 if ids.max() < 2**16 else np.uint32),
        lengths=[len(answer.ids) for answer in answers],
        prompts=[answer.prompt_tokens for answer in answers],
        seeds=[answer.params.seed or 0 for answer in answers],
        temperatures=[answer.params.temperature for answer in answers],
        writer=[*writer],
    )
    aside.replace(file)


def read_answers(file: Path, params: SamplingParams, writer: Writer) -> list[Answer]:
    """What save_answers() wrote. params: with which make_answers() was called.

    Raises ChatError for a file that is damaged, and for answers of another model than this writer.
    """
    try:
        with file.open("rb") as opened, np.load(opened) as saved:
            wrote = Writer(*saved["writer"].tolist())
            starts = np.cumsum([0, *saved["lengths"]])
            ids = saved["ids"].tolist()
            settings = zip(saved["prompts"], saved["seeds"], saved["temperatures"], strict=True)
            answers = [
                Answer(
                    ids[starts[n] : starts[n + 1]],
                    int(prompt),
                    replace(params, seed=int(seed), temperature=float(heat)),
                )
                for n, (prompt, seed, heat) in enumerate(settings)
            ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        raise ChatError(f"{file} is damaged, or holds no answers of an earlier run. Delete it.") from error
    if wrote.fingerprint != writer.fingerprint:
        raise ChatError(
            f"{file} holds answers of another model: {wrote.name} ({wrote.fingerprint[:12]}), and not {writer.name} "
            f"({writer.fingerprint[:12]}). Choose another --output_dir, or other --answers_files."
        )
    return answers
