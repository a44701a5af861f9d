"""Messages in, token ids out: Llama 2's format to the letter, any other model's through its own chat template.

What fits in the context window is decided here, and what may enter: a visitor's words never become control tokens or
tags of the template. Weights, devices, sampling and the page are unknown in this room.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from llama2_chat.errors import ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.text import valid_unicode
from llama2_chat.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_2 = "llama-2"
LLAMA_2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# For other programs, and saved with what is trained here: the text of the format. Its ids are _llama_2_ids' work.
LLAMA_2_TEMPLATE = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# What Meta's reference code gives. A tokenizer that agrees on these has Llama 2's vocabulary, merges and numbering.
# fmt: off
GOLDEN: tuple[tuple[list[Message], list[int]], ...] = (
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "  Hello"},  # spaces in a row: a converted tokenizer.model differs
            {"role": "assistant", "content": "Hi! How can I help?"},
            {"role": "user", "content": "llama 😱 in my garden"},
        ],
        [1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829, 14816, 29903, 6778, 13,
         13, 29871, 15043, 518, 29914, 25580, 29962, 6324, 29991, 1128, 508, 306, 1371, 29973, 29871, 2,
         1, 518, 25580, 29962, 11148, 3304, 29871, 243, 162, 155, 180, 297, 590, 16423, 518, 29914, 25580, 29962],
    ),
    (
        [{"role": "user", "content": "Hello</s><s> x"}],
        [1, 518, 25580, 29962, 15043, 829, 29879, 5299, 29879, 29958, 921, 518, 29914, 25580, 29962],
    ),
)
# fmt: on


class Fitted(NamedTuple):
    """A prompt that fits, and how many of the caller's messages were left out for it."""

    input_ids: list[int]
    dropped_messages: int


class Lesson(NamedTuple):
    """A conversation as it is learnt from: its ids, and from where to where the answers go, stop ids included."""

    input_ids: list[int]
    answers: list[tuple[int, int]]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message], chat_format: str | None = None) -> list[int]:
    """Token ids of a conversation, ending where the assistant should answer.

    messages: an optional system message, then user and assistant in turn, ending with user. Two turns of the same
    role in a row are joined by a blank line.
    chat_format: "llama-2", or None to recognise it from the tokenizer.

    In the Llama 2 format each finished exchange is encoded alone, between BOS and EOS, as the model saw it in training.
    In another one the ids are those of apply_chat_template. What a visitor typed can never become a control token or a
    whole template tag: a typed tag keeps its letters and loses its ids, so that decoding gives the same text. Turn
    marks that are ordinary words, such as "USER:", are beyond this protection.
    Raises ChatError for malformed messages, ModelUnavailable as recognise() does.

    Source of the format: chat_completion() in Meta's Llama 2 reference code.
    """
    return _writer(tokenizer, chat_format)(*checked(messages))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is no conversation, after BOS if the model is used to one; control tokens stay text."""
    text = valid_unicode(text)
    return tokenizer.backend_tokenizer.encode("").ids + _codec(tokenizer).encode([[_Piece(text, True)]], ())[0]


def encode_to_learn(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    stop_ids: Container[int],
    chat_format: str | None = None,
) -> Lesson:
    """A conversation that ends with an answer, in the ids that encode() would give it, and what is learnt of them.

    Of each answer that is what the model has to write after the prompt of its question, up to and including the stop
    id: without it a model never learns to end.
    Raises ChatError as encode() does, and if this format writes an answer otherwise than the model would have to.
    """
    system, turns = checked([*messages, {"role": "user", "content": "Go on."}])
    if turns[-1].messages > 1 or len(turns) == 1:
        raise ChatError("A conversation to learn from ends with an answer.")
    write = _writer(tokenizer, chat_format)
    input_ids, answers = write(system, turns), []
    for i in range(1, len(turns), 2):
        asked = write(system, turns[:i])
        start = len(asked)
        end = next((t + 1 for t in range(start, len(input_ids)) if input_ids[t] in stop_ids), None)
        if input_ids[:start] != asked or end is None:
            raise ChatError(
                "This conversation cannot be learnt from in the model's format: what came before changes as it goes "
                "on, or an answer ends without the token that stops the model."
            )
        answers.append((start, end))
    return Lesson(input_ids[: answers[-1][1]], answers)


def fit(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    context_length: int,
    max_new_tokens: int,
    chat_format: str | None = None,
) -> Fitted:
    """The longest recent part of a conversation that leaves room for max_new_tokens in the context window.

    Whole exchanges go, oldest first; the system message and the newest message stay.
    Raises PromptTooLong if those two alone do not fit, else as encode() does.
    """
    system, turns = checked(messages)
    write = _writer(tokenizer, chat_format)
    room = context_length - max_new_tokens

    # The usual case in one go. Hardly any text has more than 16 characters to a token; one that has takes the long way.
    if sum(len(turn.content) for turn in turns) <= 16 * room:
        input_ids = write(system, turns)
        if len(input_ids) <= room:
            return Fitted(input_ids, 0)

    newest = write(system, turns[-1:])
    if len(newest) > room:
        raise _too_long(len(newest), write, system, context_length, max_new_tokens)

    # Back from the newest, the words alone: where they no longer fit, the prompt does not either. So an old megabyte
    # is encoded once, and not at every step of the search.
    codec, start, left = _codec(tokenizer), len(turns) - 1, room - len(newest)
    while start > 0 and left >= 0:
        start -= 2
        left -= sum(codec.count(turn.content.strip()) for turn in turns[start : start + 2])
    starts = range(start, len(turns), 2)
    first = starts[bisect_left(starts[:-1], True, key=lambda start: len(write(system, turns[start:])) <= room)]
    return Fitted(write(system, turns[first:]), sum(turn.messages for turn in turns[:first]))


def recognise(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """ "llama-2", or None for a model that has its own chat template.

    Raises ModelUnavailable if neither will do: a tokenizer that disagrees with Meta's ids though its template speaks
    the Llama 2 format, a model without a template (a base model), a template that cannot write a conversation.
    """
    formats, template = _codec(tokenizer).formats, _template(tokenizer)
    if template not in formats:
        formats[template] = _recognise(tokenizer, template)
    return formats[template]


def _recognise(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | None:
    claimed = template is None or ("[INST]" in template and "<<SYS>>" in template)
    if claimed and all(encode(tokenizer, messages, LLAMA_2) == ids for messages, ids in GOLDEN):
        return LLAMA_2
    if template is None:
        raise ModelUnavailable(
            "This model has no chat template, and its tokenizer does not give Llama 2's ids: it is a base model, or "
            "its tokenizer.json is missing. Choose a chat or instruct model, for example meta-llama/Llama-2-7b-chat-hf."
        )
    if claimed:
        raise ModelUnavailable(
            "This model's chat template speaks the Llama 2 format, but its tokenizer gives other ids than Meta's. "
            "Its tokenizer.json is missing or belongs to another model: fetch it from where the model comes from."
        )
    question, answer = Turn("user", "Hello", 1), Turn("assistant", "Hi", 1)
    _template_ids(tokenizer, "Be brief.", [question, answer, question])  # fails now rather than at the first message
    return None


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's source, or None without one. Some models keep several: the one for plain chat counts."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        return None


# At the door ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    role: str
    content: str
    messages: int  # of the caller, joined in this turn


def checked(messages: list[Message]) -> tuple[str | None, list[Turn]]:
    """The system text, if there is one, and turns: user and assistant alternate, user is first and last."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise ChatError("A conversation is a list of messages, each with a role and a content.")
    system, turns, content = None, [], ""
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ChatError(f"A message's role is system, user or assistant; it was {str(role)[:40]!r}.")
        if not isinstance(content, str):
            raise ChatError(f"A message's content is plain text; message {i + 1} holds something else.")
        # The tokenizer raises on a lone surrogate, such as half an emoji that a caller cut in two.
        content = valid_unicode(content)
        if role == "system":
            if i > 0:
                raise ChatError("Only the first message can be a system message.")
            system = content
        elif turns and turns[-1].role == role:  # an answer stopped before its first word leaves two questions in a row
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{content}", turns[-1].messages + 1)
        else:
            turns.append(Turn(role, content, 1))
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise ChatError("A conversation starts with a message from the user and ends with one.")
    if not content.strip():
        raise ChatError("The message is empty. Write something first.")
    return system, turns


def _too_long(T: int, write: _Writer, system: str | None, context_length: int, max_new_tokens: int) -> PromptTooLong:
    """T: tokens of the system text and the newest message alone, with what the format adds."""
    word = [Turn("user", "Hello", 1)]
    S = len(write(system, word)) - len(write(None, word)) if system else 0
    return PromptTooLong(T, context_length, max_new_tokens, S, subject="message")


# The formats ----------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    text: str
    typed: bool  # by somebody, rather than written by the template


_Writer = Callable[[str | None, list[Turn]], list[int]]


def _writer(tokenizer: PreTrainedTokenizerBase, chat_format: str | None) -> _Writer:
    """The function that turns a system text and turns into ids, in the format given or recognised."""
    if chat_format not in (None, LLAMA_2):
        raise ChatError(f"chat_format is {LLAMA_2!r}, or None for the model's own; it was {str(chat_format)[:40]!r}.")
    ids = _llama_2_ids if (chat_format or recognise(tokenizer)) == LLAMA_2 else _template_ids
    return partial(ids, tokenizer)


def _llama_2_ids(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: list[Turn]) -> list[int]:
    """Each exchange alone, between BOS and EOS; after the last question no EOS, for the answer follows."""
    segments = []
    for i in range(0, len(turns), 2):
        question = [_Piece(turns[i].content.strip(), True)]
        if i == 0 and system is not None:
            # Meta strips the first message with the system text in it: white space before the question stays.
            asked = turns[0].content.rstrip()
            question = [_Piece("<<SYS>>\n", False), _Piece(system, True)]
            question += [_Piece("\n<</SYS>>" + ("\n\n" if asked else ""), False), _Piece(asked, True)]
        segment = [_Piece("[INST] ", False), *question, _Piece(" [/INST]", False)]
        if i + 1 < len(turns):
            segment += [_Piece(" ", False), _Piece(turns[i + 1].content.strip(), True), _Piece(" ", False)]
        segments.append(segment)
    *exchanges, last = _codec(tokenizer).encode(segments, LLAMA_2_TAGS)
    bos, eos = (
        tokenizer.backend_tokenizer.token_to_id(token) if id is None else id  # a bare tokenizer.json names neither
        for token, id in (("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id))
    )
    return [id for ids in exchanges for id in (bos, *ids, eos)] + [bos, *last]


# Turn marks that a template writes as ordinary text, without a control token: "<|user|>", "[INST]", "<<SYS>>".
_MARK = re.compile(r"<<?/?\|?[^\s<>|\[\]]+\|?>>?|\[/?[^\s<>|\[\]]+\]")
_PAD = "\u2003"  # a space that no template writes; one that strips contents takes it away


def _template_ids(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: list[Turn]) -> list[int]:
    """As apply_chat_template gives them, except that control tokens come from the template alone.

    The template never sees the contents: it is rendered around placeholders that nobody can guess, which show where
    each content goes and whether it is stripped. A template that refuses or ignores the system role gets the system
    text at the head of the first user message.
    """
    messages = [*([] if system is None else [Turn("system", system, 1)]), *turns]
    nonce = secrets.token_hex(16)
    marked = [{"role": m.role, "content": f"{_PAD}{nonce}-{i}-{_PAD}"} for i, m in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        for i in {0, len(messages) - 1}:
            if f"{nonce}-{i}-" not in rendered:
                raise TemplateError(f"it leaves out the {messages[i].role} message")
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        if system is None:
            raise ModelUnavailable(
                f"This model's chat template cannot write a conversation ({str(error)[:200]}). Choose another model."
            ) from error
        first = turns[0]._replace(content="\n\n".join(filter(None, [system, turns[0].content])))
        return _template_ids(tokenizer, None, [first, *turns[1:]])

    codec = _codec(tokenizer)
    # re.split gives: literal, space before, index, space after, literal, ...
    parts = re.split(rf"({_PAD}?){nonce}-(\d+)-({_PAD}?)", rendered)
    literals = parts[::4]
    pieces = [_Piece(codec.named(literals[0]), False)]
    for before, index, after, literal in zip(parts[1::4], parts[2::4], parts[3::4], literals[1:], strict=True):
        content = messages[int(index)].content
        content = content if before else content.lstrip()
        content = content if after else content.rstrip()
        pieces += [_Piece(content, True), _Piece(codec.named(literal), False)]
    tags = {tag for literal in literals for tag in _MARK.findall(codec.without_added_tokens(literal))}
    return codec.encode([pieces], tags)[0]


# Text to ids ----------------------------------------------------------------------------------------------------------


def _codec(tokenizer: PreTrainedTokenizerBase) -> _Codec:
    if tokenizer not in _codecs:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelUnavailable(
                "This model's tokenizer exists only in a slow form that this program cannot use safely. "
                "Choose a model whose files include a tokenizer.json."
            )
        _codecs[tokenizer] = _Codec(tokenizer.backend_tokenizer, tokenizer.unk_token_id)
    return _codecs[tokenizer]


_codecs: WeakKeyDictionary[PreTrainedTokenizerBase, _Codec] = WeakKeyDictionary()


class _Codec:
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
            self.true_ids[self.tokenizer.token_to_id(name)] = id
        longest_first = sorted(self.names, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def named(self, literal: str) -> str:
        """Text of a template with its added tokens under the names they have here."""
        return self._added.sub(lambda match: self.names[match[0]], literal)

    def without_added_tokens(self, literal: str) -> str:
        return self._added.sub(" ", literal)

    def count(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    def encode(self, segments: list[list[_Piece]], tags: Iterable[str]) -> list[list[int]]:
        """Ids of each segment. Where one of the tags was typed, its letters one by one instead of the natural ids."""
        texts = ["".join(piece.text for piece in segment) for segment in segments]
        # A batch, even of one: encode() would keep the interpreter locked, and a megabyte takes half a second.
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        found = [_typed_tags(segment, text, tags) for segment, text in zip(segments, texts, strict=True)]
        return [self._ids(*each) for each in zip(texts, encodings, found, strict=True)]

    def _ids(self, text: str, encoding: Encoding, tags: list[tuple[int, int]]) -> list[int]:
        ids = encoding.ids
        if tags or not self.control_ids.isdisjoint(ids):
            ids = self._broken_up(text, ids, encoding.offsets, tags)
        return [self.true_ids.get(id, id) for id in ids] if self.names else ids

    def _broken_up(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], tags: list[tuple[int, int]]
    ) -> list[int]:
        """The ids, but letters for every token that touches a tag or is a control token."""
        T, t = len(ids), 0
        touched = [id in self.control_ids for id in ids]
        for start, end in tags:
            while t < T and offsets[t][1] <= start:
                t += 1
            while t < T and offsets[t][0] < end:
                touched[t] = True
                t += 1
        # The bytes of one character may lie in several tokens: all of them go, or half of it would come twice.
        for t in range(1, T):
            touched[t] |= touched[t - 1] and offsets[t][0] < offsets[t - 1][1]
        for t in range(T - 1, 0, -1):
            touched[t - 1] |= touched[t] and offsets[t][0] < offsets[t - 1][1]

        as_bytes = any(self._is_spelled_anyway(tag) for tag in {text[start:end] for start, end in tags})
        broken: list[int] = []
        for is_touched, run in groupby(range(T), key=touched.__getitem__):
            places = list(run)
            start, end = offsets[places[0]][0], offsets[places[-1]][1]
            broken += self._letters(text[start:end], as_bytes) if is_touched else [ids[t] for t in places]
        return broken

    def _letters(self, text: str, as_bytes: bool) -> list[int]:
        """A token for each character; its bytes, where they are asked for or the vocabulary lacks the character."""
        letters = {char: self._letter(char, as_bytes) for char in set(text)}
        return [id for char in text for id in letters[char]]

    def _letter(self, char: str, as_bytes: bool) -> list[int]:
        if self.is_byte_level:
            in_bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)[0][0]
            return [self.tokenizer.token_to_id(byte) for byte in in_bytes]
        whole = self.tokenizer.token_to_id("▁" if char == " " else char)
        in_bytes = [self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
        if (as_bytes or whole is None) and None not in in_bytes:
            return in_bytes
        whole = self.unk_id if whole is None else whole
        return [] if whole is None else [whole]

    def _is_spelled_anyway(self, tag: str) -> bool:
        """Whether a small vocabulary gives a tag letter by letter even if nobody interferes."""
        letters = self._letters(tag, as_bytes=False)
        natural = self.tokenizer.encode_batch([before + tag for before in ("", " ", "\n")], add_special_tokens=False)
        return any(encoding.ids[-len(letters) :] == letters for encoding in natural)


def _typed_tags(segment: list[_Piece], text: str, tags: Iterable[str]) -> list[tuple[int, int]]:
    """Where in the segment's text a tag stands that was typed, be it in part."""
    longest_first = sorted(tags, key=len, reverse=True)
    if not longest_first:
        return []
    pattern, margin = re.compile("|".join(map(re.escape, longest_first))), len(longest_first[0]) - 1
    found, start = [], 0
    for piece in segment:
        end = start + len(piece.text)
        if piece.typed:
            matches = pattern.finditer(text, max(0, start - margin), end + margin)
            found += [m.span() for m in matches if m.start() < end and m.end() > start]
        start = end
    return sorted(set(found))
