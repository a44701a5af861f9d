"""Text to token ids so that what somebody typed never becomes a control token or a tag of the template."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from functools import cache, cached_property, partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple, cast
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from llama2_chat.errors import ModelUnavailable, PromptTooLong, Subject
from llama2_chat.text import valid_unicode
from llama2_chat.types import CallStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Turn marks that a template writes as ordinary text, without a control token: "<|user|>", "[INST]", "<<SYS>>".
MARK = re.compile(r"<<?/?\|?[^\s<>|\[\]]+\|?>>?|\[/?[^\s<>|\[\]]+\]")
# Code Llama's marks around a text to fill in. To its tokenizer they are words that anybody could type.
INFILLING_PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
DISGUISE = 0xD0000  # from a character to its twin in a plane of Unicode in which nothing is, and nothing typed


class Piece(NamedTuple):
    text: str
    typed: bool  # by somebody, rather than written by the template


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is no conversation, after BOS if the model is used to one; control tokens stay text."""
    bos = tokenizer.backend_tokenizer.encode("").ids
    return bos + codec_of(tokenizer).encode_segments([[Piece(valid_unicode(text), True)]], ())[0]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, control tokens by their names."""
    return cast(str, tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check_length(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    context_length: int,
    subject: Subject = "conversation",
) -> None:
    """Raise PromptTooLong for what cannot fit, whatever it says: encoding megabytes takes seconds and gigabytes."""
    codec = codec_of(tokenizer)
    if sum(map(codec.at_least, texts)) > context_length:
        raise PromptTooLong(context_length=context_length, subject=subject)


def codec_of(tokenizer: PreTrainedTokenizerBase) -> Codec:
    if tokenizer not in _codecs:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelUnavailable(
                "This model's tokenizer exists only in a slow form that this program cannot use safely. "
                "Choose a model whose files include a tokenizer.json."
            )
        _codecs[tokenizer] = Codec(tokenizer.backend_tokenizer, tokenizer.unk_token_id)
    return _codecs[tokenizer]


def forget_codec(tokenizer: PreTrainedTokenizerBase) -> None:
    """For a tokenizer whose added tokens have changed."""
    _codecs.pop(tokenizer, None)


_codecs: WeakKeyDictionary[PreTrainedTokenizerBase, Codec] = WeakKeyDictionary()


class Codec:
    """A tokenizer in which text can never meet an added token: they go by names that nobody can guess.

    Model, normalizer and pre-tokenizer are shared with the original, so every other id is the same. Added tokens made
    of white space alone keep their names: they control nothing, and code is written with them.
    """

    def __init__(self, original: Tokenizer, unk_id: int | None):
        self.tokenizer = Tokenizer(original.model)
        if original.normalizer is not None:
            self.tokenizer.normalizer = original.normalizer
        if original.pre_tokenizer is not None:
            self.tokenizer.pre_tokenizer = original.pre_tokenizer
        self.is_byte_level = "ByteLevel" in repr(original.decoder)
        self.unk_id = unk_id
        self.formats: dict[str | None, str | None] = {}  # what recognise() found: template -> format
        self.writes_system: dict[str, bool] = {}  # template -> whether it writes a system message
        self.reads_parts: dict[str, bool] = {}  # template -> whether contents must be lists of parts
        self.call_styles: dict[str, CallStyle | None] = {}  # template -> how it writes calls
        self.before_answers: dict[str, str] = {}  # template -> what it writes before each answer

        nonce = secrets.token_hex(16)
        # New ids are given from the number of tokens on; in a vocabulary with gaps these would be taken.
        ids = original.get_vocab(with_added_tokens=False).values()
        self.tokenizer.add_tokens([f"<{nonce}-gap-{i}>" for i in range(len(ids), max(ids, default=-1) + 1)])
        self.names: dict[str, str] = {}  # of an added token: as templates write it -> as it goes here
        self.true_ids: dict[int, int] = {}  # id here -> id in the original
        self.control_ids: set[int] = set()  # ids that text must not get, even where the model knows them as words
        for id, token in original.get_added_tokens_decoder().items():
            name = token.content
            if name.replace("▁", " ").strip():
                self.names[name] = name = f"<{nonce}-{id}>"
                if id != unk_id and original.model.token_to_id(token.content) == id:
                    self.control_ids.add(id)
            options = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
            self.tokenizer.add_tokens([AddedToken(name, normalized=token.normalized, **options)])
            self.true_ids[self._ids_of([name])[0]] = id
        marks = map(original.model.token_to_id, INFILLING_PIECES)
        self.control_ids |= {id for id in marks if id is not None}
        longest_first = sorted(self.names, key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        special = [token.content for token in original.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")  # which decoding leaves out
        # Quotes and backslashes stay as they are, for `tojson` escapes them; so does white space, which is stripped.
        disguised = {*map(ord, "".join(self.names)), *range(0x21, 0x7F)} - set(map(ord, "\"'\\"))
        shift = {char: char + DISGUISE for char in disguised if char < 0x10000 and not chr(char).isspace()}
        self.disguise, self.reveal = shift, {there: here for here, there in shift.items()}

    def count(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def at_least(self, text: str) -> int:
        """Tokens that a text has at the very least, told from its length: whoever sends megabytes need not be read."""
        return len(text) // self._most_characters

    def most_characters(self, tokens: int) -> int:
        """Characters of which so many tokens cannot hold more."""
        return min(tokens * self._most_characters, sys.maxsize)

    @cached_property
    def _most_characters(self) -> int:
        """Of text that one token may stand for: twice the longest, as some normalizers make one letter of two."""
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        most = 2 * max(map(len, [*vocabulary, *self.names]))
        kept = all(self.count(char * 8 * most) > 8 for char in (" ", "\U0001f9ff"))  # rather than dropped or fused
        return most if kept else sys.maxsize

    def encode_segments(self, segments: list[list[Piece]], tags: Iterable[str]) -> list[list[int]]:
        """Ids of each segment. Where one of the tags was typed, its letters one by one instead of the natural ids."""
        texts = ["".join(piece.text for piece in segment) for segment in segments]
        # A batch, even of one: encode() would keep the interpreter locked, and a megabyte takes half a second.
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        found = [_typed_tags(segment, text, tags) for segment, text in zip(segments, texts, strict=True)]
        return [self._ids(*each) for each in zip(texts, encodings, found, strict=True)]

    def encode_rendered(self, rendered: str, tags_of: str | None = None) -> list[int]:
        """Ids of what a template wrote around contents in disguise: its own tokens and tags, and typed text as text.

        tags_of: what holds the template's tags, if it is not `rendered`.
        """
        named = self.added.sub(lambda match: self.names[match[0]], rendered)
        text = named.translate(self.reveal)
        tags = sorted(set(MARK.findall(self.added.sub(" ", tags_of or rendered))), key=len, reverse=True)
        spans = [match.span() for match in re.finditer("|".join(map(re.escape, tags)) or "(?!)", text)]
        typed = [(start, end) for start, end in spans if named[start:end] != text[start:end]]
        return self._ids(text, self.tokenizer.encode_batch([text], add_special_tokens=False)[0], typed)

    def _ids(self, text: str, encoding: Encoding, tags: list[tuple[int, int]]) -> list[int]:
        ids = encoding.ids
        if tags or not self.control_ids.isdisjoint(ids):
            ids = self._broken_up(text, ids, encoding.offsets, tags)
        return [self.true_ids.get(id, id) for id in ids] if self.names else ids

    def _broken_up(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], tags: list[tuple[int, int]]
    ) -> list[int]:
        """The ids, but letters for every token that touches a tag or is a control token."""
        touched = _touched(offsets, tags, [id in self.control_ids for id in ids])
        as_bytes = any(self._is_spelled_anyway(tag) for tag in {text[start:end] for start, end in tags})
        letter = cache(partial(self._letter, as_bytes=as_bytes))  # a megabyte may hold the same tag 80,000 times
        broken: list[int] = []
        for is_touched, run in groupby(range(len(ids)), key=touched.__getitem__):
            tokens = list(run)
            first, last = tokens[0], tokens[-1]
            touched_text = text[offsets[first][0] : offsets[last][1]]
            broken += chain.from_iterable(map(letter, touched_text)) if is_touched else ids[first : last + 1]
        return broken

    def _letter(self, char: str, as_bytes: bool) -> list[int]:
        """The token of a character; those of its bytes, if as_bytes or where the vocabulary lacks the character."""
        if self.is_byte_level:
            return self._ids_of(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)[0][0])
        whole = self._ids_of(["▁" if char == " " else char])
        in_bytes = self._ids_of([f"<0x{byte:02X}>" for byte in char.encode()])
        unknown = [] if self.unk_id is None else [self.unk_id]
        return (in_bytes or whole or unknown) if as_bytes else (whole or in_bytes or unknown)

    def _ids_of(self, tokens: Iterable[str]) -> list[int]:
        """Of tokens by their names; none if the vocabulary lacks one of them."""
        ids = [self.tokenizer.token_to_id(token) for token in tokens]
        return [] if None in ids else [id for id in ids if id is not None]

    def _is_spelled_anyway(self, tag: str) -> bool:
        """Whether a small vocabulary gives a tag letter by letter even if nobody interferes."""
        letters = [id for char in tag for id in self._letter(char, as_bytes=False)]
        natural = self.tokenizer.encode_batch([before + tag for before in ("", " ", "\n")], add_special_tokens=False)
        return any(encoding.ids[-len(letters) :] == letters for encoding in natural)


def _touched(offsets: list[tuple[int, int]], tags: list[tuple[int, int]], touched: list[bool]) -> list[bool]:
    """`touched`, and True for each token that has a character of a tag, or shares one with such a token."""
    T, t = len(offsets), 0
    for start, end in tags:
        while t < T and offsets[t][1] <= start:
            t += 1
        while t < T and offsets[t][0] < end:
            touched[t] = True
            t += 1
    # The bytes of one character may lie in several tokens: all of them go, or half of it would come twice.
    overlaps = [t for t in range(1, T) if offsets[t][0] < offsets[t - 1][1]]
    for t in overlaps:
        touched[t] = touched[t] or touched[t - 1]
    for t in reversed(overlaps):
        touched[t - 1] = touched[t - 1] or touched[t]
    return touched


def _typed_tags(segment: list[Piece], text: str, tags: Iterable[str]) -> list[tuple[int, int]]:
    """Where in the segment's text a tag stands that was typed, be it only in part."""
    longest_first = sorted(tags, key=len, reverse=True)
    if not longest_first:
        return []
    pattern, margin = re.compile("|".join(map(re.escape, longest_first))), len(longest_first[0]) - 1
    found: list[tuple[int, int]] = []
    start = 0
    for piece in segment:
        end = start + len(piece.text)
        if piece.typed:
            matches = pattern.finditer(text, max(0, start - margin), end + margin)
            found += [m.span() for m in matches if m.start() < end and m.end() > start]
        start = end
    return sorted(set(found))
