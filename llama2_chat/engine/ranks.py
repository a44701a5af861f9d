"""One model over several processes, its ranks, each with a part of every layer: what the first computes, all compute.

The first rank has the engine, the scheduler and the sampler. Each call that computes something goes to the others
first, as a Call, and they make the same call on their own parts: the model's products are summed on the way
(kernels/rank_sum.py). What was sampled is handed on from device to device. Whoever starts the processes is in the room
parallel/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from llama2_chat.engine.model_runner import ModelRunner, TokensInFlight
from llama2_chat.engine.prefix_cache import BlockTable
from llama2_chat.engine.request import Request
from llama2_chat.engine.runner import Masks
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.self_check import check_request
from llama2_chat.engine.step_ways import ModelStep, Outcome
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.rank_sum import SummedLinear, together
from llama2_chat.text import is_out_of_memory

FAILED = "A step failed that several processes compute together."
# It ends them all, and so does not say what a memory says that has run out: nothing is to be tried again.
NO_MEMORY = f"{FAILED} No memory is left for it on one of the GPUs; KV_HEADROOM_GB leaves more, and so does COMPILE=0."


class RankLost(RuntimeError):
    """A process of this model has ended, or failed where the others did not: no step can be computed any more."""


def _lost(error: BaseException) -> RankLost:
    return RankLost(NO_MEMORY if is_out_of_memory(error) else FAILED)


class Call(NamedTuple):
    """A method of FollowingRunner, and what it is given."""

    method: str
    arguments: tuple[Any, ...] = ()


class Others(Protocol):
    """The ranks behind the first, as it sees them. Safe from any thread."""

    @property
    def lost(self) -> bool: ...  # whether one has ended

    def call(self, call: Call) -> None:
        """Let each of them make this call, after those before it. Raises RankLost if one has ended."""

    def answers(self) -> list[Any]:
        """What each of them returned from the latest call that returns something. Raises RankLost."""

    def watch(self, compiled: Callable[[], None]) -> None:
        """compiled(): called whenever one of them has compiled a step."""

    @property
    def compiled(self) -> int: ...  # steps that each of them has compiled since the start


class First(Protocol):
    """The first rank, as the others see it."""

    def next(self) -> Call: ...
    def answer(self, value: Any) -> None: ...
    def compiled(self) -> None: ...


class Room(NamedTuple):
    """For keys and values, in a rank: blocks of its pool, block 0 included, and pages of the host."""

    blocks: int
    host_blocks: int


class Told(NamedTuple):
    """Where a request stands. Of its blocks, those that the others do not know yet."""

    slot: int
    known: int  # blocks; 0: another request has the slot now
    blocks: list[int]
    computed: int


class ToldChunk(NamedTuple):
    told: Told
    start: int
    end: int
    ids: list[int]
    is_last: bool


def sum_products(model: PreTrainedModel) -> None:
    """Let a rank's part of a Llama sum over all ranks what attention and MLP give."""
    for layer in model.model.layers:
        layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj)
        layer.mlp.down_proj = SummedLinear(layer.mlp.down_proj)


class LeadingRunner(ModelRunner):
    """The first rank's runner: a Runner that lets the others compute along."""

    _others: Others

    def lead(self, others: Others, room: Sequence[Room]) -> None:
        """Begin. room: of each of the others."""
        self._others = others
        self._tables: dict[int, tuple[BlockTable, int]] = {}  # what the others know of each slot
        self._failed = False
        self._recorded = 0
        self.draft_tokens = self._most_draft_tokens = 0
        self._drafts_later = False
        self.num_blocks = min(self.num_blocks, *(each.blocks for each in room))
        self._room = room
        self.context_length = min(self.context_length, (self.num_blocks - 1) * self.block_size)

    @property
    def host_blocks(self) -> int:
        return min(super().host_blocks, *(each.host_blocks for each in self._room))

    def _mirror(self, compute: Callable[[], Any], method: str, *arguments: Any) -> Any:
        """Compute something that all compute. If it fails here, the others wait for what never comes: all is lost."""
        if self._failed:
            raise RankLost("A step of this model failed")
        self._others.call(Call(method, arguments))
        try:
            with together():
                return compute()
        except BaseException as error:
            self._failed = True
            raise _lost(error) from error

    # ---- A step ----

    def prefill(self, chunks: Sequence[Chunk]) -> ModelStep:
        telling = any(chunk.request.params.prompt_logprobs for chunk in chunks)
        told = [
            ToldChunk(self._tell_where(chunk.request), chunk.start, chunk.end, chunk.ids, chunk.is_last)
            for chunk in chunks
        ]
        return self._mirror(lambda: super(LeadingRunner, self).prefill(chunks), "follow_prefill", told, telling)

    def decode(self, requests: Sequence[Request]) -> ModelStep:
        told = [self._tell_where(request) for request in requests]
        return self._mirror(lambda: super(LeadingRunner, self).decode(requests), "follow_decode", told)

    def sample(self, step: ModelStep, masks: Masks | None) -> TokensInFlight:
        tokens = super().sample(step, masks)
        self._mirror(self._hand_on, "follow_sample")
        return tokens

    def _hand_on(self) -> None:
        dist.broadcast(self.sampler.newest, 0)

    def _tell_where(self, request: Request) -> Told:
        slot, table, length = request.slot, request.blocks, len(request.blocks)
        bound, known = self._tables.get(slot, (None, 0))
        if bound is not table:
            known = 0
        self._tables[slot] = (table, length)
        return Told(slot, known, table.blocks[known:] if length > known else [], request.computed)

    # ---- Between steps ----

    def start(self, wake: Callable[[], None]) -> None:
        self._others.watch(wake)
        self._others.call(Call("follow_start"))
        super().start(wake)

    @property
    def maintenance_due(self) -> bool:
        return super().maintenance_due and self._others.compiled > self._recorded

    def maintain(self) -> None:
        """Record a step once all have compiled it, or have failed to."""
        if self.maintenance_due:
            self._recorded += 1
            self._mirror(super().maintain, "follow_maintain")
            if any(recorded != self.recorded for recorded in self._others.answers()):
                self._failed = True
                raise RankLost("A step was recorded by some processes of this model and not by others")

    def _agree(self, outcome: Outcome) -> Outcome:
        worst = max(outcome, *self._others.answers())
        self._others.call(Call("agreed", (worst,)))
        return worst

    def is_alive(self) -> bool:
        return not (self._failed or self._others.lost) and super().is_alive()

    def copy_block(self, source: int, target: int) -> None:
        self._mirror(lambda: super(LeadingRunner, self).copy_block(source, target), "copy_block", source, target)

    def save_block(self, block: int, page: int) -> None:
        self._mirror(lambda: super(LeadingRunner, self).save_block(block, page), "save_block", block, page)

    def restore_block(self, page: int, block: int) -> None:
        self._mirror(lambda: super(LeadingRunner, self).restore_block(page, block), "restore_block", page, block)

    def zero_blocks(self, blocks: list[int] | slice) -> None:
        self._mirror(lambda: super(LeadingRunner, self).zero_blocks(blocks), "zero_blocks", blocks)

    def self_check(self, requests: Sequence[Request]) -> bool:
        told = [(self._tell_where(request), len(request.ids)) for request in requests]
        try:
            return self._mirror(lambda: super(LeadingRunner, self).self_check(requests), "follow_self_check", told)
        except RankLost as lost:
            raise lost.__cause__ or lost from None  # whoever loads the model has a sentence for it


@dataclass(frozen=True)
class _FollowedChunk(Chunk):
    """A chunk whose ids are known, and no others of its request."""

    known: list[int] = field(default_factory=list)
    last: bool = False

    @property
    def ids(self) -> list[int]:
        return self.known

    @property
    def is_last(self) -> bool:
        return self.last

    def part(self, start: int, end: int) -> Chunk:
        known = self.known[start - self.start : end - self.start]
        return replace(self, start=start, end=end, known=known, last=self.last and end == self.end)


class FollowingRunner(ModelRunner):
    """The runner of any other rank. It knows where requests stand, and nothing that they say but their ids."""

    @property
    def room(self) -> Room:
        if self._host:
            self._host.wait_for_pages()
        return Room(self.num_blocks, self.host_blocks)

    @torch.inference_mode()
    def follow(self, first: First) -> None:
        """Make the calls that the first rank makes, until it ends. Raises RankLost where that cannot go on."""
        self._first = first
        self._requests: dict[int, Request] = {}  # by slot
        self.enter_thread()
        with together():
            while True:
                call = first.next()
                try:
                    getattr(self, call.method)(*call.arguments)
                except Exception as error:
                    raise _lost(error) from error

    def follow_prefill(self, told: Sequence[ToldChunk], telling: bool) -> None:
        chunks = [
            _FollowedChunk(self._request(chunk.told), chunk.start, chunk.end, chunk.ids, chunk.is_last)
            for chunk in told
        ]
        self._settle(chunks)
        for chunk in chunks:
            while self.are_arriving(chunk.request.blocks.blocks):  # which the first rank has waited for, there
                self.wait_for_block()
        if telling:
            self._eager.prefill(chunks, everywhere=True)
        else:
            self._prefill(chunks)

    def follow_decode(self, told: Sequence[Told]) -> None:
        self.decode([self._request(each) for each in told])

    def follow_sample(self) -> None:
        dist.broadcast(self.sampler.newest, 0)

    def follow_start(self) -> None:
        self.start(self._first.compiled)

    def follow_maintain(self) -> None:
        self.maintain()
        self._first.answer(self.recorded)

    def _agree(self, outcome: Outcome) -> Outcome:
        self._first.answer(outcome)
        (worst,) = self._first.next().arguments
        return worst

    def follow_self_check(self, told: Sequence[tuple[Told, int]]) -> None:
        requests = []
        for where, length in told:
            request = self._request(where)
            request.ids = check_request(length, self.vocab_size).ids
            requests.append(request)
        with suppress(ModelUnavailable):  # the first rank has found the same, and says it
            self.self_check(requests)

    def _request(self, told: Told) -> Request:
        if told.known == 0:
            self._requests[told.slot] = check_request(1, self.vocab_size)
        request = self._requests[told.slot]
        request.slot, request.computed = told.slot, told.computed
        request.blocks.own += told.blocks
        return request
