"""The model and nothing but the model: messages go in, pieces of text come out.

ChatModel ties the rooms together: loading/ loads, prompt/ encodes, engine/ decodes and hands out the reply. This file
has never heard of Gradio, HTTP or who is asking. Importing it loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakSet

from llama2_chat import prompt
from llama2_chat.context import context_window
from llama2_chat.errors import (
    GPU_LOST,
    ChatError,
    ModelUnavailable,
    NoAdapter,
    NoInfilling,
    PromptTooLong,
    Subject,
    quoted,
)
from llama2_chat.process import collect_garbage_again, collect_garbage_later, share_cores
from llama2_chat.settings import Settings
from llama2_chat.tools import BEGUN, PLAIN, answer_grammar, plain
from llama2_chat.types import (
    CallStyle,
    Capabilities,
    ChatBackend,
    Fit,
    Message,
    Occupancy,
    Phase,
    SamplingParams,
    ServerStatus,
    Status,
    ToolOffer,
    Unasked,
    Usage,
)

if TYPE_CHECKING:  # torch takes seconds to import: load() does it, behind a page that is already up
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llama2_chat.engine.engine import Engine
    from llama2_chat.engine.grammar import Grammars
    from llama2_chat.engine.reply import StreamedReply
    from llama2_chat.loading.choose import Checkpoint
    from llama2_chat.loading.load import Loaded
    from llama2_chat.parallel import Workers

log = logging.getLogger("llama2_chat")

MOST_KV_HOST_BYTES = 8_000_000_000  # unless KV_HOST_GB asks for more: 10,000 tokens of the 13B
LONGEST_UNASKED = 4_096  # tokens of an answer whose length nobody named: some models never end by themselves
FORKED = (
    "The model was loaded before this process was forked, and the thread that computes stayed behind. "
    "Load the model in this process, or start processes by spawning them."
)
EXIT_GPU_LOST = 75  # EX_TEMPFAIL of sysexits.h: try again


@dataclass(frozen=True)
class Serving:
    """What there is once a model is loaded."""

    model: PreTrainedModel  # for scripts that look inside; answers come through the engine
    tokenizer: PreTrainedTokenizerBase
    chat_format: str | None  # as prompt.encode takes it
    ends: tuple[str, ...]  # texts with which the chat template ends an answer, if it does so in no token
    engine: Engine
    grammars: Grammars
    infilling: prompt.Infilling | None  # None for a model that only goes on with a text


@dataclass(frozen=True)
class _Told:
    """What a prompt is made of."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()  # for the chat template


class ChatModel:
    """One model in this process that all visitors share, and how far loading has come. A types.ChatBackend."""

    servers: Sequence[ServerStatus] = ()
    _in_use: ClassVar[WeakSet[ChatModel]] = WeakSet()  # all that were loaded and are not closed

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.status = Status()
        self.context_length = 0  # tokens, prompt and answer together; 4,096 for Llama 2
        self.reply_type: type[StreamedReply] | None = None  # another one, for scripts that measure
        self._serving: Serving | None = None
        self._loaded_by = os.getpid()
        self._workers: Workers | None = None  # of a model over several GPUs
        self._closing = threading.Event()

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        return self.status.state

    @property
    def capabilities(self) -> Capabilities:
        chats = self._serving is None or self._serving.chat_format != prompt.NO_FORMAT
        return Capabilities(
            supports_token_ids=True, knows_queue=True, can_fail_over=False, counts_tokens=True, chats=chats
        )

    @property
    def serving(self) -> Serving:
        """Raises ModelUnavailable until a model is loaded in this process."""
        if self._serving is None or self.status.state != "ready":
            raise ModelUnavailable(self.status.error or "The model is still loading. Please try again in a minute.")
        if self._loaded_by != os.getpid():
            raise ModelUnavailable(FORKED)
        return self._serving

    @property
    def mode(self) -> str:
        """How a step runs, in words, once ready: "eager", or what has been recorded so far."""
        return self._serving.engine.mode if self._serving else ""

    @property
    def occupancy(self) -> Occupancy | None:
        """Who is answered, who waits and how full the KV cache is right now; None before there is an engine."""
        return self._serving.engine.occupancy if self._serving else None

    @property
    def gpu_memory(self) -> list[tuple[int, int]]:
        """Bytes used, by any program, and bytes in total, of each GPU; none before a model is loaded."""
        if self._serving is None:
            return []
        import torch

        if not torch.cuda.is_available():
            return []
        seen = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
        return [(total - free, total) for free, total in seen]

    def start(self) -> threading.Thread:
        """Load in a thread of its own; `status` tells how far it is."""
        share_cores()
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
        from llama2_chat.engine.architecture import check_architecture, translate_architecture_errors
        from llama2_chat.loading.choose import choose, fetch
        from llama2_chat.loading.config import read_config
        from llama2_chat.loading.draft import check_draft
        from llama2_chat.loading.load import GUESSED_FORMAT, divided, find_format, guesses_format, load, measure
        from llama2_chat.loading.lora import check_adapters
        from llama2_chat.loading.memory import translate_out_of_memory
        from llama2_chat.loading.read import load_tokenizer

        try:
            plan = choose(self.settings)
            adapters = tuple(name for name, _ in plan.adapters)
            name = self.settings.model_name or plan.name
            self.status = replace(self.status, model=name, adapters=adapters, why=plan.why)
            checkpoint = fetch(plan, self._progress)
            tokenizer = load_tokenizer(checkpoint)
            # What would come out wrong is refused before gigabytes are fetched.
            chat_format = find_format(checkpoint, tokenizer)
            if guesses_format(checkpoint, tokenizer):
                self.status = replace(self.status, guesses_format=True)
                checkpoint = replace(checkpoint, why=f"{checkpoint.why} {GUESSED_FORMAT}")
            if not plan.is_embedded:
                measure(checkpoint.base)
                check_architecture(read_config(checkpoint.base))
            check_adapters(checkpoint)
            if small := check_draft(checkpoint):
                check_architecture(small)
            checkpoint = divided(checkpoint)
            if checkpoint.part:
                self._workers = self._start_workers(checkpoint)
            loaded = load(checkpoint, self._progress)
            with (
                translate_out_of_memory(quoted(plan.model_id), loaded.precision, loaded.needed_bytes),
                translate_architecture_errors(type(loaded.model).__name__),
            ):
                self.serve(tokenizer, loaded, chat_format)
            self._in_use.add(self)
            collect_garbage_later()
            if self._closing.is_set():  # closed since it was ready
                self._let_go()
        except ModelUnavailable as error:
            log.error("%s", error.detail)
            self.status = replace(self.status, state="failed", error=str(error))
        except _Closed:
            log.info("Stopped while loading")
        except Exception:
            log.exception("Loading the model failed")
            sentence = "The model could not be loaded because of an unexpected error. The server's log has the details."
            self.status = replace(self.status, state="failed", error=sentence)
        finally:
            if self._workers and self.status.state != "ready":
                self._workers.close()

    def _start_workers(self, checkpoint: Checkpoint) -> Workers:
        """The processes of the other parts; they read files that are here."""
        from llama2_chat.loading.load import bring_plain
        from llama2_chat.loading.memory import visible_gpus
        from llama2_chat.parallel import RunnerOptions, Workers

        bring_plain(checkpoint, self._progress)
        settings, part = self.settings, checkpoint.part
        assert part is not None
        host_bytes = _host_bytes(settings.kv_host_gb, "cuda" if visible_gpus() else "cpu") // part.of
        options = RunnerOptions(settings.max_batch, settings.compile, settings.deterministic, host_bytes)
        return Workers(checkpoint, options, self._rank_lost)

    def serve(self, tokenizer: PreTrainedTokenizerBase, loaded: Loaded, chat_format: str | None = None) -> ChatModel:
        """Be ready with a model that is already in memory; loading ends here, scripts may start here.

        chat_format: as prompt.encode takes it.
        """
        from llama2_chat.engine.engine import Engine
        from llama2_chat.engine.grammar import Grammars
        from llama2_chat.engine.kv_pool import make_pool
        from llama2_chat.engine.model_runner import build_runner
        from llama2_chat.loading.load import find_stop_ids
        from llama2_chat.loading.memory import free_bytes

        context, why_shorter = context_window(loaded.model.config)
        why = f"{loaded.why} {why_shorter}".rstrip()
        prompt.show_calls(tokenizer)
        stop_ids = find_stop_ids(tokenizer, loaded.model.generation_config)
        chat_format, ending = prompt.checked_format(tokenizer, chat_format), prompt.find_ending(tokenizer)
        runner = (
            self._workers.join(loaded)
            if self._workers
            else build_runner(
                loaded.model,
                lambda: free_bytes(self.settings.kv_headroom_gb),
                context_length=context,
                max_batch=self.settings.max_batch,
                compile=self.settings.compile,
                deterministic=self.settings.deterministic,
                adapters=loaded.adapters,
                speculate=self.settings.speculation == "auto",
                host_bytes=_host_bytes(self.settings.kv_host_gb, loaded.device),
                draft=loaded.draft,
                make_pool=partial(make_pool, self.settings.kv_cache),
            )
        )
        engine = Engine(runner, stop_ids | ending.next_turn, queue_limit=self.settings.queue_limit, on_lost=self._lost)
        self.context_length = engine.context_length
        if engine.context_length < context:
            why = f"{why} Its context is {engine.context_length:,} of {context:,} tokens: the memory holds no more."
        grammars = Grammars(tokenizer, runner.vocab_size, stop_ids)
        infilling = prompt.find_infilling(tokenizer, runner.vocab_size)
        self._loaded_by = os.getpid()
        self._serving = Serving(loaded.model, tokenizer, chat_format, ending.strings, engine, grammars, infilling)
        if self._closing.is_set():  # closed meanwhile, perhaps before there was an engine to close
            engine.close()
            raise _Closed
        self.status = replace(self.status, state="ready", precision=loaded.precision, device=loaded.device, why=why)
        self.status = replace(self.status, kv_cache=runner.kv_format)
        room = f"{engine.occupancy.kv_capacity_tokens:,} tokens of keys and values (KV_CACHE={runner.kv_format})"
        log.info(
            "%s is ready in %s on %s, with room for %s. %s",
            *(self.status.model, loaded.precision, loaded.device, room, why),
        )
        return self

    @property
    def call_style(self) -> CallStyle:
        """See types.ChatBackend."""
        return prompt.call_style(self.serving.tokenizer) or PLAIN

    def stream_reply(
        self,
        messages: list[Message],
        params: SamplingParams,
        *,
        trim: bool = True,
        to_the_end: bool = False,
        tools: ToolOffer | None = None,
    ) -> StreamedReply:
        """The answer to a conversation, on its way; see types.ChatBackend."""
        serving, dropped_messages = self.serving, 0
        goes_on = prompt.goes_on(prompt.check_messages(messages)[1], params)
        if tools is not None and tools.may_call and goes_on:
            raise ChatError(BEGUN)
        if tools is not None and not goes_on:
            params = replace(params, grammar=answer_grammar(tools, self.call_style, params.grammar))
        if trim:
            input_ids, dropped_messages = self._trimmed(messages, params, tools)
        else:
            input_ids = self._fitting(self.encode(messages, tools), params, to_the_end)
        before = input_ids if goes_on else ()
        return self._submit(input_ids, params, to_the_end, dropped_messages, before, serving.ends)

    def fit(self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None) -> Fit:
        """How the conversation would stand in the context window; see types.ChatBackend."""
        context_length = self.context_length
        try:
            input_ids, dropped_messages = self._trimmed(messages, params, tools)
        except PromptTooLong as error:
            dropped, tokens = prompt.droppable(messages), error.prompt_tokens or context_length + 1
            return Fit(tokens, dropped, max(context_length - tokens, 0), context_length, fits=False)
        return Fit(len(input_ids), dropped_messages, context_length - len(input_ids), context_length)

    def stream_completion(
        self, input_ids: Sequence[int], params: SamplingParams, *, to_the_end: bool = False
    ) -> StreamedReply:
        """What follows input_ids, on its way; see types.ChatBackend."""
        serving, before = self.serving, input_ids
        fitting = self._fitting(input_ids, params, to_the_end, "prompt")
        serving.engine.check_ids(fitting)  # before the reply decodes them, at which the tokenizer may overflow
        if serving.infilling and serving.infilling.middle in fitting:
            before = prompt.head_ids(serving.tokenizer)
            params = replace(params, stop_token_ids=(*params.stop_token_ids, serving.infilling.end))
        return self._submit(fitting, params, to_the_end, before=before)

    def encode(self, messages: list[Message], tools: ToolOffer | None = None) -> list[int]:
        """The prompt that stream_reply makes of a conversation. Raises PromptTooLong for what is absurdly long."""
        tokenizer = self.serving.tokenizer
        told = self._told_of(messages, tools)
        prompt.check_prompt(tokenizer, told.messages, told.tools, self.context_length)
        return prompt.encode(tokenizer, told.messages, self.serving.chat_format, told.tools)

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a text to go on with; none of it becomes a control token, save a BOS at its head."""
        serving = self.serving
        prompt.check_length(serving.tokenizer, [text], self.context_length, "prompt")
        if serving.infilling and (parts := prompt.written_infilling(text)):
            return prompt.encode_infilling(serving.tokenizer, serving.infilling, *parts)
        return prompt.encode_text(serving.tokenizer, text)

    def encode_infilling(
        self, prefix: str, suffix: str, *, extra: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        """The prompt of a text to fill in; see types.ChatBackend."""
        serving = self.serving
        if serving.infilling is None:
            raise NoInfilling(prompt.NO_INFILLING)
        if room is None:
            prompt.check_length(serving.tokenizer, [prefix, suffix], self.context_length, "prompt")
        return prompt.encode_infilling(serving.tokenizer, serving.infilling, prefix, suffix, extra, room)

    def decode(self, input_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens by their names; see types.ChatBackend."""
        if input_ids:
            self.serving.engine.check_ids(input_ids)
        return prompt.decode(self.serving.tokenizer, input_ids)

    def close(self, timeout_s: float = 5) -> None:
        """Stop loading or answering, within timeout_s seconds. Readers see their replies end as cancelled."""
        self._closing.set()
        if self._serving is not None:
            self._serving.engine.close(timeout_s)
        if self._workers:
            self._workers.close(timeout_s)
        self._let_go()

    def _let_go(self) -> None:
        """This model's memory is for the next one."""
        self._in_use.discard(self)
        collect_garbage_again(once=bool(self._in_use))

    def _trimmed(
        self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None
    ) -> prompt.Fitted:
        serving, room, told = self.serving, self._room(params, trim=True), self._told_of(messages, tools)
        chat_format = serving.chat_format
        return prompt.fit(serving.tokenizer, told.messages, self.context_length, room, chat_format, told.tools)

    def _told_of(self, messages: list[Message], tools: ToolOffer | None) -> _Told:
        """The conversation as the model is used to calls and results, or else as plain turns."""
        if prompt.call_style(self.serving.tokenizer) is not None:
            return _Told(messages, tuple(map(prompt.tool_object, tools.tools)) if tools else ())
        return _Told(plain(messages, tools))

    def _room(self, params: SamplingParams, trim: bool = False) -> int:
        """Tokens to leave for the answer: all that are requested. Of a default that nobody requested, and where a
        conversation is shortened for it, half of the window at most."""
        if trim or isinstance(params.max_new_tokens, Unasked):
            return min(params.max_new_tokens, self.context_length // 2)
        return params.max_new_tokens

    def _fitting(
        self, input_ids: Sequence[int], params: SamplingParams, to_the_end: bool, subject: Subject = "conversation"
    ) -> list[int]:
        """The ids, or PromptTooLong if they leave too little room for the answer."""
        wanted = 0 if to_the_end else self._room(params)
        if len(input_ids) + max(wanted, 1) > self.serving.engine.context_length:
            raise PromptTooLong(len(input_ids), self.context_length, wanted, subject=subject)
        return list(input_ids)

    def _submit(
        self,
        input_ids: list[int],
        params: SamplingParams,
        to_the_end: bool,
        dropped_messages: int = 0,
        before: Sequence[int] = (),
        ends: tuple[str, ...] = (),
    ) -> StreamedReply:
        """before: the ids, if they end with a text to be continued. ends: as in Serving."""
        from llama2_chat.engine.reply import StreamedReply

        serving = self.serving
        if params.server:
            raise ChatError(f"There is no server {params.server!r:.100} here.")
        if to_the_end:
            params = replace(params, max_new_tokens=min(self.context_length - len(input_ids), LONGEST_UNASKED))
        most_tokens = min(params.max_new_tokens, serving.engine.context_length - len(input_ids))
        grammar = None if params.grammar is None else serving.grammars.grammar(params.grammar, most_tokens)
        stop = params.stop if params.ignore_eos else (*params.stop, *ends)
        usage = Usage(len(input_ids), dropped_messages=dropped_messages)
        reply = (self.reply_type or StreamedReply)(serving.tokenizer, serving.engine, stop, usage, before)
        if grammar is not None:
            reply.relaxed, reply.last_start = grammar.relaxed, grammar.last_start
        reply.request = serving.engine.submit(input_ids, params, reply, grammar, self._adapter(params.adapter))
        return reply

    def _adapter(self, name: str) -> int:
        """As Engine.submit() takes it."""
        names = "", *self.status.adapters
        if name not in names:
            raise NoAdapter(name)
        return names.index(name)

    def _rank_lost(self) -> None:
        """A process that computes a part of the model has ended; the engine's thread may wait for it for ever, and
        nobody else has its lock then. So the end is certain before readers are told."""
        self._lost()
        if self._serving:
            self._serving.engine.lose()

    def _lost(self) -> None:
        """The GPU has failed: readers get a moment to see their sentence, then a supervisor may start this anew."""
        if self.status.error == GPU_LOST:
            return
        self.status = replace(self.status, state="failed", error=GPU_LOST)
        log.critical("The GPU stopped working; this process ends with exit code %d", EXIT_GPU_LOST)
        threading.Timer(2, os._exit, (EXIT_GPU_LOST,)).start()

    def _progress(self, phase: Phase, done_bytes: int = 0, total_bytes: int = 0) -> None:
        if self._closing.is_set():
            raise _Closed
        self.status = replace(self.status, phase=phase, done_bytes=done_bytes, total_bytes=total_bytes)


_: type[ChatBackend] = ChatModel  # the promise, held by the type checker


def _host_bytes(wanted_gb: float | None, device: str) -> int:
    """What conversations that leave the GPU may take of this computer's memory."""
    from llama2_chat.loading.memory import GB, free_host_bytes

    if device.endswith("cpu"):
        return 0  # the KV cache is there already
    if wanted_gb is not None:
        return int(wanted_gb * GB)
    return min(free_host_bytes() // 4, MOST_KV_HOST_BYTES)


class _Closed(Exception):
    """close() was called while the model was loading."""
