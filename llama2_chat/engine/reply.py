"""One answer on its way, as types.Reply promises: the engine's thread puts ids in, one reader takes text out.

Whoever reads does the decoding, so that the engine's thread only hands ids over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from tokenizers.decoders import DecodeStream
from transformers import TextIteratorStreamer

from llama2_chat.channel import Channel, ChannelReply, Stopwatch
from llama2_chat.types import FinishReason, Timing, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama2_chat.engine.engine import Engine
    from llama2_chat.engine.request import Request


class StreamedReply(ChannelReply["torch.Tensor | None"], TextIteratorStreamer):
    """transformers' TextIteratorStreamer, read by ids.

    As it comes, it decodes in the model's thread and shows text up to the last space. Here put() only queues the id and
    the reader decodes, so that every character shows as soon as it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, engine: Engine, stop: Sequence[str], usage: Usage) -> None:
        TextIteratorStreamer.__init__(self, tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.text_queue: Channel[torch.Tensor | None] = Channel()  # type: ignore[assignment]  # has put() and get(), too
        self.request: Request  # set by whoever submits, before anyone reads
        self._engine = engine
        self._stop = stop
        self._usage = usage
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text = ""  # decoded so far
        self._shown = 0  # characters of it handed out; the rest may be the beginning of a stop string
        self._stopwatch = Stopwatch()
        self._put_tokens = 0

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
            self._text += self._decode_whole()[len(self._text) :]
            piece = self._certain(held_back=0)
            self._finish(cast(FinishReason, self.request.finish_reason))
            return piece
        for token in value.tolist():
            self.token_cache.append(token)
            self._text += self._decode(token)
        return self._certain(held_back=max((_overlap(self._text[self._shown :], s) for s in self._stop), default=0))

    def _decode(self, token: int) -> str:
        """The characters that this id makes whole."""
        try:
            return self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception:
            # A stray byte token: with it the bytes before it, shown already as what they were, decode to U+FFFD.
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=True)
            return self._decode_whole()[len(self._text) :]

    def _decode_whole(self) -> str:
        return cast(str, self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def _certain(self, held_back: int) -> str:
        """The text not shown yet, up to a stop string or to the characters that may become one."""
        found = [at for at in (self._text.find(stop, self._shown) for stop in self._stop) if at >= 0]
        until = min(found, default=len(self._text) - held_back)
        piece, self._shown = self._text[self._shown : until], until
        if found:
            self._finish("stop")
            self._engine.cancel(self.request)
        return piece

    def _raise_error(self) -> None:
        if self.finish_reason == "error" and self.request.error:
            raise self.request.error


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of stop, short of all of it, that text ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
