"""The decode loop: one thread owns the model, and all requests that fit share every step of it.

Ids go in, ids come out, one step at a time, through a streamer with put() and end() as `generate` calls them. A turn of
the loop admits who waits, computes a chunk of the prompts that are new, and one token of every answer. Where keys and
values lie is kv_cache's business, choosing tokens is sampler's, speed on a GPU is compiled's. This file has never heard
of text, roles or pages of the web kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.engine.compiled import CompiledModel, Part, decode_kernel, join_projections
from llama2_chat.engine.kv_cache import ATTENTION, PAGE_TOKENS, DecodeStep, Pages, PageTree, PrefillStep, SharedPages
from llama2_chat.engine.sampler import NARROW, Rows, draws, is_narrow, restrict
from llama2_chat.errors import Busy, ChatError, ModelUnavailable
from llama2_chat.types import RANGES, FinishReason, SamplingParams

log = logging.getLogger(__name__)

CPU_BATCH, GPU_BATCH = 8, 32  # answers computed at once
CPU_CHUNK, GPU_CHUNK = 256, 2048  # tokens of prompts per turn; Stop waits no longer than one chunk
SHORTEST_CPU_CHUNK, SHORTEST_GPU_CHUNK = 128, 512  # below, the weights are read for too few tokens
CHUNK_S = 0.1  # while others are being answered a chunk takes about so long, and no longer is the gap in their text
RESERVED_PAGES = 2  # left for each running request to grow into when another comes in
CHECK_IDS = 24  # of the prompt with which the engine is compared with the model itself
FAILED = "Something went wrong while answering. Please try again."
OUT_OF_MEMORY = "The GPU ran out of memory for this answer. Try again, or start a new chat."
GPU_LOST = "The GPU stopped working in the middle of an answer. The program has to be started again."


class Streamer(Protocol):
    """Where ids go: any of transformers' streamers that skips no prompt. Called from the engine's thread."""

    def put(self, value: Tensor) -> None: ...  # int64 [1], on the CPU
    def end(self) -> None: ...  # always called, once, whatever happened; the request then says why


class Grammar(Protocol):
    """Which ids may come next in one answer. Used by the engine's thread alone; raises ChatError when it gives up."""

    @property
    def complete(self) -> bool: ...  # nothing may follow but the end

    def allow(self, mask: Tensor) -> None: ...  # writes a bit for each id to int32 [words] on the CPU, lowest first
    def advance(self, token: int) -> None: ...


class Request:
    """One prompt on its way through the engine. Everything that belongs to it is born and dies with it."""

    def __init__(
        self,
        engine: Engine,
        input_ids: list[int],
        params: SamplingParams,
        streamer: Streamer,
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.streamer = streamer
        self.grammar = grammar  # as far as ids have been handed out
        self.cached_tokens = 0  # of the prompt, found in the KV cache
        self.finish_reason: FinishReason | None = None
        self.error: ChatError | None = None  # what to tell the visitor when finish_reason is "error"
        self.cancelled = False
        self._engine = engine
        # What the engine's thread alone reads and writes:
        self.ids = list(input_ids)  # prompt and answer so far
        self.prompt_tokens = len(input_ids)
        self.limit = min(params.max_new_tokens, engine.context_length - len(input_ids))  # tokens of its answer
        self.computed = 0  # ids whose keys and values are in the pages
        self.row = -1  # where it runs; -1 while it waits and after the end
        self.sampled = 0  # tokens of its answer chosen so far, some perhaps still on their way; 0 before and in prefill
        self.pages = SharedPages()
        self.draws = draws(params)

    @property
    def answered(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def queue_position(self) -> int:
        """Its place in line, 1 for the next; 0 once it runs."""
        return self._engine.position(self)

    def cancel(self) -> None:
        """Leave the line, or stop within one step. Safe from any thread, also after the end."""
        self._engine.cancel(self)


@dataclass
class Launched:
    """A decode step on its way: whose, and where its tokens arrive."""

    requests: list[Request]
    tokens: Tensor  # int64 [N] on the CPU, valid after `arrived`
    arrived: torch.cuda.Event | None

    def result(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()  # the only wait for the GPU in a step
        return self.tokens.tolist()


@dataclass(frozen=True)
class Occupancy:
    running: int  # requests
    waiting: int
    tokens: int  # whose keys and values running requests hold, in whole pages
    tokens_in_all: int  # that there is memory for


class Engine:
    """Runs requests on one model, in a thread of its own.

    model: a causal LM in eval mode, on its device or devices.
    stop_ids: ids that end an answer; they are not streamed.
    free_bytes: for each device of the model what the KV cache may take there.
    context_length: tokens of prompt and answer that one request may have; more memory than that for each is not taken.
    queue_limit: requests that may wait; one more raises Busy.
    max_batch: requests answered at once.
    compile: make a Llama on a single GPU faster, in the background.
    on_lost: called when the GPU has failed for good, after every request has ended.

    Raises ModelUnavailable if the model attends in a way that cannot be shared by pages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: set[int],
        free_bytes: Mapping[torch.device, int],
        context_length: int,
        queue_limit: int = 64,
        max_batch: int | None = None,
        compile: bool = True,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._stop_ids = stop_ids
        self._queue_limit = queue_limit
        self._on_lost = on_lost
        self._device = model.get_input_embeddings().weight.device
        self._on_gpu = self._device.type == "cuda"
        self._longest_chunk = GPU_CHUNK if self._on_gpu else CPU_CHUNK
        self._shortest_chunk = SHORTEST_GPU_CHUNK if self._on_gpu else SHORTEST_CPU_CHUNK
        self._max_batch = max_batch or (GPU_BATCH if self._on_gpu else CPU_BATCH)
        model.set_attn_implementation(ATTENTION)
        self._kernel = decode_kernel(model)
        compiles = compile and self._kernel is not None and CompiledModel.supports(model)
        if compiles:
            join_projections(model)
        self._pages = Pages(model, free_bytes, context_length, self._max_batch)
        self._context_length = context_length
        self._most_pages = -(-context_length // PAGE_TOKENS)
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        self._mask = torch.empty(1, 1, 1, 1, device=self._device)  # transformers makes none when it is given one
        self._rows = Rows(self._max_batch, self._vocab_size, int(RANGES["max_new_tokens"][1]), self._device)
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._tokens_per_s = 0.0  # of prefill, as last measured
        self._compiled: CompiledModel | None = None
        self._open_books()
        self._compare_with_the_model()
        if compiles:
            self._compiled = CompiledModel(model, self._pages, self._rows, self._most_pages)
            self._compiled.start(self._wake)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Tokens that one request can have, prompt and answer together; fewer than asked for if memory is short."""
        return min(self._context_length, self._pages.tokens)

    @property
    def kv_bytes(self) -> int:
        return self._pages.bytes

    @property
    def occupancy(self) -> Occupancy:
        """What is going on right now."""
        with self._changed:
            tokens = (self._pages.count - 1 - self._tree.available) * PAGE_TOKENS
            return Occupancy(len(self._running), len(self._waiting), tokens, self._pages.tokens)

    @property
    def mode(self) -> str:
        """How a step runs, in words: "eager", or what has been compiled so far."""
        return self._compiled.progress if self._compiled else "eager"

    def submit(
        self, input_ids: list[int], params: SamplingParams, streamer: Streamer, grammar: Grammar | None = None
    ) -> Request:
        """The request, placed last in line. Its ids go to the streamer, then streamer.end() is called.

        grammar: what the ids of the answer must follow; made for params.grammar, and for this request alone.

        Raises Busy when the line is full, ModelUnavailable after close(), ChatError for ids the model does not know
        or that its memory cannot hold.
        """
        if not input_ids or not all(type(token) is int and 0 <= token < self._vocab_size for token in input_ids):
            raise ChatError(f"input_ids must be one or more whole numbers from 0 to {self._vocab_size - 1}.")
        if len(input_ids) >= self.context_length:
            raise ChatError(
                f"This prompt is {len(input_ids):,} tokens and there is room for {self.context_length - 1:,}. "
                "Shorten it, or start a new chat."
            )
        request = Request(self, input_ids, params, streamer, grammar)
        with self._changed:
            if self._closed:
                raise ModelUnavailable("The model has been stopped. Start the program again.")
            if len(self._waiting) >= self._queue_limit:
                raise Busy(f"The line is full ({len(self._waiting)} waiting). Please try again in a minute.")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def position(self, request: Request) -> int:
        with self._changed:
            return self._waiting.index(request) + 1 if request in self._waiting else 0

    def cancel(self, request: Request) -> None:
        with self._changed:
            request.cancelled = True
            if request not in self._waiting:
                return  # running: the loop looks before each step; ended: nothing to do
            if request is self._waiting[0]:
                self._full = False  # there may be room for the next
            self._waiting.remove(request)
        self._end(request, "cancelled")

    def close(self, timeout_s: float = 5) -> None:
        """Cancel every request and end the thread; waits for the step that is being computed."""
        with self._changed:
            self._closed = True
            requests = list(self._waiting)
            self._changed.notify()
        for request in requests:
            self.cancel(request)
        if self._compiled:
            self._compiled.close()
        self._thread.join(timeout_s)

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        if self._on_gpu:
            torch.cuda.set_device(self._device)  # for events, graphs and kernels; else they take the first GPU
        while not self._closed:
            try:
                self._loop()
            except BaseException:
                # What one request does wrong never comes here: the books themselves may be. All that runs ends.
                log.exception("The decode loop failed and starts again")
                running, works = self._running, self._gpu_works()
                self._open_books()
                if works:
                    self._pages.wipe(slice(None))
                for request in running:
                    self._fail(request, FAILED if works else GPU_LOST)
                if not works:
                    self._give_up()
        for request in self._running:
            self._end(request, "cancelled")

    def _open_books(self) -> None:
        """Nobody runs, and all rows and pages are free."""
        self._tree = PageTree(self._pages.count)
        self._free_rows = list(range(self._max_batch - 1, -1, -1))
        self._running: list[Request] = []  # in order of arrival
        self._launched: deque[Launched] = deque()
        self._full = False  # memory ran out: nobody comes in before somebody has left
        self._batch_limit, self._chunk_limit = self._max_batch, self._longest_chunk

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed or self._unrecorded())
                if self._closed:
                    return
            if self._compiled:
                self._compiled.record()
            for request in [request for request in self._running if request.cancelled]:
                self._leave(request, "cancelled")
            self._admit()
            self._attempt(self._prefill, [request for request in self._running if not request.sampled])
            self._attempt(self._decode, [request for request in self._running if request.sampled])

    def _unrecorded(self) -> bool:
        return self._compiled is not None and self._compiled.unrecorded

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- Who runs ----

    def _admit(self) -> None:
        """Let requests in, first come first served, as long as there are rows and pages for what is known of them."""
        if not self._running:
            self._full = False
        with self._changed:
            while (
                self._waiting
                and not self._full
                and len(self._running) < self._batch_limit
                and self._find_pages(self._waiting[0])
            ):
                request = self._waiting.popleft()
                request.row = self._free_rows.pop()
                self._running.append(request)
                if self._compiled:
                    self._compiled.set_pages(request.row, 0, request.pages.pages)

    def _find_pages(self, request: Request) -> bool:
        """Give the request the pages that begin as it does, and new ones for the rest of its ids and one more."""
        pages, nearest, common = self._tree.take(request.ids)
        needed = len(request.ids) // PAGE_TOKENS + 1 - len(pages)
        if needed + RESERVED_PAGES * len(self._running) > self._tree.available and self._running:
            self._tree.give_back(pages, [])
            return False
        request.pages, request.computed = pages, len(pages) * PAGE_TOKENS
        for _ in range(needed):
            page = self._tree.allocate()
            if nearest is not None:  # if just this page was taken back, what it holds is still there
                self._pages.copy(nearest.page, page)
                request.computed += common
                nearest = None
            pages.own.append(page)
        if not request.answered:
            request.cached_tokens = request.computed
        return True

    def _leave(self, request: Request, reason: FinishReason) -> None:
        if request in self._running:
            if reason == "cancelled" and not self._pages.are_finite(request.pages.pages):
                self._pages.wipe(self._tree.discard(request.pages))  # it left before its logits told
            self._vacate(request)
            # What _shrink() took comes back little by little.
            self._batch_limit = min(self._batch_limit + 1, self._max_batch)
            self._chunk_limit = min(self._chunk_limit * 2, self._longest_chunk)
        self._end(request, reason)

    def _vacate(self, request: Request) -> None:
        """Take the request's row and pages; what the pages hold stays known as long as nobody needs them."""
        self._running.remove(request)
        self._full = False
        self._tree.give_back(request.pages, request.ids[: request.computed])
        self._free_rows.append(request.row)
        request.row, request.computed, request.sampled = -1, 0, 0

    def _requeue(self, request: Request) -> None:
        """Back to the head of the line with all its text: it goes on where it was once there is room."""
        self._deliver_all()
        if request.row < 0:
            return  # it has ended with what was delivered
        self._vacate(request)
        self._full = True
        with self._changed:
            self._waiting.appendleft(request)
        if request.cancelled or self._closed:  # meanwhile, by someone who did not find it in the line
            self.cancel(request)

    def _fail(self, request: Request, sentence: str) -> None:
        request.error = ChatError(sentence)
        if request in self._running:
            self._pages.wipe(self._tree.discard(request.pages))
        self._leave(request, "error")

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.finish_reason is not None:
            return
        request.finish_reason, request.row = reason, -1
        try:
            request.streamer.end()
        except Exception:
            log.exception("A reader could not be told that its request has ended")

    # ---- What a turn computes ----

    def _prefill(self, requests: list[Request]) -> None:
        """One chunk of the prompts that are new, in order of arrival; the first token of each that is complete."""
        room = self._chunk_tokens()
        chunk: list[tuple[Request, int, int]] = []
        for request in requests:
            end = min(len(request.ids), request.computed + room)
            if end > request.computed:
                chunk.append((request, request.computed, end))
                room -= end - request.computed
        started = time.perf_counter()
        complete = [request for request, _, end in chunk if end == len(request.ids)]
        logits = self._forward(chunk)
        for request, _, end in chunk:
            request.computed = end
            self._tree.share(request.pages, request.ids[:end])
        for request in complete:
            self._rows.join(request.row, request.ids, request.answered, request.params, request.draws)
            request.sampled = request.answered
        if complete:
            rows = torch.tensor([request.row for request in complete], device=self._device)
            self._restrict(complete, logits)
            self._launch(complete, self._sample(complete, logits, rows))
            self._deliver_all()
        elif self._on_gpu:
            torch.cuda.synchronize(self._device)  # a chunk is measured whole
        tokens = sum(end - start for _, start, end in chunk)
        if tokens >= self._shortest_chunk:
            self._tokens_per_s = tokens / (time.perf_counter() - started)

    def _chunk_tokens(self) -> int:
        if not any(request.sampled for request in self._running):
            return self._chunk_limit
        return min(self._chunk_limit, max(int(self._tokens_per_s * CHUNK_S), self._shortest_chunk))

    def _forward(self, chunk: list[tuple[Request, int, int]]) -> Tensor:
        """Logits [n, V] after those requests whose last id is in the chunk, of (request, first, one past last)."""
        if self._compiled and self._compiled.can_prefill(max(end - start for _, start, end in chunk)):
            logits = self._compiled.prefill([Part(r.row, start, r.ids[start:end]) for r, start, end in chunk])
            return logits[[index for index, (r, _, end) in enumerate(chunk) if end == len(r.ids)]]
        ids, positions, slots, parts, last, at = [], [], [], [], [], 0
        tables = torch.zeros(len(chunk), self._most_pages, dtype=torch.long)
        for index, (request, start, end) in enumerate(chunk):
            pages = torch.tensor(request.pages.pages)
            tables[index, : len(pages)] = pages
            position = torch.arange(start, end)
            ids += request.ids[start:end]
            positions.append(position)
            slots.append(pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
            parts.append((at, at + end - start, start))
            at += end - start
            if end == len(request.ids):
                last.append(at - 1)
        ids, positions, slots, last = (
            states.to(self._device)
            for states in (torch.tensor(ids), torch.cat(positions), torch.cat(slots), torch.tensor(last).long())
        )
        return self._eager(ids, positions, PrefillStep(self._pages.layers, slots, torch.tensor(parts), tables), last)

    def _eager(self, ids: Tensor, positions: Tensor, step: PrefillStep | DecodeStep, last: Tensor) -> Tensor:
        """Logits [n, V] at `last`, int64 [n], of tokens ids, int64 [T], through transformers' own forward."""
        output = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self._mask,
            use_cache=False,
            logits_to_keep=last,
            step=step,
        )
        return output.logits[0].to(self._device)

    def _decode(self, requests: list[Request]) -> None:
        """One more token of each answer. On a GPU the step before is delivered while this one is computed."""
        requests = [request for request in requests if request.sampled < request.limit]
        for request in requests:
            self._grow(request)
        requests = [request for request in requests if request.row >= 0]
        if requests:
            rows = [request.row for request in requests]
            graph = self._compiled.decode(rows) if self._compiled else None
            if graph is None:
                on_device = torch.tensor(rows, device=self._device)
                logits = self._decode_eagerly(requests, on_device)
            else:
                on_device, logits = graph.inputs[: len(rows)], graph.logits[: len(rows)]
            self._restrict(requests, logits)
            if graph is not None and all(is_narrow(request.params) for request in requests):
                graph.sample.replay()
                tokens = graph.tokens[: len(rows)]
            else:
                tokens = self._sample(requests, logits, on_device)
            for request in requests:
                request.computed += 1
            self._launch(requests, tokens)
        while len(self._launched) > (1 if requests and self._on_gpu else 0):
            self._deliver(self._launched.popleft())

    def _grow(self, request: Request) -> None:
        """Room for one more token. When memory is full the youngest goes back to the line; alone, each has room."""
        while request.row >= 0 and len(request.pages) * PAGE_TOKENS <= request.computed:
            page = self._tree.allocate()
            if page is not None:
                request.pages.own.append(page)
                if self._compiled:
                    self._compiled.set_pages(request.row, len(request.pages) - 1, [page])
            else:
                self._requeue(self._running[-1])

    def _decode_eagerly(self, requests: list[Request], rows: Tensor) -> Tensor:
        lengths = [request.computed for request in requests]
        width = max(lengths) // PAGE_TOKENS + 1
        tables = torch.zeros(len(requests), width, dtype=torch.long)
        for table, request in zip(tables, requests, strict=True):
            pages = request.pages.pages[:width]
            table[: len(pages)] = torch.tensor(pages)
        step = DecodeStep(self._pages.layers, lengths, tables.to(self._device), self._kernel)
        everyone = torch.arange(len(requests), device=self._device)
        return self._eager(self._rows.tokens[rows], step.positions, step, everyone)

    def _restrict(self, requests: list[Request], logits: Tensor) -> None:
        """Leave to each answer with a grammar, in logits [N, V], only the ids that may come next."""
        bound = [(index, request) for index, request in enumerate(requests) if request.grammar is not None]
        if not bound:
            return
        # The id before this one may be on its way. A GPU computes the logits while this waits, so it loses little.
        self._deliver_all()
        masks = torch.zeros(len(bound), -(-self._vocab_size // 32), dtype=torch.int32, pin_memory=self._on_gpu)
        for mask, (_, request) in zip(masks, bound, strict=True):
            if request.row < 0:
                continue  # it has ended with what was delivered
            try:
                request.grammar.allow(mask)
            except ChatError as error:
                self._fail(request, str(error))
        restrict(logits[:, : self._vocab_size], [index for index, _ in bound], masks)

    def _sample(self, requests: list[Request], logits: Tensor, rows: Tensor) -> Tensor:
        """The next token of each request, int64 [N]. Who shares a step changes nobody's way of being sorted."""
        narrow = [index for index, request in enumerate(requests) if is_narrow(request.params)]
        wide = [index for index, request in enumerate(requests) if not is_narrow(request.params)]
        if not wide or not narrow:
            return self._rows.sample(logits, rows, NARROW if narrow else self._vocab_size)
        tokens = torch.empty_like(rows)
        for which, kept in ((narrow, NARROW), (wide, self._vocab_size)):
            which = torch.tensor(which, device=self._device)
            tokens[which] = self._rows.sample(logits[which], rows[which], kept)
        return tokens

    # ---- What comes out ----

    def _launch(self, requests: list[Request], tokens: Tensor) -> None:
        for request in requests:
            request.sampled += 1
        arrived = None
        if self._on_gpu:
            tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._launched.append(Launched(requests, tokens, arrived))

    def _deliver_all(self) -> None:
        while self._launched:
            self._deliver(self._launched.popleft())

    def _deliver(self, launched: Launched) -> None:
        for request, token in zip(launched.requests, launched.result(), strict=True):
            if request.row < 0:
                continue  # ended while this step was on its way
            if token < 0:
                log.error("The model computed logits that are not finite, at %d tokens", len(request.ids))
                self._fail(request, FAILED)
            elif request.cancelled:
                self._leave(request, "cancelled")
            elif token in self._stop_ids:
                self._leave(request, "stop")
            else:
                self._hand_out(request, token)

    def _hand_out(self, request: Request, token: int) -> None:
        request.ids.append(token)
        try:
            request.streamer.put(torch.tensor([token]))
            if request.grammar is not None:
                request.grammar.advance(token)
        except ChatError as error:
            self._fail(request, str(error))
        except Exception:
            log.exception("A reader failed")
            self._fail(request, FAILED)
        else:
            if request.grammar is not None and request.grammar.complete:
                self._leave(request, "stop")
            elif request.answered == request.limit:
                self._leave(request, "length")

    # ---- What goes wrong ----

    def _attempt(self, compute: Callable[[list[Request]], None], requests: list[Request]) -> None:
        """compute(requests). If it fails, each is tried alone, so that only the one to blame ends with an error."""
        requests = [request for request in requests if request.row >= 0]
        if not requests:
            return
        try:
            compute(requests)
        except torch.OutOfMemoryError:
            log.exception("Out of GPU memory with %d requests", len(requests))
            torch.cuda.empty_cache()
            self._rewind(requests)
            self._shrink(requests)
        except Exception:
            if not self._gpu_works():
                raise
            log.exception("A step with %d requests failed", len(requests))
            self._rewind(requests)
            if len(requests) > 1:
                for request in requests:
                    self._attempt(self._prefill, [request])
            elif requests[0].row >= 0:
                self._fail(requests[0], FAILED)

    def _rewind(self, requests: list[Request]) -> None:
        """Let requests go on from what was delivered: how far a step that failed has come nobody knows."""
        self._deliver_all()
        for request in requests:
            request.computed, request.sampled = min(request.computed, len(request.ids) - 1), 0

    def _shrink(self, requests: list[Request]) -> None:
        """Ask less of the next turn: fewer requests, then a shorter chunk; when nothing is left to give up, end one."""
        if len(self._running) > 1:
            self._batch_limit = len(self._running) - 1
            self._requeue(self._running[-1])
        elif min(self._chunk_limit, len(requests[0].ids) - requests[0].computed) > self._shortest_chunk:
            self._chunk_limit //= 2
        elif requests[0].row >= 0:
            self._fail(requests[0], OUT_OF_MEMORY)

    def _gpu_works(self) -> bool:
        try:
            for device in {keys.device for keys, _ in self._pages.layers}:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception:
            return False
        return True

    def _give_up(self) -> None:
        """No restart of the loop can cure a GPU that has failed; the program can only be started anew."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for request in waiting:
            self._fail(request, GPU_LOST)
        self._on_lost()

    # ---- At the start ----

    def _compare_with_the_model(self) -> None:
        """Run a short prompt through the pages, whole, in parts and token by token, and through the model alone."""
        ids = [(7 * i + 3) % self._vocab_size for i in range(CHECK_IDS)]
        request = Request(self, ids, SamplingParams(), streamer=None)
        request.row = 0
        with torch.inference_mode():
            expected = self._model(torch.tensor([ids], device=self._device), use_cache=False).logits[0, -1].float()
            self._find_pages(request)
            self._forward([(request, 0, CHECK_IDS // 2)])
            found = [self._forward([(request, CHECK_IDS // 2, CHECK_IDS)])]
            request.computed = CHECK_IDS - 1
            self._rows.tokens[0] = ids[-1]
            found.append(self._decode_eagerly([request], torch.tensor([0], device=self._device)))
        self._open_books()
        for logits in found:
            if not torch.linalg.norm(logits[0].float() - expected.to(self._device)) < 0.1 * torch.linalg.norm(expected):
                raise ModelUnavailable(
                    "This model does not attend to its past as Llama 2 does, so visitors cannot share it. "
                    "Choose another model."
                )
