"""From a step to the readers: the next tokens are chosen, each goes to the streamer of its request, and some end it.

All runs in the engine's thread, except for end().
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from llama2_chat.engine.request import NO_SLOT, Likelihood, Request
from llama2_chat.engine.runner import Masks, Runner, Step, Tokens
from llama2_chat.engine.scheduler import Scheduler
from llama2_chat.errors import ChatError
from llama2_chat.types import FinishReason

log = logging.getLogger("llama2_chat")

ANSWERING_FAILED = "Something went wrong while answering. Please try again."


@dataclass(frozen=True)
class _InFlight:
    """A step whose tokens have been chosen but not emitted."""

    requests: Sequence[Request]
    tokens: Tokens


class Delivery:
    """Steps whose tokens are on their way, and the end of requests.

    lock: held while a request leaves the scheduler.
    """

    def __init__(self, runner: Runner[Any], scheduler: Scheduler, lock: AbstractContextManager[Any]) -> None:
        self._runner, self._scheduler, self._lock = runner, scheduler, lock
        self._in_flight: deque[_InFlight] = deque()

    def launch(self, step: Step) -> None:
        """Choose the next tokens of a step; they may arrive later."""
        tokens = self._runner.sample(step, self._masks(step.requests))
        for request in step.requests:
            request.sampled += 1
        self._in_flight.append(_InFlight(step.requests, tokens))

    def _masks(self, requests: Sequence[Request]) -> Masks | None:
        """What may come next in each answer with a constraint; None if there is none."""
        bound = [
            (index, request.constraint) for index, request in enumerate(requests) if request.constraint is not None
        ]
        if not bound:
            return None
        # The id before this one may be in flight. A GPU computes the logits while this waits, so it loses little.
        self.deliver()
        masks = Masks([index for index, _ in bound], self._runner.new_masks(len(bound)))
        for mask, (index, constraint) in zip(masks.bits, bound, strict=True):
            request = requests[index]
            if not request.runs:
                continue  # it has ended with what was emitted
            try:
                constraint.allow(mask)
            except ChatError as error:
                self.fail(request, error)
        return masks

    def deliver(self, all_but: int = 0) -> None:
        """Emit the tokens of the steps in flight, except of so many that are the newest."""
        while len(self._in_flight) > all_but:
            self._deliver(self._in_flight.popleft())

    def clear(self) -> None:
        """Forget the steps in flight."""
        self._in_flight.clear()

    def _deliver(self, step: _InFlight) -> None:
        for index, (request, token) in enumerate(zip(step.requests, step.tokens.result(), strict=True)):
            if not request.runs:
                continue  # ended while this step was in flight
            if token < 0:
                log.error("The model computed logits that are not finite, at %d tokens", len(request.ids))
                self.fail(request, ChatError(ANSWERING_FAILED))
            elif request.cancelled:
                self.finish(request, "cancelled")
            elif token in request.stop_ids:
                self.finish(request, "stop")
            else:
                if (count := request.params.logprobs) is not None:
                    logprob, top = step.tokens.likelihood(index)
                    request.logprobs.append(Likelihood(logprob, top[:count]))
                self._emit(request, token)

    def _emit(self, request: Request, token: int) -> None:
        request.ids.append(token)
        try:
            request.streamer.put(torch.tensor([token]))
            if request.constraint is not None:
                request.constraint.advance(token)
        except ChatError as error:
            self.fail(request, error)
        except Exception:
            log.exception("A reader failed")
            self.fail(request, ChatError(ANSWERING_FAILED))
        else:
            if request.constraint is not None and request.constraint.complete:
                self.finish(request, "stop")
            elif request.answer_tokens == request.limit:
                self.finish(request, "length")

    # ---- How a request ends ----

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is; what it computed stays for whoever begins alike."""
        if request in self._scheduler.running:
            if reason == "cancelled" and not self._runner.are_finite(request.blocks.blocks):
                self._zero(request)  # cancelled before its logits showed that they are not finite
            with self._lock:
                self._scheduler.finish(request)
        self.end(request, reason)

    def fail(self, request: Request, error: ChatError) -> None:
        """End a request with an error, and keep nothing that it computed."""
        request.error = error
        if request in self._scheduler.running:
            self._zero(request)
        self.finish(request, "error")

    def _zero(self, request: Request) -> None:
        """Leave nothing of what a request has written."""
        self._runner.zero_blocks(self._scheduler.evict(request))

    def end(self, request: Request, reason: FinishReason) -> None:
        """Tell the reader, once. Safe from any thread for a request that does not run."""
        if request.finish_reason is not None:
            return
        request.finish_reason, request.slot = reason, NO_SLOT
        try:
            request.streamer.end()
        except Exception:
            log.exception("Notifying a reader of the end of its request failed")
