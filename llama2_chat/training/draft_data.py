"""What a model says when nobody asks: questions that it makes up, and its answers, for a head that guesses at those."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from transformers import PreTrainedModel

from llama2_chat import prompt
from llama2_chat.engine.sampler import NARROW
from llama2_chat.errors import ChatError
from llama2_chat.training.base_model import BaseModel
from llama2_chat.training.draft_writer import write
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


class Writing(NamedTuple):
    """Who answers, and how many at once."""

    base: BaseModel
    model: PreTrainedModel
    at_once: int


def make_answers(writing: Writing, count: int, params: SamplingParams, seed: int = 0) -> list[Answer]:
    """So many answers to questions that the model makes up itself; a part of them are second ones.

    params: what they are sampled with; each has a seed of its own. The same call gives the same answers on a CPU.
    """
    first = round(count * (1 - FOLLOW_UPS))
    answers, talks = _round(writing, [[] for _ in range(first)], params, seed)
    again, _ = _round(writing, talks[: count - first], params, seed + first)
    return answers + again


def _round(
    writing: Writing, talks: Sequence[list[Message]], params: SamplingParams, seed: int
) -> tuple[list[Answer], list[list[Message]]]:
    """One more question and answer of each conversation; what failed is left out."""
    tokenizer = writing.base.tokenizer
    begun = [_beginning(writing, seed + n) for n in range(len(talks))]
    before = [_before_a_question(writing, talk) + ids for talk, ids in zip(talks, begun, strict=True)]
    rest = _write(writing, before, [replace(QUESTION, seed=seed + n) for n in range(len(talks))])
    questions = [[*ids, *more] for ids, more in zip(begun, rest, strict=True)]
    prompts, asked = [], []
    for talk, ids in zip(talks, questions, strict=True):
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        if not text:
            continue
        asking = [*talk, Message(role="user", content=text)]
        try:
            prompts.append(prompt.encode(tokenizer, asking))
        except ChatError:
            continue
        asked.append(asking)
    settings = [replace(params, seed=seed + n) for n in range(len(prompts))]
    settings[::LIKELIEST_SHARE] = [replace(each, temperature=0) for each in settings[::LIKELIEST_SHARE]]
    answers, longer = [], []
    for talk, ids, said, setting in zip(asked, prompts, _write(writing, prompts, settings), settings, strict=True):
        if said:
            answers.append(Answer([*ids, *said], len(ids), setting))
            text = str(tokenizer.decode(said, skip_special_tokens=True))
            longer.append([*talk, Message(role="assistant", content=text)])
    return answers, longer


def _beginning(writing: Writing, seed: int) -> list[int]:
    """The first words of a question; of every second one none."""
    random = Random(seed)
    text = random.choice(BEGINNINGS) if random.random() < 0.5 else ""
    ids: list[int] = writing.base.tokenizer.encode(text, add_special_tokens=False)
    return ids


def _before_a_question(writing: Writing, talk: list[Message]) -> list[int]:
    """What stands before the user's next words: what conversations have in common that go on with different ones."""
    one, other = (
        prompt.encode(writing.base.tokenizer, [*talk, Message(role="user", content=words)]) for words in ("One", "What")
    )
    return [id for id, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _write(writing: Writing, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """Prompts of about the same length go side by side."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), writing.at_once):
        some = order[start : start + writing.at_once]
        said = write(writing.model, [prompts[n] for n in some], [params[n] for n in some], writing.base.stop_ids)
        for n, ids in zip(some, said, strict=True):
            answers[n] = ids
    return answers


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
