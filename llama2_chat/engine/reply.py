"""One answer on its way, as types.Reply promises: the engine's thread puts ids in, one reader takes text out.

Whoever reads does the decoding, so that the engine's thread only hands ids over.
"""

from __future__ import annotations

import codecs
import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from tokenizers.decoders import DecodeStream
from transformers import TextIteratorStreamer

from llama2_chat.channel import Channel, ChannelReply, Stopwatch
from llama2_chat.engine.token_names import TokenNames
from llama2_chat.types import Candidate, FinishReason, Timing, TokenLogprob, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama2_chat.engine.engine import Engine
    from llama2_chat.engine.request import Request


CONTEXT_IDS = 16  # of the text before an answer: a character's bytes, and a word, take no more
FIRST_STAND_IN, STAND_INS = 0xDC00, 0x400


class StreamedReply(ChannelReply["torch.Tensor | None"], TextIteratorStreamer):
    """transformers' TextIteratorStreamer, read by ids.

    As it comes, it decodes in the model's thread and shows text up to the last space. Here put() only queues the id and
    the reader decodes, so that every character shows as soon as it is whole.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        stop: Sequence[str],
        usage: Usage,
        before: Sequence[int] = (),
    ) -> None:
        """before: ids of a text that the answer goes on with, so that its first word keeps the space before it."""
        TextIteratorStreamer.__init__(self, tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.text_queue: Channel[torch.Tensor | None] = Channel()  # type: ignore[assignment]  # has put() and get(), too
        self.request: Request  # set by whoever submits, before anyone reads
        self._engine = engine
        self._stand_ins = _stand_ins(tokenizer, stop)
        self._stop = list(dict.fromkeys([*stop, *map(self._with_stand_ins, stop)]))
        self._hidden = dict.fromkeys(map(ord, self._stand_ins.values()))
        self._usage = usage
        self._before = list(before[-CONTEXT_IDS:])
        self._decoder, self._before_characters = self._begin()
        self._text = ""  # decoded so far, special tokens that a stop string names included, as their stand-ins
        self._decoded = 0  # characters of it that are not stand-ins
        self._shown = 0  # characters of it handed out; the rest may be the beginning of a stop string
        self._uncut = 0  # characters of it that no stop string may cut: those of the first min_tokens
        self.logprobs: list[TokenLogprob] = []
        self._ends: list[int] = []  # of each token, in self._text
        self._offsets: list[int] = []  # of each token, in what readers see
        self._stopwatch = Stopwatch()
        self._put_tokens = 0
        self.last_start = -1  # as Grammar has it

    # What the engine's thread calls.

    def put(self, value: torch.Tensor) -> None:
        self._stopwatch.lap()
        self._put_tokens += 1
        self.text_queue.put(value)

    def end(self) -> None:
        self.text_queue.put(self.stop_signal)

    # What readers see.

    @property
    def channel(self) -> Channel[torch.Tensor | None]:
        return self.text_queue

    @property
    def queue_position(self) -> int:
        return self._engine.position(self.request)

    @property
    def usage(self) -> Usage:
        return replace(self._usage, completion_tokens=len(self.token_cache), cached_tokens=self.request.cached_tokens)

    @property
    def json_ends(self) -> bool:
        return len(self.token_cache) <= self.last_start

    @property
    def timing(self) -> Timing:
        return self._stopwatch.timing(self._put_tokens)

    def close(self) -> None:
        self._finish("cancelled")
        self._engine.cancel(self.request)
        self.text_queue.put(self.stop_signal)  # wakes a reader

    # From ids to text, in the reader's thread.

    def _read(self, value: torch.Tensor | None) -> str:
        """The text that one more id, or the end, makes certain."""
        if self.finish_reason is not None:
            return ""
        if value is self.stop_signal:
            # Bytes of a character that never became whole are still in the decoder; they show as U+FFFD.
            self._append(self._decode_rest())
            piece = self._certain(held_back=0)
            if self.finish_reason is None:
                self._show_logprobs(len(self._ends))
            self._finish(cast(FinishReason, self.request.finish_reason))
            return piece
        for token in value.tolist():
            self.token_cache.append(token)
            self._offsets.append(self._decoded)
            if token in self._stand_ins:
                self._text += self._stand_ins[token]
            else:
                self._append(self._decode(token))
            self._ends.append(len(self._text))
        if len(self.token_cache) <= self.request.params.min_tokens:
            self._uncut = len(self._text)
        unsure = self._text[max(self._shown, self._uncut) :]
        return self._certain(held_back=max((_overlap(unsure, s) for s in self._stop), default=0))

    def _append(self, text: str) -> None:
        self._text += text
        self._decoded += len(text)

    def _decode(self, token: int) -> str:
        """The characters that this id makes whole."""
        try:
            return self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises that one, and nothing narrower
                raise
            # A stray byte token: with it the bytes before it, shown already as what they were, decode to U+FFFD.
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=True)
            return self._decode_rest()

    def _begin(self) -> tuple[DecodeStream, int]:
        """A decoder that has read what stands before the answer, and how many characters of that are whole."""
        whole = list(self._before)
        while (text := self._decode_whole(whole)).endswith("\ufffd"):  # bytes of a character that the answer completes
            whole.pop()
        decoder = DecodeStream(ids=whole, skip_special_tokens=True)
        for token in self._before[len(whole) :]:
            decoder.step(self.tokenizer.backend_tokenizer, token)
        return decoder, len(text)

    def _decode_rest(self) -> str:
        """What all ids together say beyond the characters that have been decoded one by one."""
        return self._decode_whole(self._before + self.token_cache)[self._before_characters + self._decoded :]

    def _decode_whole(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, **self.decode_kwargs))

    def _with_stand_ins(self, stop: str) -> str:
        for token, stand_in in self._stand_ins.items():
            stop = stop.replace(cast(str, self.tokenizer.convert_ids_to_tokens(token)), stand_in)
        return stop

    def _certain(self, held_back: int) -> str:
        """The text not shown yet, up to a stop string or to the characters that may become one."""
        start = max(self._shown, self._uncut)
        found = [at for at in (self._text.find(stop, start) for stop in self._stop) if at >= 0]
        until = min(found, default=len(self._text) - held_back)
        piece, self._shown = self._text[self._shown : until], until
        if found:
            self._finish("stop")
            self._engine.cancel(self.request)
        if self._shown:
            # With the token that ends just here, or that a stop string cuts; those after it have shown no text as yet.
            last = bisect_left(self._ends, self._shown)
            self._show_logprobs(last + bool(found or self._ends[last : last + 1] == [self._shown]))
        return piece.translate(self._hidden) if self._hidden else piece

    def _show_logprobs(self, tokens: int) -> None:
        """Those of the first so many tokens of the answer."""
        if self.request.params.logprobs is None:
            return
        for index in range(len(self.logprobs), min(tokens, len(self._ends))):
            logprob, top = self.request.logprobs[index]
            chosen = self._candidate(self.token_cache[index], logprob)
            self.logprobs.append(
                TokenLogprob(chosen, tuple(self._candidate(*each) for each in top), self._offsets[index])
            )

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        is_known = self.request.params.prompt_logprobs and (self.token_cache or self.finish_reason is not None)
        return self._told_prompt if is_known else ()

    @functools.cached_property
    def _told_prompt(self) -> list[TokenLogprob]:
        likelihoods = [(None, []), *self.request.prompt_logprobs]
        names = [self._names.bytes_of(id) for id in self.request.ids[: len(likelihoods)]]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        lengths = [len(decoder.decode(data)) for data in names]
        offset, told = -sum(lengths), []
        for data, length, (logprob, top) in zip(names, lengths, likelihoods, strict=True):
            chosen = Candidate(self._names.name(data), data, logprob)
            told.append(TokenLogprob(chosen, tuple(self._candidate(*each) for each in top), offset))
            offset += length
        return told

    @functools.cached_property
    def _names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    def _candidate(self, token: int, logprob: float) -> Candidate:
        data = self._names.bytes_of(token)
        return Candidate(self._names.name(data), data, logprob)

    def _raise_error(self) -> None:
        if self.finish_reason == "error" and self.request.error:
            raise self.request.error


def _stand_ins(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> dict[int, str]:
    """Special tokens that stand in a stop string, the longest first: id -> a character that no decoded text has.

    Decoding skips special tokens, so the text alone would never match "<|im_end|>". A stand-in is half of a surrogate
    pair: a stop string matches a special token whole, and never a letter of its name.
    """
    if not stop:
        return {}
    special = [(id, token.content) for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    named = [(id, name) for id, name in special if name and any(name in text for text in stop)]
    named.sort(key=lambda each: len(each[1]), reverse=True)
    return {id: chr(FIRST_STAND_IN + n % STAND_INS) for n, (id, _) in enumerate(named)}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of stop, short of all of it, that text ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
