"""Which conversations are learnt and which are not: three parts, or K folds, with near-duplicates on one side.

The same conversations and the same seed give the same parts, in whatever order the rows come, so that an evaluation
finds again what a training has left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data
from llama2_chat.training.chat_data import Conversation, Data

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from llama2_chat.training.report import Run

# Cosine of TF-IDF vectors. Two words changed of 15 leave about 0.8, other questions on one subject reach 0.5.
ALIKE = 0.7
COMMON = 1000  # words of more conversations than this tell little, and cost the square of their number
MANY = 100_000  # conversations that are compared: 103 s and 1.8 GB on one core, at 2,000 characters each


class Parts(NamedTuple):
    learnt: list[Conversation]
    held_out: list[Conversation]  # measured while training
    test: list[Conversation]  # never looked at while training
    told: list[str]  # what a person should know of them


def divide(data: Data, run: Run) -> list[Parts]:
    """The parts of a run; of one with folds, of each fold in turn."""
    if run.folds:
        return folds(data, run.folds, run.test_fraction, run.seed)
    return [split(data, run.eval_fraction, run.test_fraction, run.seed)]


def find_again(run: Run) -> list[Parts]:
    """What a run has learnt and what it has left out, one for each model that it trained.

    Raises ChatError if the data has changed since.
    """
    parts = divide(chat_data.read(run.dataset_name), run)
    if run.fold:
        parts = [parts[run.fold - 1]]
    if run.learnt_sha256 and run.learnt_sha256 != fingerprint(parts):
        raise ChatError(
            f"What {run.dataset_name} holds now is not what was learnt: what is held out of it now may have been "
            "learnt then. Put the data back as it was, or train again."
        )
    return parts


def fingerprint(parts: Iterable[Parts]) -> str:
    """SHA-256 of what is learnt in any of the parts, whatever its order."""
    return hashlib.sha256("\n".join(sorted({_key(row) for part in parts for row in part.learnt})).encode()).hexdigest()


def split(data: Data, eval_fraction: float, test_fraction: float, seed: int) -> Parts:
    """One run: the data's own parts as they are, and those that it lacks drawn by the seed."""
    own = data.held_out + data.test
    draws_test, draws_eval = test_fraction and not data.test, eval_fraction and not data.held_out
    if not (own or draws_test or draws_eval):
        return Parts(data.train, [], [], [])
    if len(data.train) < 2 and (draws_test or draws_eval):
        raise ChatError("One conversation cannot be split. Give more data, or --eval_fraction 0.")
    labels, told = _labels(data)
    groups = _groups(data, labels, seed)
    test, groups = _draw(data, groups, test_fraction) if draws_test else (data.test, groups)
    held_out, groups = _draw(data, groups, eval_fraction) if draws_eval else (data.held_out, groups)
    if not groups:
        raise ChatError(
            "Everything would be held out: conversations that are nearly the same stay together. Give more data, or "
            "smaller fractions, or --eval_fraction 0."
        )
    learnt = set(labels[list(chain(*groups))])
    if leaks := sum(label in learnt for label in labels[len(data.train) :]):
        told.append(f"{leaks:,} of those that the data itself holds out are nearly the same as one that is learnt.")
    return Parts(_rows(data, groups), held_out, test, told)


def folds(data: Data, K: int, test_fraction: float, seed: int) -> list[Parts]:
    """K runs, each of which holds out another K-th; what the data itself holds out is the test of all of them."""
    labels, told = _labels(data)
    groups, test = _groups(data, labels, seed), data.held_out + data.test
    if test_fraction and not test:
        test, groups = _draw(data, groups, test_fraction)
    if len(groups) < K:
        raise ChatError(
            f"--folds {K} needs as many conversations that are not nearly the same, and there are {len(groups)}."
        )
    held_out: list[list[int]] = [[] for _ in range(K)]
    for group in sorted(groups, key=len, reverse=True):
        min(held_out, key=len).extend(group)
    return [
        Parts(_rows(data, held_out[:i] + held_out[i + 1 :]), _rows(data, [fold]), test, told)
        for i, fold in enumerate(held_out)
    ]


# ---- What stays together ----


def _groups(data: Data, labels: np.ndarray, seed: int) -> list[list[int]]:
    """The places in data.train of those that are nearly the same, in an order drawn by the seed."""
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels[: len(data.train)]):
        groups.setdefault(label, []).append(i)
    keys = [hashlib.sha256(f"{seed} {_key(row)}".encode()).digest() for row in data.train]
    return sorted(groups.values(), key=lambda group: min(keys[i] for i in group))


def _draw(data: Data, groups: list[list[int]], fraction: float) -> tuple[list[Conversation], list[list[int]]]:
    """The first groups that make up this fraction of the data, and the others; at least one, the smallest."""
    room, drawn, left = max(1, round(fraction * len(data.train))), [], []
    for group in groups:
        fits = len(group) <= room
        (drawn if fits else left).append(group)
        room -= len(group) * fits
    if not drawn and left:
        drawn.append(left.pop(left.index(min(left, key=len))))
    return _rows(data, drawn), left


def _rows(data: Data, groups: Iterable[list[int]]) -> list[Conversation]:
    return [data.train[i] for i in sorted(chain(*groups))]


def _key(row: Conversation) -> str:
    return json.dumps(row.messages)


# ---- What is nearly the same ----


def _labels(data: Data) -> tuple[np.ndarray, list[str]]:
    """A number for each conversation of all parts, the same for those that are nearly the same, and what to tell."""
    rows = data.train + data.held_out + data.test
    labels = np.arange(len(rows))
    if len(rows) > MANY:
        return labels, [f"More than {MANY:,} conversations: they were not searched for any that are nearly the same."]
    said = [[message["content"] for message in row.messages if message["role"] != "system"] for row in rows]
    # Both give away what was learnt: the same question with another answer, and the same words but for the question.
    for texts in ([texts[0] for texts in said], ["\n".join(texts) for texts in said]):
        labels = _joined(_vectors(texts), labels)
    near = np.sum(np.bincount(labels)[labels] > 1)
    return labels, [f"{near:,} are nearly the same as another; such stay together."] if near else []


def _vectors(texts: list[str]) -> csr_matrix:
    """TF-IDF of words and pairs of words, each row of length 1 or 0."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    counts = HashingVectorizer(
        n_features=2**22, ngram_range=(1, 2), token_pattern=r"\w+", norm=None, alternate_sign=False, dtype=np.float32
    ).transform(texts)
    seen = np.bincount(counts.indices, minlength=counts.shape[1])
    counts.data[seen[counts.indices] > min(COMMON, max(2, len(texts) // 2))] = 0
    counts.eliminate_zeros()
    return TfidfTransformer().fit_transform(counts)


def _joined(vectors: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """The labels, but one for all that are linked by vectors ALIKE, be it over others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    N, transposed = len(labels), vectors.T.tocsr()
    step = max(1, 2**24 // N)  # rows at once: what they give, however alike they are, stays below 200 MB
    for start in range(0, N, step):
        cosines = (vectors[start : start + step] @ transposed).tocoo()
        alike = cosines.data >= ALIKE
        pairs = labels[start + cosines.row[alike]], labels[cosines.col[alike]]
        links = coo_matrix((np.ones(len(pairs[0]), np.float32), pairs), shape=(N, N))
        labels = connected_components(links, directed=False)[1][labels]
    return labels
