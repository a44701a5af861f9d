"""The decode loop: one thread owns the model, and all requests that fit share every step of it.

Ids go in, ids come out, one step at a time, through a streamer with put() and end() as `generate` calls them. A turn of
the loop admits who waits, computes a chunk of the prompts that are new, and one token of every answer. Who runs is the
scheduler's to say, what a step computes the runner's, how tokens reach their readers delivery's; here are the thread,
the door, the turn, and recovery. This file knows no text, roles or HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llama2_chat.engine.delivery import ANSWERING_FAILED, Delivery
from llama2_chat.engine.drafts import Drafts
from llama2_chat.engine.request import Request, Streamer, TokenConstraint
from llama2_chat.engine.runner import Runner
from llama2_chat.engine.sampler import draws
from llama2_chat.engine.scheduler import Scheduler, SchedulerConfig
from llama2_chat.engine.self_check import check_request
from llama2_chat.engine.speculation import Speculation
from llama2_chat.errors import GPU_LOST, Busy, ChatError, ModelUnavailable, PromptTooLong, UnknownToken
from llama2_chat.text import is_out_of_memory
from llama2_chat.types import Occupancy, SamplingParams

log = logging.getLogger("llama2_chat")

CROWDED_OUT = "Too many questions of yours were waiting. Please try again in a minute."
OUT_OF_MEMORY = "The memory ran out for this answer. Try again, or start a new chat."


class Engine:
    """Runs requests on one model, in a thread of its own.

    runner: the model; model_runner.build_runner() makes one.
    stop_ids: ids that end an answer; they are not emitted.
    queue_limit: requests that may wait; one more raises Busy.
    on_lost: called when the GPU has failed for good, after every request has ended.

    Raises ModelUnavailable if the runner gives other logits than the model alone, or cannot compute them as it must.
    """

    def __init__(
        self,
        runner: Runner[Any],
        stop_ids: set[int],
        queue_limit: int = 64,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner = runner
        self._on_lost = on_lost
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=runner.num_blocks,
                block_size=runner.block_size,
                max_batch=runner.max_batch,
                longest_chunk=runner.longest_chunk,
                shortest_chunk=runner.shortest_chunk,
                queue_limit=queue_limit,
                piece_size=runner.piece_size,
            ),
            runner,
        )
        self._closed = False
        self._changed = threading.Condition()  # its lock protects the waiting queue and self._closed
        self.stop_ids = stop_ids
        self.delivery = Delivery(runner, self._scheduler, self._changed)
        self._speculation = Speculation(runner, self._scheduler, self.delivery)
        self._self_check()
        runner.start(self._wake)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        try:
            runner.wait()
        except ModelUnavailable:
            self.close()
            raise

    @property
    def context_length(self) -> int:
        """Tokens that one request can have, prompt and answer together; fewer than requested if memory is short."""
        return self.runner.context_length

    @property
    def mode(self) -> str:
        """How a step runs, in words: "eager", or what has been recorded so far."""
        return self.runner.mode

    @property
    def occupancy(self) -> Occupancy:
        """What is going on right now."""
        with self._changed:
            scheduler = self._scheduler
            capacity = (self.runner.num_blocks - 1) * self.runner.block_size
            running, waiting = len(scheduler.running), len(scheduler.waiting)
            return Occupancy(
                running,
                waiting,
                scheduler.kv_tokens,
                capacity,
                scheduler.preemptions,
                self._speculation.drafted,
                self._speculation.accepted,
                scheduler.host_tokens,
                self.runner.host_blocks * self.runner.block_size,
                scheduler.recalled_tokens,
                self._speculation.drafted_by_model,
                self._speculation.accepted_by_model,
            )

    def submit(
        self,
        input_ids: list[int],
        params: SamplingParams,
        streamer: Streamer,
        constraint: TokenConstraint | None = None,
        adapter: int = 0,
    ) -> Request:
        """The request, placed in the waiting queue. Its ids go to the streamer, then streamer.end() is called.

        constraint: what the ids of the answer must follow; made for params.grammar, and for this request alone.
        adapter: which of the runner's adapters answers, 1 for the first; 0 for the model without any.

        Raises Busy when the waiting queue is full, and ends the last of a client who has more there with it.
        Raises ModelUnavailable after close(), PromptTooLong for more ids than fit,
        ChatError for ids that the model does not know.
        """
        self.check_ids(input_ids)
        self._check_named(params)
        if params.prompt_logprobs and self.runner.piece_size:
            raise ChatError("How likely the prompt is cannot be told with DETERMINISTIC=1. Leave echo or logprobs out.")
        room = self.context_length - len(input_ids)
        if room < 1:
            raise PromptTooLong(len(input_ids), self.context_length)
        limit = min(params.max_new_tokens, room)
        stop_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else self.stop_ids)
        drafts = Drafts() if self.runner.may_draft else None
        numbers = draws(params, limit)
        request = Request(list(input_ids), params, streamer, limit, numbers, constraint, stop_ids, adapter, drafts)
        with self._changed:
            if self._closed:
                raise ModelUnavailable("The model has been stopped. Start the program again.")
            refused = self._scheduler.add(request)
            self._changed.notify()
        if refused is not None:
            self.delivery.fail(refused, Busy(CROWDED_OUT))
        return request

    def check_ids(self, input_ids: Sequence[int]) -> None:
        """Raise ChatError for ids that the model does not know, and if there are none."""
        vocab_size = self.runner.vocab_size
        if not input_ids or not all(type(token) is int and 0 <= token < vocab_size for token in input_ids):
            raise ChatError(f"input_ids must be one or more whole numbers from 0 to {vocab_size - 1}.")

    def _check_named(self, params: SamplingParams) -> None:
        vocab_size = self.runner.vocab_size
        named = {"stop_token_ids": params.stop_token_ids, "logit_bias": [token for token, _ in params.logit_bias]}
        for name, ids in named.items():
            if max(ids, default=0) >= vocab_size:
                sentence = f"{name} may name tokens from 0 to {vocab_size - 1}; {max(ids)} is none of them."
                raise UnknownToken(sentence, name)

    def position(self, request: Request) -> int:
        """Its place in the waiting queue, 1 for the next; 0 once it runs. Safe from any thread."""
        with self._changed:
            return self._scheduler.position(request)

    def cancel(self, request: Request) -> None:
        """Take it out of the waiting queue, or stop it within one step. Safe from any thread, also after the end."""
        with self._changed:
            request.cancelled = True
            if not self._scheduler.withdraw(request):
                return  # running: the loop checks before each step; ended: nothing to do
        self.delivery.end(request, "cancelled")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts nobody is admitted, so that all who are submitted here begin in the same step."""
        with self._changed:
            yield

    def close(self, timeout_s: float = 5) -> None:
        """Cancel every request and end the thread; waits for the step that is being computed."""
        with self._changed:
            self._closed = True
            waiting = list(self._scheduler.waiting)
            self._changed.notify()
        for request in waiting:
            self.cancel(request)
        self.runner.close()
        self._thread.join(timeout_s)

    def lose(self) -> None:
        """The GPU has failed: every request ends with an error, even if the thread waits for the GPU and will do so
        for ever. Safe from any thread."""
        with self._changed:
            self._closed = True
            requests = [*self._scheduler.running, *self._scheduler.waiting]
            self._scheduler.waiting.clear()
        for request in requests:
            request.error = ChatError(GPU_LOST)
            self.delivery.end(request, "error")

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        self.runner.enter_thread()
        while not self._closed:
            try:
                self._loop()
            except BaseException:
                # _attempt handles the fault of one request. Here the scheduler may be inconsistent: all that runs ends.
                log.exception("The decode loop failed and starts again")
                running, alive = self._scheduler.running, self.runner.is_alive()
                self.delivery.clear()
                self._scheduler.reset()
                if alive:
                    self.runner.zero_blocks(slice(None))
                for request in running:
                    self.delivery.fail(request, ChatError(ANSWERING_FAILED if alive else GPU_LOST))
                if not alive:
                    self._give_up()
        for request in self._scheduler.running:
            self.delivery.end(request, "cancelled")

    @torch.inference_mode()
    def _loop(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._closed:
                    return
            self.runner.maintain()
            for request in [request for request in scheduler.running if request.cancelled]:
                self.delivery.finish(request, "cancelled")
            self._admit()
            # Nobody waits for what another's blocks come back from.
            arrived = [r for r in scheduler.prefilling if not self.runner.are_arriving(r.blocks.blocks)]
            if not arrived and not scheduler.decoding:
                self.runner.wait_for_block()
            self._attempt(self._prefill, arrived)
            self._attempt(self._decode, scheduler.decoding)
            scheduler.cache.spare()

    def _admit(self) -> None:
        """Let in who waits; whoever has more than a share makes room."""
        while True:
            with self._changed:
                self._scheduler.admit()
                in_the_way = self._scheduler.in_the_way
            if in_the_way is None:
                return
            self._preempt(in_the_way, memory_full=False)

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        return bool(scheduler.waiting or scheduler.running or self._closed or self.runner.maintenance_due)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- What a turn computes ----

    def _prefill(self, requests: Sequence[Request]) -> None:
        """One chunk of the prompts that are new, in order of admission; the first token of each that is complete."""
        chunks = self._scheduler.prefill_chunks(requests)
        started = time.perf_counter()
        step = self.runner.prefill(chunks)
        self._scheduler.prefilled(chunks)
        for request in step.requests:
            request.sampled = request.answer_tokens
        if step.requests:
            self.delivery.launch(step)
        self._scheduler.cache.spare()  # while the GPU computes
        if step.requests:
            self.delivery.deliver()
        else:
            self.runner.synchronize()  # a chunk is measured whole
        self._scheduler.measured(chunks, time.perf_counter() - started)

    def _decode(self, requests: Sequence[Request]) -> None:
        """One more token of each answer. On a GPU the step before is emitted while this one is computed."""
        requests = [request for request in requests if request.sampled < request.limit]
        for request in requests:
            # When memory is full the youngest goes back to the waiting queue; alone, each has room.
            while request.runs and not self._scheduler.grow(request):
                self._preempt(self._scheduler.youngest)
        requests = [request for request in requests if request.runs]
        if chunks := self._speculation.chunks(requests):
            self._speculation.verify(chunks)
            return
        requests = [request for request in requests if request.runs]  # some ended where guesses were looked for
        if requests:
            self.delivery.launch(self.runner.decode(requests))
            for request in requests:
                request.computed += 1
        self.delivery.deliver(all_but=1 if requests and self.runner.pipelined else 0)

    def _preempt(self, request: Request, *, memory_full: bool = True) -> None:
        self.delivery.deliver()
        if not request.runs:
            return  # it has ended with what was emitted
        with self._changed:
            self._scheduler.preempt(request, memory_full=memory_full)
        if request.cancelled or self._closed:  # meanwhile, by someone who did not find it in the waiting queue
            self.cancel(request)

    # ---- What goes wrong ----

    def _attempt(self, compute: Callable[[Sequence[Request]], None], requests: Sequence[Request]) -> None:
        """compute(requests). If it fails, each is tried alone, so that only the one to blame ends with an error."""
        requests = [request for request in requests if request.runs]
        if not requests:
            return
        try:
            compute(requests)
        except Exception as error:
            if is_out_of_memory(error):
                log.exception("Out of memory with %d requests", len(requests))
                self.runner.release_memory()
                self._rewind(requests)
                self._shrink(requests[0])
            elif self.runner.is_alive():
                log.exception("A step with %d requests failed", len(requests))
                self._rewind(requests)
                self._try_each(requests)
            else:
                raise

    def _try_each(self, requests: Sequence[Request]) -> None:
        """Each alone, from its prompt: the one to blame fails again, and ends."""
        if len(requests) > 1:
            for request in requests:
                self._attempt(self._prefill, [request])
        elif requests[0].runs:
            self.delivery.fail(requests[0], ChatError(ANSWERING_FAILED))

    def _rewind(self, requests: Sequence[Request]) -> None:
        self.delivery.deliver()
        self._scheduler.rewind(requests)

    def _shrink(self, request: Request) -> None:
        """Ask less of the next step: fewer requests, then a shorter chunk; when nothing is left to give up, end one."""
        if youngest := self._scheduler.shrink_batch():
            self._preempt(youngest)
        elif not self._scheduler.shrink_chunk(request) and request.runs:
            self.delivery.fail(request, ChatError(OUT_OF_MEMORY))

    def _give_up(self) -> None:
        """No restart of the loop can cure a GPU that has failed; the program can only be started anew."""
        self.lose()
        self._on_lost()

    # ---- At the start ----

    def _self_check(self) -> None:
        """Run prompts through blocks of the pool, and through the model alone."""
        lengths = self.runner.check_lengths[: self.runner.max_batch]
        requests = [check_request(length, self.runner.vocab_size) for length in lengths]
        for request in requests:
            self._scheduler.add(request)
            self._scheduler.admit()
        agrees = self.runner.self_check([request for request in requests if request.runs])
        self._scheduler.reset()
        if not agrees:
            raise ModelUnavailable(
                "This model does not attend to its past as Llama 2 does, so visitors cannot share it. "
                "Choose another model."
            )
