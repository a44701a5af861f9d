"""The model and nothing but the model: messages go in, pieces of text come out.

ChatModel ties the rooms together: loading loads, prompt encodes, engine decodes. The reply it hands out turns ids into
text for whoever reads it, stops at stop strings, and lets go of the model when it is closed. This file has never heard
of Gradio, HTTP or who is asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream
from transformers import TextIteratorStreamer

from llama2_chat import prompt
from llama2_chat.errors import ModelUnavailable, PromptTooLong
from llama2_chat.settings import Settings
from llama2_chat.types import Capabilities, FinishReason, Message, SamplingParams, Status, Timing, Usage

if TYPE_CHECKING:  # torch takes seconds to import: load() does it, behind a page that is already up
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llama2_chat.engine.engine import Engine, Occupancy, Request
    from llama2_chat.engine.grammar import Grammars
    from llama2_chat.loading.load import Loaded

log = logging.getLogger("llama2_chat")

CPU_KV_BYTES = 256 * 2**20  # 11,000 tokens of the embedded model
EXIT_GPU_LOST = 75  # EX_TEMPFAIL of sysexits.h: try again


class ChatModel:
    """One model that all visitors share: tokenizer, context window, engine, and how far loading has come."""

    capabilities = Capabilities(supports_token_ids=True, knows_queue=True, can_fail_over=False)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.status = Status()
        self.model: PreTrainedModel | None = None  # for scripts that look inside; answers come through the engine
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.context_length = 0  # tokens, prompt and answer together; 4,096 for Llama 2
        self.chat_format: str | None = None  # as prompt.encode takes it
        self._engine: Engine | None = None
        self._grammars: Grammars | None = None
        self._closing = threading.Event()

    @property
    def state(self) -> str:
        """ "loading", "ready" or "failed"."""
        return self.status.state

    @property
    def mode(self) -> str:
        """How fast a step runs, in words, once ready: "eager", or what has been compiled so far."""
        return self._engine.mode if self._engine else ""

    @property
    def occupancy(self) -> Occupancy | None:
        """Who is answered, who waits and how full the KV cache is right now; None before there is an engine."""
        return self._engine.occupancy if self._engine else None

    @property
    def gpu_memory(self) -> list[tuple[int, int]]:
        """Bytes taken and in all of each GPU, by whomever."""
        if self._engine is None:
            return []
        import torch

        seen = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count() * torch.cuda.is_available())]
        return [(total - free, total) for free, total in seen]

    def start(self) -> threading.Thread:
        """Load in a thread of its own; `status` tells how far it is."""
        thread = threading.Thread(target=self._load, name="load", daemon=True)
        thread.start()
        return thread

    def load(self) -> ChatModel:
        """Choose, fetch and load the model that the settings ask for; self, ready or failed, as `status` says."""
        # Not in the caller's thread: OpenMP gives every thread that computes a team of its own, and once the teams have
        # more threads than there are cores they stop spinning. A CPU then decodes at three fifths of its speed.
        self.start().join()
        return self

    def _load(self) -> None:
        from llama2_chat.loading.choose import choose, fetch
        from llama2_chat.loading.load import load, load_tokenizer

        try:
            plan = choose(self.settings)
            self.status = replace(self.status, model=plan.model_id, why=plan.why)
            checkpoint = fetch(plan, self._progress)
            tokenizer = load_tokenizer(checkpoint)
            prompt.recognise(tokenizer)  # a prompt that would come out wrong is refused before gigabytes are fetched
            self.serve(tokenizer, load(checkpoint, self._progress))
        except ModelUnavailable as error:
            log.error("%s", error)
            self.status = replace(self.status, state="failed", error=str(error))
        except _Closed:
            log.info("Stopped while loading")
        except Exception:
            log.exception("Loading the model failed")
            sentence = "The model could not be loaded because of an unexpected error. The server's log has the details."
            self.status = replace(self.status, state="failed", error=sentence)

    def serve(self, tokenizer: PreTrainedTokenizerBase, loaded: Loaded) -> ChatModel:
        """Be ready with a model that is already in memory; loading ends here, scripts may start here."""
        from llama2_chat.engine.engine import Engine
        from llama2_chat.engine.grammar import Grammars
        from llama2_chat.loading.load import find_stop_ids

        config = loaded.model.config.get_text_config(decoder=True)
        stop_ids = find_stop_ids(tokenizer, loaded.model.generation_config)
        self.chat_format = prompt.recognise(tokenizer)
        self.model, self.tokenizer = loaded.model, tokenizer
        # What is compiled for this GPU is found again at the next start.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.settings.cache_dir / "compiled"))
        engine = Engine(
            loaded.model,
            stop_ids,
            _free_bytes(self.settings.kv_headroom_gb),
            context_length=config.max_position_embeddings,
            queue_limit=self.settings.queue_limit,
            max_batch=self.settings.max_batch,
            compile=self.settings.compile,
            on_lost=self._lost,
        )
        self.context_length = engine.context_length
        self._grammars = Grammars(tokenizer, loaded.model.get_input_embeddings().num_embeddings, stop_ids)
        self._engine = engine
        if self._closing.is_set():  # closed meanwhile, perhaps before there was an engine to close
            self._engine.close()
            raise _Closed
        self.status = replace(
            self.status, state="ready", precision=loaded.precision, device=loaded.device, why=loaded.why
        )
        log.info("%s is ready in %s on %s. %s", self.status.model, loaded.precision, loaded.device, loaded.why)
        return self

    def stream_reply(self, messages: list[Message], params: SamplingParams, *, trim: bool = True) -> StreamedReply:
        """The answer to a conversation, on its way.

        trim: leave out the oldest exchanges if the conversation is too long; reply.usage.dropped_messages counts them.
        Raises PromptTooLong, Busy, ModelUnavailable while the model is not ready, ChatError for malformed messages,
        BadGrammar for a JSON schema that answers cannot be held to.
        """
        self._check_ready()
        fitted = prompt.fit(self.tokenizer, messages, self.context_length, params.max_new_tokens, self.chat_format)
        if fitted.dropped_messages and not trim:
            self._check_length(len(prompt.encode(self.tokenizer, messages, self.chat_format)), params)
        return self._submit(fitted.input_ids, params, fitted.dropped_messages)

    def encode(self, messages: list[Message]) -> list[int]:
        """The prompt that stream_reply makes of a conversation, however long it is."""
        self._check_ready()
        return prompt.encode(self.tokenizer, messages, self.chat_format)

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a text to go on with; none of it becomes a control token, save a BOS at its head."""
        self._check_ready()
        return prompt.encode_text(self.tokenizer, text)

    def stream_completion(self, input_ids: Sequence[int], params: SamplingParams) -> StreamedReply:
        """What follows input_ids, on its way. Raises as stream_reply does; nothing is ever left out."""
        self._check_ready()
        self._check_length(len(input_ids), params)
        return self._submit(list(input_ids), params, 0)

    def close(self, timeout_s: float = 5) -> None:
        """Stop loading or answering, within timeout_s seconds. Readers see their replies end as cancelled."""
        self._closing.set()
        if self._engine is not None:
            self._engine.close(timeout_s)

    def _submit(self, input_ids: list[int], params: SamplingParams, dropped_messages: int) -> StreamedReply:
        reply = StreamedReply(self.tokenizer, params.stop, Usage(len(input_ids), dropped_messages=dropped_messages))
        grammar = None if params.grammar is None else self._grammars.grammar(params.grammar)
        reply.request = self._engine.submit(input_ids, params, reply, grammar)
        return reply

    def _check_ready(self) -> None:
        status = self.status
        if status.state != "ready":
            raise ModelUnavailable(status.error or "The model is still loading. Please try again in a minute.")

    def _check_length(self, prompt_tokens: int, params: SamplingParams) -> None:
        limit = self.context_length - params.max_new_tokens
        if prompt_tokens > limit:
            raise PromptTooLong(prompt_tokens, self.context_length, params.max_new_tokens)

    def _lost(self) -> None:
        """The GPU has failed: readers get a moment to see their sentence, then a supervisor may start this anew."""
        self.status = replace(self.status, state="failed", error="The GPU stopped working. The program starts again.")
        log.critical("The GPU stopped working; this process ends with exit code %d", EXIT_GPU_LOST)
        threading.Timer(2, os._exit, (EXIT_GPU_LOST,)).start()

    def _progress(self, phase: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        if self._closing.is_set():
            raise _Closed
        self.status = replace(self.status, phase=phase, done_bytes=done_bytes, total_bytes=total_bytes)


def _free_bytes(headroom_gb: float) -> dict[torch.device, int]:
    """What the KV cache may take of each device."""
    import torch

    from llama2_chat.loading.memory import GB, visible_gpus

    torch.cuda.empty_cache()  # what loading needed for a moment
    headroom = int(headroom_gb * GB)
    free = {torch.device("cuda", i): max(gpu.free_bytes - headroom, 0) for i, gpu in enumerate(visible_gpus())}
    return {torch.device("cpu"): CPU_KV_BYTES, **free}


class _Closed(Exception):
    """close() was called while the model was loading."""


class StreamedReply(TextIteratorStreamer):
    """One answer on its way, as chat_types.Reply promises: the engine's thread puts ids in, one reader takes text out.

    transformers' streamer decodes in the model's thread and shows text up to the last space. Here put() only queues
    the id and the reader decodes, so that every character shows as soon as it is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], usage: Usage) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.request: Request  # set by whoever submits, before anyone reads
        self.finish_reason: FinishReason | None = None
        self._stop = stop
        self._usage = usage
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text = ""  # decoded so far
        self._shown = 0  # characters of it handed out; the rest may be the beginning of a stop string
        self._put_times = [time.perf_counter()]  # of the submit, the first token and the latest
        self._put_tokens = 0
        self._lock = threading.Lock()
        self._waiter: asyncio.Future[None] | None = None  # an async reader that has nothing to read

    # What the engine's thread calls.

    def put(self, value: torch.Tensor) -> None:
        self._put_times[2:] = []
        self._put_times.append(time.perf_counter())
        self._put_tokens += 1
        self._deliver(value)

    def end(self) -> None:
        self._deliver(self.stop_signal)

    def _deliver(self, value: torch.Tensor | None) -> None:
        self.text_queue.put(value)
        with self._lock:
            if self._waiter is not None:
                with contextlib.suppress(RuntimeError):  # its loop has closed: nobody reads any more
                    self._waiter.get_loop().call_soon_threadsafe(_resolve, self._waiter)

    # What readers see.

    @property
    def queue_position(self) -> int:
        return self.request.queue_position

    @property
    def usage(self) -> Usage:
        return replace(self._usage, completion_tokens=len(self.token_cache), cached_tokens=self.request.cached_tokens)

    @property
    def timing(self) -> Timing:
        submitted, *times = self._put_times
        seconds = times[-1] - times[0] if times else 0
        return Timing(times[0] - submitted if times else None, (self._put_tokens - 1) / seconds if seconds else None)

    def close(self) -> None:
        self._finish("cancelled")
        self.request.cancel()
        self._deliver(self.stop_signal)  # wakes a reader

    def __next__(self) -> str:
        while self.finish_reason is None:
            if piece := self._read(self.text_queue.get()):
                return piece
        self._raise_error()
        raise StopIteration

    def __aiter__(self) -> StreamedReply:
        return self

    async def __anext__(self) -> str:
        """All the text that has become certain since the last piece, waiting only if there is none."""
        pieces = []
        while self.finish_reason is None:
            try:
                pieces.append(self._read(self.text_queue.get_nowait()))
            except queue.Empty:
                if any(pieces):
                    break
                await self._arrival()
        if text := "".join(pieces):
            return text
        self._raise_error()
        raise StopAsyncIteration

    async def _arrival(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self.text_queue.empty():
                return
            self._waiter = waiter
        try:
            await waiter
        finally:
            self._waiter = None

    def __enter__(self) -> StreamedReply:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> StreamedReply:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # From ids to text, in the reader's thread.

    def _read(self, value: torch.Tensor | None) -> str:
        """The text that one more id, or the end, makes certain."""
        if self.finish_reason is not None:
            return ""
        if value is self.stop_signal:
            # Bytes of a character that never became whole are still in the decoder; they show as U+FFFD.
            whole = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
            self._text += whole[len(self._text) :]
            piece = self._certain(held_back=0)
            self._finish(self.request.finish_reason)
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
            return self.tokenizer.decode(self.token_cache, **self.decode_kwargs)[len(self._text) :]

    def _certain(self, held_back: int) -> str:
        """The text not shown yet, up to a stop string or to the characters that may become one."""
        found = [at for at in (self._text.find(stop, self._shown) for stop in self._stop) if at >= 0]
        until = min(found, default=len(self._text) - held_back)
        piece, self._shown = self._text[self._shown : until], until
        if found:
            self._finish("stop")
            self.request.cancel()
        return piece

    def _finish(self, reason: FinishReason) -> None:
        with self._lock:
            self.finish_reason = self.finish_reason or reason

    def _raise_error(self) -> None:
        if self.finish_reason == "error":
            raise self.request.error


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of stop, short of all of it, that text ends with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
