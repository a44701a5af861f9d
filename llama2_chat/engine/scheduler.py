"""Who runs: the waiting queue, admission, preemption, and how much of a prompt one step may read.

Lists and numbers only. Nothing here knows tensors, threads or time: the engine calls it under its lock where the
waiting queue is concerned, tells it how long a step took, and carries out what it decides.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llama2_chat.engine.prefix_cache import Host, PrefixCache
from llama2_chat.engine.request import NO_SLOT, Request
from llama2_chat.errors import Busy

# While others are being answered or read a chunk takes about so long, and a step of theirs comes on top: it is the gap
# in their text, or their wait. On a GPU the shortest chunk costs about as little a token as longer ones do.
CHUNK_S = 0.03
# Several prompts take as long each, up to so many: with short chunks all who are not yet read would wait for a step of
# the few who are answered behind each.
PROMPTS_AT_ONCE = 4
ALONE_S = 0.5  # of a client who is alone: Stop, and whoever comes next, wait no longer
RESERVED_BLOCKS = 2  # left for each running request to grow into when another comes in


@dataclass(frozen=True)
class SchedulerConfig:
    num_blocks: int  # of the KV pool; block 0 is padding
    block_size: int  # tokens
    max_batch: int  # requests that run at once
    longest_chunk: int  # tokens of prompts per step
    shortest_chunk: int  # below, the weights are read for too few tokens; the others are this one doubled
    queue_limit: int  # requests that may wait
    # Tokens, a multiple of block_size: prompts are read one at a time, in pieces that end at its multiples, and other
    # requests find only keys and values that were computed so. None: in chunks of any length, of several at once.
    piece_size: int | None = None


@dataclass(frozen=True)
class Chunk:
    """The part of a request's ids that one step reads."""

    request: Request
    start: int
    end: int

    @property
    def ids(self) -> list[int]:
        return self.request.ids[self.start : self.end]

    @property
    def is_last(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.end == len(self.request.ids)

    def part(self, start: int, end: int) -> Chunk:
        """So much of it, as places among the request's ids."""
        return replace(self, start=start, end=end)


@dataclass(frozen=True)
class DraftChunk(Chunk):
    """The newest id of an answer, and guesses at those that come next: of all of them one step computes the logits."""

    draft: list[int]
    by_model: bool  # whether a model made it

    @classmethod
    def of(cls, request: Request, draft: list[int], by_model: bool) -> DraftChunk:
        return cls(request, request.computed, request.computed + 1 + len(draft), draft, by_model)

    @property
    def ids(self) -> list[int]:
        return [*super().ids, *self.draft]

    def came_true(self, place: int) -> bool:
        """Whether the answer goes on and its newest token, the first since the chunk or a later one, is as guessed."""
        return self.request.runs and self.draft[place : place + 1] == self.request.ids[-1:]


class Blocks(Host, Protocol):
    """Whoever copies blocks, in the order in which it is asked to."""

    def copy_block(self, source: int, target: int) -> None: ...  # source may be handed to somebody else after that


class Scheduler:
    """Requests run as long as there are slots and blocks for them; of those that wait, the next is the first of the
    client who has the fewest running. Alone, a client may have all; whoever comes takes a share from who has most."""

    def __init__(self, config: SchedulerConfig, blocks: Blocks) -> None:
        self.config, self._blocks = config, blocks
        self.waiting: deque[Request] = deque()
        self.preemptions = self.recalled_tokens = 0  # since the start
        self._prefill_tokens_per_s = 0.0  # as last measured
        self.reset()

    def reset(self) -> None:
        """Nobody runs, and all slots and blocks are free; whoever waits goes on waiting."""
        config = self.config
        self.cache = PrefixCache(config.num_blocks, config.block_size, self._blocks)
        self.running: list[Request] = []  # in order of admission
        self._free_slots = list(range(config.max_batch - 1, -1, -1))
        self._memory_full = False  # then nobody comes in before somebody has left, or the youngest would thrash
        self._has_room = True  # for the first in line, though admit() left it there
        self._batch_limit, self._chunk_limit = config.max_batch, config.longest_chunk
        self._readers: list[str] = []  # clients in the order in which their prompts were read, the latest at the end

    @property
    def kv_tokens(self) -> int:
        """Whose keys and values running requests hold, in whole blocks."""
        return (self.config.num_blocks - 1 - self.cache.available) * self.config.block_size

    @property
    def host_tokens(self) -> int:
        """Whose keys and values the host has."""
        return self.cache.host_blocks * self.config.block_size

    # ---- The waiting queue ----

    def add(self, request: Request) -> Request | None:
        """Place a request in the waiting queue. Of a full one, the last of whoever has the most there is returned: it
        waits no longer. Raises Busy where that would be the request itself."""
        refused = None
        if len(self.waiting) >= self.config.queue_limit:
            waiting = _counted(self.waiting)
            refused = _last_of_most(self.waiting)
            if waiting[request.client] + 1 >= waiting[refused.client]:
                raise Busy(f"The line is full ({len(self.waiting)} waiting). Please try again in a minute.")
            self.withdraw(refused)
        self.waiting.append(request)
        return refused

    @property
    def line(self) -> list[Request]:
        """Who waits, in the order in which they come in if nobody leaves: each client's in the order received, and
        the first of one before the second of another."""
        running, places = _counted(self.running), []
        for received, request in enumerate(self.waiting):
            places.append((running[request.client], received, request))
            running[request.client] += 1
        return [request for _, _, request in sorted(places, key=lambda place: place[:2])]

    def position(self, request: Request) -> int:
        """Its place in line, 1 for the next; 0 if it does not wait."""
        return self.line.index(request) + 1 if request in self.waiting else 0

    def withdraw(self, request: Request) -> bool:
        """Take a request out of the waiting queue; False if it does not wait."""
        if request not in self.waiting:
            return False
        if request is self.line[0]:
            self._memory_full = False  # there may be room for the next
        self.waiting.remove(request)
        return True

    # ---- Admission and preemption ----

    def admit(self) -> None:
        """Let requests in, in the order of the line, as long as there are slots, and blocks for their ids.

        Where blocks must be copied to the host before they are handed out, the others come in a turn later: those who
        are being answered would wait until all is copied, and a step reads few prompts at a time anyway.
        """
        self._has_room = False
        if not self.running:
            self._memory_full = False
        while self.waiting and not self._memory_full and len(self.running) < self._batch_limit:
            request = self.line[0]
            if self._is_being_read(request) or not self._find_blocks(request):
                break
            self.waiting.remove(request)
            request.slot = self._free_slots.pop()
            self.running.append(request)
            if self.cache.is_short:
                self._has_room = True
                break

    def _is_being_read(self, request: Request) -> bool:
        """Whether just this prompt is being computed for somebody else, and will be in the cache within a few steps."""
        what = request.adapter, request.ids
        return request.reads_cache and any((other.adapter, other.ids) == what for other in self.prefilling)

    def _find_blocks(self, request: Request) -> bool:
        """Give the request the blocks that begin as it does, and new ones for the rest of its ids and one more."""
        match = self.cache.match(request.ids if request.reads_cache else (), request.adapter)
        table, nearest, common, away = match
        length, growing = len(request.ids), len(self.running)
        if self.config.piece_size:
            # Nobody is preempted: what decode steps computed would be read again in pieces, and rounded otherwise.
            nearest, length, growing = None, request.prompt_tokens + request.limit - 1, 0
        needed = length // self.config.block_size + 1 - len(table)
        if self.running and needed + RESERVED_BLOCKS * growing > self.cache.available:
            self.cache.release(table, [])
            return False
        self.cache.recall(match)
        self.recalled_tokens += len(away) * self.config.block_size
        request.blocks, request.computed = table, len(table) * self.config.block_size
        for _ in range(needed - len(away)):
            block = self.cache.allocate()
            assert block is not None  # alone, a request always has room: submit() has seen to it
            if nearest is not None:  # if just this block was evicted, what it holds is still there
                self._blocks.copy_block(nearest.block, block)
                request.computed += common
                nearest = None
            table.own.append(block)
        if not request.answer_tokens:
            # Whole blocks only: what others said is in the cache too, and could be guessed token by token.
            request.cached_tokens = len(table.shared) * self.config.block_size
        return True

    def grow(self, request: Request, guesses: int = 0) -> bool:
        """Whether there are blocks for one more token of a running request, and so many guesses at what comes next.

        If there is none for the token, somebody must be preempted; for guesses nobody is, and each keeps room to grow.
        """
        needed = (request.computed + guesses) // self.config.block_size + 1 - len(request.blocks)
        if needed <= 0:
            return True
        if self.cache.available < needed + (len(self.running) if guesses else 0):
            return False
        for _ in range(needed):
            block = self.cache.allocate()
            assert block is not None  # as many are available
            request.blocks.own.append(block)
        return True

    @property
    def youngest(self) -> Request:
        """The running request that is preempted first: of whoever has the most."""
        return _last_of_most(self.running)

    @property
    def in_the_way(self) -> Request | None:
        """The running request that must be preempted for the first in line, now that admit() has found no room for it:
        its client would still have as many as the other."""
        if not self.waiting or not self.running or self._has_room or self.config.piece_size:
            return None  # in pieces nobody is preempted, see _find_blocks()
        first, running = self.line[0], _counted(self.running)
        fair = running[first.client] + 1 < running[self.youngest.client] and not self._is_being_read(first)
        return self.youngest if fair else None

    def preempt(self, request: Request, *, memory_full: bool = True) -> None:
        """Back to the head of its client's part of the line with all its text: it goes on where it was once there is
        room."""
        self._release(request)
        self.preemptions += 1
        self._memory_full = memory_full
        self.waiting.appendleft(request)

    def finish(self, request: Request) -> None:
        """Take the slot and blocks of a running request that has ended; what the blocks hold stays in the cache."""
        self._release(request)
        # What shrink_batch() and shrink_chunk() took comes back little by little.
        self._batch_limit = min(self._batch_limit + 1, self.config.max_batch)
        self._chunk_limit = min(self._chunk_limit * 2, self.config.longest_chunk)

    def evict(self, request: Request) -> list[int]:
        """Forget what a running request has written. Returns the blocks that must be zeroed."""
        return self.cache.evict(request.blocks)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self._memory_full = False
        self.cache.release(request.blocks, request.ids[: self._shareable(request)])
        self._free_slots.append(request.slot)
        request.slot, request.computed, request.sampled = NO_SLOT, 0, 0

    def _shareable(self, request: Request) -> int:
        """For how many of its ids others may use the keys and values."""
        if not self.config.piece_size:
            return request.computed
        read = min(request.computed, request.prompt_tokens)  # decode steps computed the others
        return read - read % self.config.block_size

    # ---- What a step reads ----

    @property
    def prefilling(self) -> list[Request]:
        return [request for request in self.running if not request.sampled]

    @property
    def decoding(self) -> list[Request]:
        return [request for request in self.running if request.sampled]

    def prefill_chunks(self, requests: Sequence[Request]) -> list[Chunk]:
        """The next ids of these requests, each client's in order, as many as one step may read."""
        if piece := self.config.piece_size:
            request = min(requests, key=self._last_read)
            start, length = request.computed, len(request.ids)
            return [Chunk(request, start, min(length, start - start % piece + piece))]
        room, chunks = self._shares(requests), []
        for request in requests:
            end = min(len(request.ids), request.computed + room[request.client])
            if end > request.computed:
                chunks.append(Chunk(request, request.computed, end))
                room[request.client] -= end - request.computed
        return chunks

    def _last_read(self, request: Request) -> int:
        """Greater than that of whoever's client was read before its own was."""
        return self._readers.index(request.client) if request.client in self._readers else -1

    def _shares(self, requests: Sequence[Request]) -> dict[str, int]:
        """Tokens of one step for each client: three quarters of what is left for whoever needs least, who would
        wait long beside the long prompts of others, and the rest for these."""
        unread: Counter[str] = Counter()
        for request in requests:
            unread[request.client] += len(request.ids) - request.computed
        room, shares = self._chunk_tokens(len(requests)), {}
        for served, (client, tokens) in enumerate(sorted(unread.items(), key=lambda each: each[1]), 1):
            shares[client] = min(tokens, room if served == len(unread) else room * 3 // 4)
            room -= shares[client]
        return shares

    def _chunk_tokens(self, prompts: int) -> int:
        alone = not self.decoding and len(_counted(self.running)) < 2
        if alone and not self._prefill_tokens_per_s:
            return self._chunk_limit
        together = CHUNK_S * min(prompts, PROMPTS_AT_ONCE)
        tokens = int(self._prefill_tokens_per_s * (ALONE_S if alone and not self.waiting else together))
        doubled = max(tokens // self.config.shortest_chunk, 1).bit_length() - 1  # as recorded steps are
        return min(self._chunk_limit, self.config.shortest_chunk << doubled)

    def prefilled(self, chunks: Sequence[Chunk]) -> None:
        """The keys and values of these chunks are in their blocks."""
        for chunk in chunks:
            client = chunk.request.client
            self._readers = [*(each for each in self._readers if each != client), client][-self.config.max_batch :]
            chunk.request.computed = chunk.end
            self.cache.insert(chunk.request.blocks, chunk.request.ids[: chunk.end])

    def measured(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """So long did these chunks take; the next ones are as long as CHUNK_S allows."""
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        if tokens >= self.config.shortest_chunk:
            self._prefill_tokens_per_s = tokens / seconds

    # ---- After a step that failed ----

    def rewind(self, requests: Sequence[Request]) -> None:
        """Let requests go on from what was emitted: how far a step that failed has come nobody knows."""
        for request in requests:
            request.computed, request.sampled = min(request.computed, len(request.ids) - 1), 0
            request.computed = self._shareable(request)

    def unread(self, request: Request) -> list[int]:
        """Let a request go on from its last whole block. Returns the blocks after that, which must be zeroed."""
        whole = request.computed // self.config.block_size
        request.computed, request.sampled = whole * self.config.block_size, 0
        return request.blocks.blocks[whole:]

    def shrink_batch(self) -> Request | None:
        """Ask less of the next step: one request fewer may run. Returns whom to preempt; None if one runs at most."""
        if len(self.running) < 2:
            return None
        self._batch_limit = len(self.running) - 1
        return self.youngest

    def shrink_chunk(self, request: Request) -> bool:
        """Ask less of the next step: half as many ids of its prompt. False if they are few already."""
        if min(self._chunk_limit, len(request.ids) - request.computed) <= self.config.shortest_chunk:
            return False
        self._chunk_limit //= 2
        return True


def _counted(requests: Iterable[Request]) -> Counter[str]:
    """How many of them each client has."""
    return Counter(request.client for request in requests)


def _last_of_most(requests: Sequence[Request]) -> Request:
    """The last of whoever has the most of them."""
    clients = _counted(requests)
    most = max(clients.values())
    return next(request for request in reversed(requests) if clients[request.client] == most)
