"""Steps that check guesses: one token more of each answer, and one for each guess that is what would have been chosen.

Each token is chosen as it would be without guesses: from the logits of its own place, with its own random number,
penalties and mask. A guess changes no answer; it decides how many tokens a step gives.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llama2_chat.engine.delivery import Delivery
from llama2_chat.engine.request import Request
from llama2_chat.engine.runner import Runner, Verification
from llama2_chat.engine.scheduler import DraftChunk, Scheduler

log = logging.getLogger("llama2_chat")


class Speculation:
    """Guesses at what all running requests say next. Used by the engine's thread alone."""

    def __init__(self, runner: Runner[Any], scheduler: Scheduler, delivery: Delivery) -> None:
        self._runner, self._scheduler, self._delivery = runner, scheduler, delivery
        self.drafted = self.accepted = 0  # tokens since the start

    def chunks(self, requests: Sequence[Request]) -> list[DraftChunk]:
        """The newest token of each request with guesses behind it, as many as one step can check and there is memory
        for; no chunks if there are no guesses."""
        room = self._runner.draft_tokens - len(requests)
        if room < 1:
            return []
        drafts = [self._guess(request, room) for request in requests]
        while sum(len(draft) for draft, _ in drafts) > room:
            max((draft for draft, _ in drafts), key=len).pop()
        for request, (draft, _) in zip(requests, drafts, strict=True):
            if draft and not self._scheduler.grow(request, len(draft)):
                draft.clear()
        if not any(draft for draft, _ in drafts):
            return []
        return [DraftChunk.of(request, *draft) for request, draft in zip(requests, drafts, strict=True)]

    def _guess(self, request: Request, room: int) -> tuple[list[int], int]:
        """A draft, and how many of its ids, the first ones, a grammar forces."""
        most = min(room, request.limit - request.answer_tokens - 1)  # after the last guess one more token is chosen
        if request.drafts is None or most < 1:
            return [], 0
        forced = request.constraint.forced()[:most] if request.constraint else []
        return [*forced, *request.drafts.look_up(request.ids, most - len(forced), forced)], len(forced)

    def verify(self, chunks: Sequence[DraftChunk]) -> None:
        """Compute a step of these, and choose and emit token after token of each, as long as its guesses come true."""
        verification = self._compute(chunks)
        if verification is None:
            return
        going = drafted = [chunk for chunk in chunks if chunk.request.sampled]
        accepted: Counter[Request] = Counter()
        place = 0
        while going:
            self._delivery.launch(verification.step(place, [chunk.request for chunk in going]))
            for chunk in going:
                chunk.request.computed += 1
            self._delivery.deliver()
            going = [chunk for chunk in going if chunk.came_true(place)]
            accepted.update(chunk.request for chunk in going)
            place += 1
        self.drafted += sum(len(chunk.draft) for chunk in drafted)
        self.accepted += accepted.total()
        for chunk in drafted:
            if chunk.request.drafts is not None and accepted[chunk.request] >= chunk.forced:
                chunk.request.drafts.judge(len(chunk.draft) - chunk.forced, accepted[chunk.request] - chunk.forced)

    def _compute(self, chunks: Sequence[DraftChunk]) -> Verification[Any] | None:
        """Their logits; None if they cannot be computed. A request whose guesses spoil a step gets no more of them, and
        goes on as if none had been computed: it is now among those whose ids are read."""
        verification = None
        try:
            verification = self._runner.verify(chunks)
            spoiled = [chunk for chunk in chunks if chunk.draft and not self._is_finite(chunk)]
        except Exception:
            if not self._runner.is_alive():
                raise
            log.exception("A step with guesses failed and is done again without them")
            spoiled = [*chunks]
        for chunk in spoiled:
            chunk.request.drafts = None
            self._runner.zero_blocks(self._scheduler.unread(chunk.request))
        return verification

    def _is_finite(self, chunk: DraftChunk) -> bool:
        """Whether numbers were computed for it: else it would spoil the steps after it, too, even where it is wrong."""
        size = self._scheduler.config.block_size
        return self._runner.are_finite(chunk.request.blocks.blocks[chunk.start // size : (chunk.end - 1) // size + 1])
