"""Which conversations are trained on and which are not: three splits, or K folds, with near-duplicates on one side.

The same conversations and the same seed give the same splits, in whatever order the rows come, so that an evaluation
finds again what a training has left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data, near_duplicates
from llama2_chat.training.chat_data import Conversation, Data
from llama2_chat.training.row_sources import Reading

if TYPE_CHECKING:
    from llama2_chat.training.run_json import Run


class Splits(NamedTuple):
    train: list[Conversation]
    eval: list[Conversation]  # measured while training
    test: list[Conversation]  # never looked at while training
    notes: list[str]


def of_run(data: Data, run: Run) -> list[Splits]:
    """The splits of a run; of one with folds, those of each fold in turn."""
    if run.folds:
        return make_folds(data, run.folds, run.test_fraction, run.seed)
    return [split(data, run.eval_fraction, run.test_fraction, run.seed)]


def find_again(run: Run) -> list[Splits]:
    """What a run has trained on and what it has left out, one for each model that it trained.

    Raises ChatError if the data has changed since.
    """
    every = of_run(chat_data.read(run.dataset_names, Reading(**run.reading)), run)
    if run.fold:
        every = [every[run.fold - 1]]
    if run.train_sha256 and run.train_sha256 != fingerprint(every):
        raise ChatError(
            f"{' and '.join(run.dataset_names)} has changed since the training: the eval split may now have "
            "conversations that the model was trained on. Put the data back as it was, or train again."
        )
    return every


def fingerprint(every: Iterable[Splits], split: Literal["train", "eval"] = "train") -> str:
    """SHA-256 of what is in this split of any of them, whatever its order."""
    keys = {row.key for splits in every for row in getattr(splits, split)}
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def order(every: Iterable[Splits]) -> str:
    """SHA-256 of the order in which the train splits have their conversations, from which a seed shuffles them."""
    keys = (row.key for splits in every for row in splits.train)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def split(data: Data, eval_fraction: float, test_fraction: float, seed: int) -> Splits:
    """The data's own splits as they are, and those that it lacks drawn by the seed."""
    draws_test = test_fraction > 0 and not data.test
    draws_eval = eval_fraction > 0 and not data.eval
    if not (data.eval or data.test or draws_test or draws_eval):
        return Splits(data.train, [], [], [])
    if len(data.train) < 2 and (draws_test or draws_eval):
        raise ChatError("One conversation cannot be split. Give more data, or --eval_fraction 0.")
    labels, notes = near_duplicates.label(data.train + data.eval + data.test)
    groups = _groups(data, labels, seed)
    test, groups = _draw(data, groups, test_fraction) if draws_test else (data.test, groups)
    evals, groups = _draw(data, groups, eval_fraction) if draws_eval else (data.eval, groups)
    if not groups:
        raise ChatError(
            "Nothing would be left to train on: near-duplicates stay in one split. Give more data, or smaller "
            "fractions, or --eval_fraction 0."
        )
    train_labels = set(labels[list(chain(*groups))])
    if leaks := [label for label in labels[len(data.train) :] if label in train_labels]:
        notes.append(f"{len(leaks):,} of the data's own eval and test split are near-duplicates of one in train.")
    return Splits(_rows(data, groups), evals, test, notes)


def make_folds(data: Data, K: int, test_fraction: float, seed: int) -> list[Splits]:
    """K runs, each of which leaves out another K-th; the data's own eval and test split are the test of all of them."""
    labels, notes = near_duplicates.label(data.train + data.eval + data.test)
    groups, test = _groups(data, labels, seed), data.eval + data.test
    if test_fraction and not test:
        test, groups = _draw(data, groups, test_fraction)
    if len(groups) < K:
        raise ChatError(
            f"--folds {K} needs as many conversations that are not near-duplicates, and there are {len(groups)}."
        )
    folds: list[list[int]] = [[] for _ in range(K)]
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return [
        Splits(_rows(data, folds[:i] + folds[i + 1 :]), _rows(data, [fold]), test, notes)
        for i, fold in enumerate(folds)
    ]


def _groups(data: Data, labels: np.ndarray, seed: int) -> list[list[int]]:
    """The places in data.train of those that are nearly the same, in an order drawn by the seed."""
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels[: len(data.train)]):
        groups.setdefault(label, []).append(i)
    keys = [hashlib.sha256(f"{seed} {row.key}".encode()).digest() for row in data.train]
    return sorted(groups.values(), key=lambda group: min(keys[i] for i in group))


def _draw(data: Data, groups: list[list[int]], fraction: float) -> tuple[list[Conversation], list[list[int]]]:
    """The first groups that make up this fraction of the data, and the others; at least one, the smallest."""
    room = max(1, round(fraction * len(data.train)))
    drawn: list[list[int]] = []
    left: list[list[int]] = []
    for group in groups:
        if len(group) <= room:
            drawn.append(group)
            room -= len(group)
        else:
            left.append(group)
    if not drawn and left:
        drawn.append(left.pop(left.index(min(left, key=len))))
    return _rows(data, drawn), left


def _rows(data: Data, groups: Iterable[list[int]]) -> list[Conversation]:
    return [data.train[i] for i in sorted(chain(*groups))]
