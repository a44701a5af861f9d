"""The questions of the judging sheet, and what the two models on it answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llama2_chat.evaluation.judging import SAFETY_QUESTIONS
from llama2_chat.evaluation.subjects import Subject, display_names
from llama2_chat.training import answers as training_answers
from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.examples import question_ids, said
from llama2_chat.training.run_json import Run
from llama2_chat.training.splits import Splits

SHEET_QUESTIONS = 20  # beside those of safety
ANSWER_TOKENS = 128  # at most
SPEAKERS = {"system": "Instruction", "user": "Person", "assistant": "Model", "tool": "Tool"}


class SheetPlan(NamedTuple):
    """Whose answers to which questions people are to judge; no questions if there are not two models."""

    rows: list[Conversation]  # each ends with the expected answer
    pair: list[str]  # the two subjects' names

    @property
    def questions(self) -> list[tuple[str, str]]:
        """What the sheet shows: each question, and what is expected."""
        return [(_dialog(row), said(row.messages[-1])) for row in self.rows]


def plan_sheet(models: Sequence[str], subjects: list[Subject], splits: Splits, run: Run, number: int) -> SheetPlan:
    """number: how many questions of the data are asked, beside those of safety."""
    pair = _choose_pair(models, subjects)
    if len(pair) < 2 or not number:
        return SheetPlan([], [])
    rows = splits.test or splits.eval  # the test split has not been looked at during training
    if len(rows) > number:
        rows = random.Random(run.seed).sample(rows, len(rows))
    tokenizer = next(subject.tokenizer for subject in subjects if subject.name == pair[1])
    asked = (row for row in rows if row.is_wanted and not row.is_text)
    fitting = (row for row in asked if len(question_ids(row, tokenizer)) < run.max_length)
    return SheetPlan([*islice(fitting, number), *_safety_rows()], pair)


def _choose_pair(models: Sequence[str], subjects: list[Subject]) -> list[str]:
    """Base and finetuned model of the only model given, or one subject for each of the first two."""
    finetuned = next((subject for subject in subjects if subject.base), None)
    if finetuned and finetuned.base and len(models) == 1:
        return [finetuned.base, finetuned.name]
    pair = []
    for name in list(display_names(models).values())[:2]:
        candidates = [s.name for s in subjects if s.name == name or (s.name.startswith(f"{name}: ") and s.base)]
        pair += candidates[:1]
    return pair


def _safety_rows() -> list[Conversation]:
    return [
        Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": expected}], "")
        for question, expected in SAFETY_QUESTIONS
    ]


def _dialog(row: Conversation) -> str:
    """All that comes before the answer; a single question as it stands."""
    *before, question = row.messages[:-1]
    if not before:
        return question["content"]
    return "\n\n".join(f"{SPEAKERS[message['role']]}: {said(message)}" for message in row.messages[:-1])


def answer(subject: Subject, model: PreTrainedModel, rows: list[Conversation], batch_size: int) -> list[str]:
    """The subject's answers to the questions of the sheet."""
    answers = []
    with tqdm(total=len(rows), desc=f"{subject.name} answers", unit=" questions", dynamic_ncols=True) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers += training_answers.answer(model, subject.tokenizer, batch, subject.stop_ids, ANSWER_TOKENS)
            bar.update(len(batch))
    return answers
