"""A tokenizer as llguidance needs it: the bytes of each token, and which tokens are no text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def llguidance_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: set[int]) -> LLTokenizer:
    """Raises ValueError for a tokenizer that llguidance cannot read."""
    fast = cast("PreTrainedTokenizerFast", tokenizer)  # every tokenizer is fast in transformers 5
    made = from_tokenizer(fast, vocab_size, sorted(stop_ids) or None)
    # Whatever is written in angle brackets counts as no text there. But "<tool_call>" is what a model writes, and what
    # its own tokenizer makes of a text that a grammar demands: the answer would end with an error.
    added = tokenizer.added_tokens_decoder.items()
    text = {id for id, token in added if not token.special and id < vocab_size and made.is_special_token(id)}
    if text - stop_ids:
        wrapped: Any = _Tokens(fast, made, text - stop_ids)
        return LLTokenizer(wrapped, vocab_size, made.eos_tokens)
    return made


class _Tokens:
    """What LLTokenizer takes in place of a Hugging Face tokenizer: the same but for the ids that are text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, made: LLTokenizer, text: set[int]) -> None:
        ids = range(made.vocab_size)
        self.tokens = [made.decode_bytes([id]) for id in ids]
        self.special_token_ids = [id for id in ids if made.is_special_token(id) and id not in text]
        self.eos_token_id, self.bos_token_id = made.eos_token, tokenizer.bos_token_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False))
