"""What a token is called, and its bytes, wherever it stands: with a word's space, or part of a letter alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BYTE_OF_LETTER: dict[str, int] = {letter: byte for byte, letter in bytes_to_unicode().items()}


class TokenNames:
    """Those of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_vocab().values()
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        self._has_byte_letters, self._has_byte_tokens = "ByteLevel" in decoder, "ByteFallback" in decoder

    def bytes_of(self, id: int) -> bytes:
        """Of a control token, those of its name; none for an id that only the model has."""
        entry = cast("str | None", self._tokenizer.convert_ids_to_tokens(id)) or ""
        if id in self._added:
            return entry.encode()
        if self._has_byte_letters and all(letter in BYTE_OF_LETTER for letter in entry):
            return bytes(BYTE_OF_LETTER[letter] for letter in entry)
        if self._has_byte_tokens and (byte := BYTE.fullmatch(entry)):
            return bytes.fromhex(byte[1])
        return entry.replace("▁", " ").encode()

    @staticmethod
    def name(data: bytes) -> str:
        """The text of these bytes; where they are no whole characters, their numbers as OpenAI writes them."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
