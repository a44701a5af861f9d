"""What the prefix cache promises: no block is lost or handed out twice, and a match holds just the ids it claims."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama2_chat.engine.prefix_cache import PrefixCache

SIZE = 4  # tokens of a block


def filled(cache, ids):
    """The table of a request whose ids have all been computed."""
    match = cache.match(ids)
    cache.recall(match)
    table = match.table
    while len(table) * SIZE < len(ids):
        table.own.append(cache.allocate())
    return table


def keep(cache, ids):
    cache.release(filled(cache, ids), ids)


def test_a_conversation_that_goes_on_finds_its_full_blocks_and_the_one_to_copy_from():
    cache = PrefixCache(10, SIZE)
    keep(cache, [1, 2, 3, 4, 5, 6])
    table, nearest, common, _ = cache.match([1, 2, 3, 4, 5, 6, 7])
    assert (table.blocks, nearest.block, common) == ([1], 2, 2)


def test_the_last_id_is_always_left_to_compute():
    cache = PrefixCache(10, SIZE)
    keep(cache, [1, 2, 3, 4])
    table, nearest, common, _ = cache.match([1, 2, 3, 4])
    assert (len(table), nearest.block, common) == (0, 1, 3)


def test_what_nobody_reads_is_evicted_the_longest_unused_first():
    cache = PrefixCache(4, SIZE)
    for first in (10, 20, 30):
        keep(cache, [first] * SIZE)
    keep(cache, [10] * SIZE)  # used again
    keep(cache, [40] * SIZE)  # takes the block of 20
    assert cache.match([20] * (SIZE + 1)).common == 0
    assert [len(cache.match([first] * (SIZE + 1)).table) for first in (10, 20, 30, 40)] == [1, 0, 1, 1]


def test_a_block_that_somebody_reads_is_never_evicted():
    cache = PrefixCache(3, SIZE)
    keep(cache, [1] * SIZE)
    table = cache.match([1] * SIZE + [2]).table
    assert cache.allocate() == 2
    assert cache.allocate() is None
    cache.release(table, [])
    assert cache.allocate() == 1


def test_what_a_failed_request_has_written_is_found_by_nobody():
    cache = PrefixCache(10, SIZE)
    ids = [1, 2, 3, 4, 5]
    table = filled(cache, ids)
    cache.insert(table, ids)
    assert sorted(cache.evict(table)) == [1, 2]
    assert cache.match([*ids, 6]).common == 0
    assert cache.available == 9


def test_a_block_that_grew_by_a_turn_takes_the_place_of_the_shorter_one():
    cache = PrefixCache(10, SIZE)
    keep(cache, [1, 2])
    keep(cache, [1, 2, 3])
    assert cache.match([1, 2, 3, 9]).common == 3
    assert cache.available == 9


class Pages:
    """A host with so many pages, and what blocks and pages hold: the ids that lead to it and into it."""

    def __init__(self, host_blocks):
        self.host_blocks, self.blocks, self.pages, self.restored = host_blocks, {}, {}, 0

    def save_block(self, block, page):
        assert len(self.blocks[block]) % SIZE == 0
        self.pages[page] = self.blocks[block]

    def restore_block(self, page, block):
        self.blocks[block] = self.pages[page]
        self.restored += 1


def keep_in(pages, cache, ids):
    table = filled(cache, ids)
    for index, block in enumerate(table.blocks):
        pages.blocks[block] = ids[: (index + 1) * SIZE]
    cache.release(table, ids)


def test_a_conversation_that_made_room_comes_back_from_the_host():
    pages = Pages(10)
    cache = PrefixCache(4, SIZE, pages)
    first = [1, 2, 3, 4, 5, 6, 7, 8]
    keep_in(pages, cache, first)
    keep_in(pages, cache, [9] * 3 * SIZE)  # takes all blocks
    assert cache.host_blocks == 2
    match = cache.match([*first, 9])
    assert (len(match.table), [node.page is not None for node in match.away]) == (0, [True, True])
    cache.recall(match)
    assert [pages.blocks[block] for block in match.table.blocks] == [first[:4], first]
    assert (pages.restored, cache.host_blocks) == (2, 2)  # for them two others went


def test_pages_that_come_later_are_used_from_then_on():
    pages = Pages(0)
    cache = PrefixCache(3, SIZE, pages)
    for first in (10, 20, 30):
        keep_in(pages, cache, [first] * SIZE)
    assert cache.host_blocks == 0
    pages.host_blocks = 2
    for first in (40, 50, 60, 70):
        keep_in(pages, cache, [first] * SIZE)
    assert [len(cache.match([first] * (SIZE + 1)).away) for first in (10, 20, 30, 40, 50)] == [0, 0, 0, 1, 1]


def test_the_host_forgets_what_is_unused_for_longest():
    pages = Pages(2)
    cache = PrefixCache(3, SIZE, pages)
    for first in (10, 20, 30, 40, 50):
        keep_in(pages, cache, [first] * SIZE)
    assert [len(cache.match([first] * (SIZE + 1)).away) for first in (10, 20, 30)] == [0, 1, 1]


def test_what_the_host_has_behind_a_failed_block_goes_with_it():
    # Whoever wrote what is in the block, it may be in all that was computed after it.
    pages = Pages(10)
    cache = PrefixCache(10, SIZE, pages)
    keep_in(pages, cache, [1, 2, 3, 4, 5, 6, 7, 8])
    table = cache.match([1, 2, 3, 4, 9]).table
    blocks = [cache.allocate() for _ in range(8)]  # the second half has left
    assert cache.host_blocks == 1
    assert sorted(cache.evict(table)) == [1]
    assert (cache.host_blocks, blocks.count(None)) == (0, 0)
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8, 9])[1:] == (None, 0, [])


def test_a_block_that_is_computed_again_needs_no_copy():
    pages = Pages(10)
    cache = PrefixCache(4, SIZE, pages)
    keep_in(pages, cache, [1] * SIZE)
    keep_in(pages, cache, [9] * 3 * SIZE)
    assert cache.host_blocks == 1
    table = cache.match([]).table  # as one who does not read the cache
    table.own.append(cache.allocate())
    pages.blocks[table.own[0]] = [1] * SIZE
    cache.release(table, [1] * SIZE)
    assert len(cache.match([1] * (SIZE + 1)).table) == 1
    assert (pages.restored, cache.host_blocks) == (0, 1)  # the last of the nines, which made room


def test_some_blocks_are_free_before_somebody_needs_them():
    pages = Pages(100)
    cache = PrefixCache(65, SIZE, pages)
    for first in range(64):
        keep_in(pages, cache, [first] * SIZE)
        cache.spare()
    saved = cache.host_blocks
    for _ in range(4):
        cache.allocate()
    assert saved == cache.host_blocks == 4


def test_what_the_host_has_just_been_given_is_handed_out_last():
    pages = Pages(100)
    cache = PrefixCache(65, SIZE, pages)
    for first in range(64):
        keep_in(pages, cache, [first] * SIZE)
    cache.spare()
    first = cache.allocate()
    cache.spare()  # a block of the next conversation, which is still being copied
    assert [first, *(cache.allocate() for _ in range(4))] == [1, 2, 3, 4, 5]


IDS = st.lists(st.integers(0, 1), min_size=1, max_size=3 * SIZE)  # so few that many begin alike


class Visitors(RuleBasedStateMachine):
    """Requests that come, are computed bit by bit, and end well or badly, against a plain list of what blocks hold."""

    @initialize(host_blocks=st.sampled_from([0, 1, 5, 50]))
    def begin(self, host_blocks):
        self.pages = Pages(host_blocks)
        self.cache = PrefixCache(9, SIZE, self.pages)
        self.written = self.pages.blocks
        self.running = []  # (table, ids)

    def write(self, table, ids):
        for index, block in enumerate(table.blocks):
            if ids[index * SIZE :]:
                self.written[block] = ids[: (index + 1) * SIZE]

    @rule(ids=IDS)
    def come(self, ids):
        match = self.cache.match(ids)
        table, nearest, common, away = match
        start = len(table) * SIZE
        if nearest:
            assert self.written[nearest.block][: start + common] == ids[: start + common]
        assert start + common + len(away) * SIZE < len(ids)
        if len(away) > self.cache.available:
            self.cache.release(table, [])
            return
        self.cache.recall(match)
        assert len(table) * SIZE == start + len(away) * SIZE
        for index, block in enumerate(table.blocks):
            assert self.written[block] == ids[: (index + 1) * SIZE]
        while len(table) * SIZE < len(ids):
            block = self.cache.allocate()
            if block is None:
                self.cache.release(table, ids[: len(table.shared) * SIZE])
                return
            table.own.append(block)
        self.write(table, ids)
        self.running.append((table, ids))

    @rule()
    def spare(self):
        self.cache.spare()

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def share(self, which):
        self.cache.insert(*self.running[which % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), computed=st.integers(0, 3 * SIZE))
    def end(self, which, computed):
        table, ids = self.running.pop(which % len(self.running))
        self.cache.release(table, ids[: max(computed, len(table.shared) * SIZE)])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def fail(self, which):
        table, _ = self.running.pop(which % len(self.running))
        for block in self.cache.evict(table):
            self.written.pop(block, None)

    @invariant()
    def every_block_is_in_one_place(self):
        own = [block for table, _ in self.running for block in table.own]
        assert len(own) == len(set(own))
        shared = {node.block for table, _ in self.running for node in table.shared}
        assert not shared & set(own)
        assert self.cache.available == 8 - len(own) - len(shared)

    @invariant()
    def every_page_is_in_one_place(self):
        away = [*self.cache._away]
        assert sorted([*self.cache._free_pages, *(node.page for node in away)]) == [*range(self.pages.host_blocks)]
        assert not (away and away[0].away)


TestVisitors = Visitors.TestCase


@given(st.lists(IDS, max_size=20))
def test_all_blocks_come_back(conversations):
    cache = PrefixCache(9, SIZE)
    for ids in conversations:
        keep(cache, ids)
    assert cache.available == 8
    assert sorted(cache.allocate() for _ in range(8)) == [*range(1, 9)]
