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
from llama2_chat.engine.drafts import Guess
from llama2_chat.engine.request import Request
from llama2_chat.engine.runner import Runner, Verification
from llama2_chat.engine.scheduler import DraftChunk, Scheduler

log = logging.getLogger("llama2_chat")


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
        guesses = self._look_up(requests, room)
        if self._runner.pipelined:
            # The first of these is the newest token, which is in flight: where others seem to follow, it is waited for.
            if any(len(each) > 1 for each in guesses) or self._may_ask_model(requests, room):
                self._delivery.deliver()
                requests = [request for request in requests if request.runs]
                guesses = self._look_up(requests, room)
            else:
                guesses = [[] for _ in requests]
        for request, each in zip(requests, guesses, strict=True):
            if each and not self._scheduler.grow(request, len(each)):
                each.clear()
        by_model = self._ask_model(requests, guesses, room - sum(map(len, guesses)))
        if not any(guesses):
            return []
        each_request = zip(requests, guesses, strict=True)
        return [DraftChunk.of(each, [guess.id for guess in of_it], each in by_model) for each, of_it in each_request]

    def _look_up(self, requests: Sequence[Request], room: int) -> list[list[Guess]]:
        """What comes next by text that comes again and by grammars, as far as it pays."""
        return self._that_pay([self._guess(request, room) for request in requests], room)

    def _that_pay(self, guesses: Sequence[list[Guess]], room: int) -> list[list[Guess]]:
        """Of all requests' guesses the likeliest, as many as let a step give the most tokens for its time."""
        likeliest = sorted(
            (-guess.chance, place, n) for n, each in enumerate(guesses) for place, guess in enumerate(each)
        )
        # What a step is expected to give and what it costs, where one of a single token costs 1.
        tokens, row_cost = float(len(guesses)), self._runner.row_cost
        cost, lengths = 1 + row_cost * (len(guesses) - 1), [0] * len(guesses)
        for less, _, n in likeliest[:room]:
            if -less * cost <= tokens * row_cost:
                break
            tokens, cost, lengths[n] = tokens - less, cost + row_cost, lengths[n] + 1
        return [each[:length] for each, length in zip(guesses, lengths, strict=True)]

    def _guess(self, request: Request, room: int) -> list[Guess]:
        most = min(room, _most(request))
        if request.drafts is None or most < 1:
            return []
        forced = request.constraint.forced()[:most] if request.constraint else []
        found = request.drafts.look_up(request.ids, most - len(forced), forced)
        if found and not forced and self._is_model_surer(request, found[0].chance):
            return []
        return [*(Guess(id, 1.0) for id in forced), *found]

    def _is_model_surer(self, request: Request, chance: float) -> bool:
        confidence = request.confidence
        return self._runner.draft_cost is not None and confidence is not None and confidence.chance > chance

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

    def _ask_model(self, requests: Sequence[Request], guesses: list[list[Guess]], room: int) -> set[Request]:
        """Let a model guess where nothing else did. Returns whose guesses are its."""
        cost = self._runner.draft_cost
        if cost is None:
            return set()
        asked = [n for n, each in enumerate(guesses) if not each and requests[n].confidence is not None]
        if not asked or room < len(asked):
            return set()
        lengths, least = [], []
        for n in asked:
            request, most = requests[n], min(room // len(asked), _most(requests[n]))
            assert request.confidence is not None
            length = request.confidence.length(most, cost * len(requests))
            lengths.append(length if self._scheduler.grow(request, length) else 0)
            least.append(request.confidence.least(cost * len(requests)))
        if not any(lengths):
            return set()
        try:
            made = self._runner.draft([requests[n] for n in asked], lengths, least)
        except Exception:
            if not self._runner.is_alive():
                raise
            log.exception("A model's guesses failed; these answers go on without them")
            for n in asked:
                requests[n].stop_model()
            return set()
        for n, each in zip(asked, made, strict=True):
            guesses[n] = each
        guesses[:] = self._that_pay(guesses, self._runner.draft_tokens - len(requests))
        for n, each in zip(asked, made, strict=True):
            confidence = requests[n].confidence
            if each and not guesses[n] and confidence is not None:
                confidence.judge(1, each[0].chance)  # nobody will see whether it would have come true
        return {requests[n] for n in asked}

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
            if chunk.by_model and chunk.draft and chunk.request.confidence is not None:
                chunk.request.confidence.judge(len(chunk.draft), accepted[chunk.request])

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
