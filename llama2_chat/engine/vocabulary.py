"""What the tokens of one model are in bytes, and masks of some kinds of them. Computed once, in a tenth of a second."""

from __future__ import annotations

import functools
import re

import numpy as np
import torch
from llguidance import LLTokenizer
from torch import Tensor

LINE_END = ord("\n")
IN_NUMBER = re.compile(rb"\.?[0-9]*\.?[0-9]*")


class Vocabulary:
    def __init__(self, tokenizer: LLTokenizer) -> None:
        self.texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self.of_byte = {text[0]: token for token, text in enumerate(self.texts) if len(text) == 1}
        self.end: int = tokenizer.eos_token
        heads = [match[0] if (match := IN_NUMBER.match(text)) else b"" for text in self.texts]
        self._points = np.array([head[:1] == b"." for head in heads])
        self._digits = np.array([len(head) - head.count(b".") for head in heads])
        self._longest = int(self._digits.max())

    def only(self, token: int) -> Tensor:
        """A mask that allows one token."""
        return mask_of(np.arange(len(self.texts)) == token)

    def allows_line_end(self, mask: Tensor) -> bool:
        token = self.of_byte.get(LINE_END)
        return token is not None and bool(mask[token // 32] >> token % 32 & 1)

    def longer_numbers(self, digits_left: int) -> Tensor | None:
        """Tokens that would give a number more digits than are left, as a mask. None if there are none such."""
        return self._longer_numbers(digits_left) if digits_left < max(self._longest, 1) else None

    @functools.cache  # noqa: B019  # as long as the model
    def _longer_numbers(self, digits_left: int) -> Tensor:
        return mask_of((self._digits > digits_left) | (self._points if digits_left == 0 else False))


def mask_of(chosen: np.ndarray) -> Tensor:
    """bool [vocabulary] as int32 [words]: a bit for each id, the lowest first."""
    padded = np.zeros(-(-len(chosen) // 32) * 32, dtype=bool)
    padded[: len(chosen)] = chosen
    return torch.from_numpy(np.packbits(padded, bitorder="little").view(np.int32).copy())
