"""Which conversations are nearly the same, by the cosine of their TF-IDF vectors: they must not be in two splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama2_chat.training.chat_data import Conversation

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Cosine of TF-IDF vectors. Two words changed of 15 leave about 0.8, other questions on one subject reach 0.5.
MIN_COSINE = 0.7
COMMON = 1000  # words of more conversations than this tell little, and cost the square of their number
MANY = 100_000  # conversations that are compared: 103 s and 1.8 GB on one core, at 2,000 characters each


def label(rows: list[Conversation]) -> tuple[np.ndarray, list[str]]:
    """A number for each conversation, the same for those that are nearly the same, and notes on them."""
    labels = np.arange(len(rows))
    if len(rows) > MANY:
        return labels, [f"There are more than {MANY:,} conversations, so near-duplicates were not searched for."]
    contents = [[message["content"] for message in row.messages if message["role"] != "system"] for row in rows]
    # Both give away a conversation: the same question with another answer, and the same words but for the question.
    for texts in ([texts[0] for texts in contents], ["\n".join(texts) for texts in contents]):
        labels = _join(_vectors(texts), labels)
    near = np.count_nonzero(np.bincount(labels)[labels] > 1)
    return labels, [f"{near:,} are near-duplicates of another; these stay in one split."] if near else []


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


def _join(vectors: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """The labels, but one for all that are linked by a cosine of MIN_COSINE or more, directly or through others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    N, transposed = len(labels), vectors.T.tocsr()
    step = max(1, 2**24 // N)  # rows at once: their cosines, however many are not 0, take less than 200 MB
    for start in range(0, N, step):
        cosines = (vectors[start : start + step] @ transposed).tocoo()
        alike = cosines.data >= MIN_COSINE
        pairs = labels[start + cosines.row[alike]], labels[cosines.col[alike]]
        links = coo_matrix((np.ones(len(pairs[0]), np.float32), pairs), shape=(N, N))
        labels = connected_components(links, directed=False)[1][labels]
    return labels
