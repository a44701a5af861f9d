"""Steps that check guesses: one token more of each answer, and one for each guess that is what would have been chosen.

Each token is chosen as it would be without guesses: from the logits of its own place, with its own random number,
penalties and mask. A guess changes no answer; it decides how many tokens a step gives.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from llama2_chat.engine.delivery import Delivery
from llama2_chat.engine.request import Request
from llama2_chat.engine.runner import Runner, Verification
from llama2_chat.engine.scheduler import DraftChunk, Scheduler

log = logging.getLogger("llama2_chat")


class _Draft(NamedTuple):
    """Guesses at what comes next."""

    ids: list[int]
    forced: int = 0  # how many of them, the first ones, a grammar forces
    by_model: bool = False


class Speculation:
    """Guesses at what all running requests say next. Used by the engine's thread alone."""

    def __init__(self, runner: Runner[Any], scheduler: Scheduler, delivery: Delivery) -> None:
        self._runner, self._scheduler, self._delivery = runner, scheduler, delivery
        self.drafted = self.accepted = 0  # tokens since the start
        self.drafted_by_model = self.accepted_by_model = 0  # of these

    def chunks(self, requests: Sequence[Request]) -> list[DraftChunk]:
        """The newest token of each request with guesses behind it, as many as one step can check and there is memory
        for; no chunks if there are no guesses."""
        room = self._runner.draft_tokens - len(requests)
        if room < 1:
            return []
        drafts = [self._guess(request, room) for request in requests]
        if self._runner.pipelined and (any(draft.ids for draft in drafts) or self._may_ask_model(requests, room)):
            # Guesses come behind the newest token, which is in flight: where there seem to be some, it is waited for.
            self._delivery.deliver()
            requests = [request for request in requests if request.runs]
            drafts = [self._guess(request, room) for request in requests]
        while sum(len(draft.ids) for draft in drafts) > room:
            max((draft.ids for draft in drafts), key=len).pop()
        for request, draft in zip(requests, drafts, strict=True):
            if draft.ids and not self._scheduler.grow(request, len(draft.ids)):
                draft.ids.clear()
        self._ask_model(requests, drafts, room - sum(len(draft.ids) for draft in drafts))
        if not any(draft.ids for draft in drafts):
            return []
        return [DraftChunk.of(request, *draft) for request, draft in zip(requests, drafts, strict=True)]

    def _guess(self, request: Request, room: int) -> _Draft:
        most = min(room, _most(request))
        if request.drafts is None or most < 1:
            return _Draft([])
        forced = request.constraint.forced()[:most] if request.constraint else []
        return _Draft([*forced, *request.drafts.look_up(request.ids, most - len(forced), forced)], len(forced))

    def _may_ask_model(self, requests: Sequence[Request], room: int) -> bool:
        cost, asked = self._runner.draft_cost, [each for each in requests if each.confidence is not None]
        if cost is None or not asked or room < len(asked):
            return False
        most = room // len(asked)
        return any(
            request.confidence.may_guess(min(most, _most(request)), cost * len(requests))
            for request in asked
            if request.confidence is not None
        )

    def _ask_model(self, requests: Sequence[Request], drafts: list[_Draft], room: int) -> None:
        """Let a model guess where nothing else did."""
        cost = self._runner.draft_cost
        asked = [n for n, draft in enumerate(drafts) if not draft.ids and requests[n].confidence is not None]
        if cost is None or not asked or room < len(asked):
            return
        lengths = []
        for n in asked:
            request, most = requests[n], min(room // len(asked), _most(requests[n]))
            assert request.confidence is not None
            length = request.confidence.length(most, cost * len(requests))
            lengths.append(length if self._scheduler.grow(request, length) else 0)
        if not any(lengths):
            return
        try:
            guesses = self._runner.draft([requests[n] for n in asked], lengths)
        except Exception:
            if not self._runner.is_alive():
                raise
            log.exception("A model's guesses failed; these answers go on without them")
            for n in asked:
                requests[n].stop_model()
            return
        for n, ids in zip(asked, guesses, strict=True):
            drafts[n] = _Draft(ids, by_model=True)

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
        for chunk in drafted:
            self._count(chunk, accepted[chunk.request])
            if chunk.request.drafts is None:
                continue
            if chunk.by_model and chunk.draft and chunk.request.confidence is not None:
                chunk.request.confidence.judge(len(chunk.draft), accepted[chunk.request])
            elif accepted[chunk.request] >= chunk.forced:
                chunk.request.drafts.judge(len(chunk.draft) - chunk.forced, accepted[chunk.request] - chunk.forced)

    def _count(self, chunk: DraftChunk, accepted: int) -> None:
        self.drafted += len(chunk.draft)
        self.accepted += accepted
        if chunk.by_model:
            self.drafted_by_model += len(chunk.draft)
            self.accepted_by_model += accepted

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


def _most(request: Request) -> int:
    """How many guesses can come true: after the last one more token is chosen."""
    return request.limit - request.answer_tokens - 1
