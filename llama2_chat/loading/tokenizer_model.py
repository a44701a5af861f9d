"""SentencePiece's tokenizer.model, as Meta ships it, as the tokenizer that Meta's reference makes of it.

transformers' own conversion joins the first word to what stands before it, which changes ids where spaces follow each
other; it also needs two packages for a file of three fields. The merges are transformers' work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from llama2_chat.prompt import INFILLING_PIECES

# Of ModelProto and its SentencePiece, in sentencepiece_model.proto.
PIECES, PIECE, SCORE, TYPE = 1, 1, 2, 3
UNKNOWN, CONTROL = 2, 3  # types of a piece that no text becomes


class Piece(NamedTuple):
    text: str
    score: float  # the higher, the sooner it is merged
    type: int


def convert_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, without a chat template. Raises ValueError for a file of another kind."""
    pieces = read_pieces(path.read_bytes())
    vocabulary = {piece.text: id for id, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece.text: piece.score for piece in pieces})
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.text for piece in pieces if piece.type in (UNKNOWN, CONTROL) or piece.text in INFILLING_PIECES]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def read_pieces(data: bytes) -> list[Piece]:
    """The vocabulary in the order of its ids. Raises ValueError for a file of another kind, or one that is cut off."""
    try:
        pieces = [_piece(value) for number, value in _fields(data) if number == PIECES and isinstance(value, bytes)]
    except (AttributeError, LookupError, TypeError, struct.error) as error:
        raise ValueError("This is no SentencePiece model, or a part of one.") from error
    if not {"<unk>", "<s>", "</s>"} <= {piece.text for piece in pieces}:
        raise ValueError("This SentencePiece model has not the control tokens of a Llama.")
    return pieces


def _piece(data: bytes) -> Piece:
    fields: dict[int, Any] = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(SCORE, bytes(4)))
    return Piece(fields[PIECE].decode(), score, fields.get(TYPE, 1))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message in protobuf's wire format."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}[wire_type]
        if at + length > len(data):
            raise IndexError
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits to a byte, the lowest first, and where the next begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
