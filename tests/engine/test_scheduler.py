"""What the scheduler promises, shown without a model: who runs, who waits, and that nobody starves or is lost."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from llama2_chat.engine.request import Request
from llama2_chat.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from llama2_chat.errors import Busy
from llama2_chat.types import SamplingParams

CONFIG = {
    "num_blocks": 17,
    "block_size": 4,
    "max_batch": 3,
    "longest_chunk": 16,
    "shortest_chunk": 4,
    "queue_limit": 50,
}


class Copies(list):
    """Who copies blocks writes down what it was asked for; the host has no room for any."""

    host_blocks = 0

    def copy_block(self, source, target):
        self.append((source, target))


class Host:
    """Has room for many blocks."""

    host_blocks = 100

    def copy_block(self, source, target):
        pass

    def save_block(self, block, page):
        pass


def scheduler(copies=None, **config):
    return Scheduler(SchedulerConfig(**CONFIG | config), Copies() if copies is None else copies)


def request(ids, limit=8, **params):
    return Request([*ids], SamplingParams(**params), streamer=None, limit=limit, draws=None)


def admitted(scheduler, *prompts, **options):
    requests = [request(ids, **options) for ids in prompts]
    for each in requests:
        scheduler.add(each)
    scheduler.admit()
    return requests


def prefill(scheduler, requests):
    """As the engine does it; the first token of who is complete is chosen, and emitted as id 0."""
    chunks = scheduler.prefill_chunks(requests)
    complete = [chunk.request for chunk in chunks if chunk.is_last]
    scheduler.prefilled(chunks)
    for each in complete:
        each.sampled = each.answer_tokens + 1
        each.ids.append(0)
    return chunks


def decode(scheduler):
    """One step for all who have room; returns who was preempted for it."""
    preempted = []
    for each in scheduler.decoding:
        while each.runs and not scheduler.grow(each):
            preempted.append(scheduler.youngest)
            scheduler.preempt(scheduler.youngest)
    for each in scheduler.decoding:
        each.computed += 1
        each.sampled += 1
        each.ids.append(0)
    return preempted


def test_requests_come_in_by_turns_and_know_their_place():
    s = scheduler()
    requests = admitted(s, *([n] * 3 for n in range(5)))
    assert s.running == requests[:3]
    assert [s.position(each) for each in requests] == [0, 0, 0, 1, 2]
    s.finish(requests[1])
    s.admit()
    assert s.running == [requests[0], requests[2], requests[3]]
    assert len({each.slot for each in s.running}) == 3


def test_a_full_line_refuses_the_next():
    s = scheduler(queue_limit=2)
    for n in range(2):
        s.add(request([n]))
    with pytest.raises(Busy, match="2 waiting"):
        s.add(request([9]))


def test_who_withdraws_leaves_the_others_in_order():
    s = scheduler(max_batch=1)
    requests = admitted(s, [1], [2], [3], [4])
    assert s.withdraw(requests[2])
    assert not s.withdraw(requests[0])  # it runs
    assert [s.position(each) for each in requests] == [0, 1, 0, 2]


def test_a_prompt_that_begins_as_another_did_is_computed_from_there_on():
    copies = Copies()
    s = scheduler(copies)
    (first,) = admitted(s, [1, 2, 3, 4, 5, 6])
    prefill(s, [first])
    s.finish(first)
    (again,) = admitted(s, [1, 2, 3, 4, 5, 9])
    assert (again.computed, again.cached_tokens) == (5, 4)
    assert [target for _, target in copies] == again.blocks.own


def test_what_is_told_of_the_cache_does_not_let_a_stranger_guess_token_by_token():
    s = scheduler()
    (secret,) = admitted(s, [1, 2, 3, 4, 5, 6, 7, 8])
    prefill(s, [secret])
    s.finish(secret)
    told = []
    for guess in ([1, 2, 3, 9], [1, 2, 3, 4, 5, 9, 9], [1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]):
        s.add(each := request(guess))
        s.admit()
        told.append(each.cached_tokens)
        s.finish(each)
    assert told == [0, 4, 4, 8]


def test_a_prompt_that_asks_for_it_is_computed_whole_whatever_the_cache_holds():
    copies = Copies()
    s = scheduler(copies)
    (first,) = admitted(s, [1, 2, 3, 4, 5, 6])
    prefill(s, [first])
    s.finish(first)
    (again,) = admitted(s, [1, 2, 3, 4, 5, 6], cache_prompt=False)
    assert copies == []
    assert (again.computed, again.cached_tokens) == (0, 0)
    available = s.cache.available + len(again.blocks)
    prefill(s, [again])
    s.finish(again)
    assert s.cache.available == available


def test_a_prompt_that_is_being_read_is_not_read_for_another_at_the_same_time():
    s = scheduler()
    first, same, other = admitted(s, [1] * 20, [1] * 20, [2] * 3)
    prefill(s, [first])
    s.admit()
    assert s.running == [first]
    prefill(s, [first])
    s.admit()
    assert s.running == [first, same, other]
    assert same.computed == 19


def test_long_prompts_are_read_in_chunks_and_short_ones_beside_them():
    s = scheduler()
    long, short = admitted(s, [1] * 20, [2] * 3)
    assert [(c.start, c.end, c.is_last) for c in prefill(s, s.prefilling)] == [(0, 16, False)]
    assert [(c.request, c.start, c.end) for c in s.prefill_chunks(s.prefilling)] == [(long, 16, 20), (short, 0, 3)]


def test_while_others_are_answered_a_chunk_takes_a_few_hundredths_of_a_second():
    s = scheduler()
    answered, long = admitted(s, [1] * 3, [2] * 20)
    prefill(s, [answered])
    s.measured(s.prefill_chunks([long]), seconds=0.2)  # 4 tokens, so 20 a second
    assert [c.end - c.start for c in s.prefill_chunks([long])] == [4]  # never fewer than the shortest chunk
    s.measured(s.prefill_chunks([long]), seconds=0.01)  # 400 a second, so 12 in a chunk's time
    assert [c.end - c.start for c in s.prefill_chunks([long])] == [8]  # the shortest, doubled


def test_several_prompts_are_read_for_longer_at_once_but_never_longer_than_four_are():
    s = scheduler(max_batch=7, num_blocks=65, longest_chunk=64)
    answered, *prompts = admitted(s, [1] * 3, *([n] * 20 for n in range(2, 8)))
    prefill(s, [answered])
    s.measured([Chunk(prompts[0], 0, 4)], seconds=0.03)  # as many as a chunk of one prompt may take
    for count, tokens in ((1, 4), (2, 8), (3, 8), (4, 16), (6, 16)):
        assert sum(c.end - c.start for c in s.prefill_chunks(prompts[:count])) == tokens


def test_a_client_alone_is_read_for_half_a_second_and_more_briefly_while_more_of_its_questions_wait():
    s = scheduler(max_batch=2)
    (long,) = admitted(s, [1] * 30)
    s.measured(s.prefill_chunks([long]), seconds=0.8)  # 16 tokens, so 20 a second
    assert [c.end - c.start for c in s.prefill_chunks([long])] == [8]
    admitted(s, [2], [3])
    assert [c.end - c.start for c in s.prefill_chunks([long])] == [4]


def test_when_memory_is_full_the_youngest_goes_back_to_the_head_of_the_line():
    s = scheduler(num_blocks=7)  # six blocks of four tokens
    old, young = admitted(s, [1] * 7, [2] * 3, limit=99)
    prefill(s, s.prefilling)
    last = request([3])
    s.add(last)
    while not (preempted := decode(s)):
        pass
    assert preempted == [young]
    assert (s.position(young), s.position(last), s.preemptions) == (1, 2, 1)
    assert (young.computed, young.sampled, young.runs) == (0, 0, False)
    s.admit()
    assert s.running == [old]  # nobody comes in before somebody has left


def test_out_of_memory_lowers_the_batch_and_then_the_chunk_and_success_brings_them_back():
    s = scheduler()
    first, second = admitted(s, [1] * 16, [2] * 3)
    assert s.shrink_batch() is second
    s.preempt(second)
    assert s.shrink_batch() is None
    assert s.shrink_chunk(first)
    assert [c.end for c in s.prefill_chunks([first])] == [8]
    assert s.shrink_chunk(first)
    assert not s.shrink_chunk(first)
    s.finish(first)
    s.admit()
    (third,) = admitted(s, [3] * 16)
    assert [c.end for c in s.prefill_chunks([third])] == [8]


def test_a_step_that_failed_is_done_again_from_what_was_emitted():
    s = scheduler()
    (one,) = admitted(s, [1] * 6)
    prefill(s, [one])
    decode(s)
    one.computed, one.sampled = one.computed + 1, one.sampled + 1  # a step whose token never came out
    s.rewind([one])
    assert (one.sampled, one.computed) == (0, len(one.ids) - 1)
    assert s.prefilling == [one]


@examples(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),  # tokens of the prompt
            st.integers(1, 30),  # of the answer
            st.integers(0, 2),  # how it begins
            st.sampled_from(["stays", "stays", "leaves", "fails"]),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(16, 40),  # blocks: room for one at least
)
def test_everybody_is_served_in_the_end_and_nothing_is_left_behind(visitors, num_blocks):
    s = scheduler(num_blocks=num_blocks)
    ends = {}
    for prompt_tokens, answer_tokens, first, end in visitors:
        each = request([first] * prompt_tokens, answer_tokens)
        ends[each] = end
        s.add(each)
    finished = []
    for _ in range(20_000):
        if not (s.waiting or s.running):
            break
        s.admit()
        assert s.running, "somebody waits beside an idle machine"
        prefill(s, s.prefilling)
        decode(s)
        held = [block for each in s.running for block in each.blocks.own]
        assert len(held) == len(set(held))
        assert len(s.running) <= CONFIG["max_batch"]
        assert len({each.slot for each in s.running}) == len(s.running)
        for each in [*s.running]:
            assert len(each.blocks) * CONFIG["block_size"] >= each.computed
            if each.answer_tokens >= 1 and ends[each] == "fails":
                s.evict(each)
            elif not (each.answer_tokens >= each.limit or ends[each] == "leaves"):
                continue
            s.finish(each)
            finished.append(each)
    assert len(finished) == len(visitors)
    assert s.kv_tokens == 0
    again = admitted(s, [1], [2], [3])  # every slot is free
    assert sorted(each.slot for each in again) == [0, 1, 2]


# ---- In pieces: an answer depends on its prompt alone, where rounding depends on how many tokens share a step ----


def in_pieces(**config):
    return scheduler(**{"piece_size": 8, "num_blocks": 33} | config)


def test_prompts_are_read_one_at_a_time_in_pieces_that_end_at_the_same_positions():
    s = in_pieces()
    first, second = admitted(s, range(18), range(100, 109))
    found = []
    while s.prefilling:
        found += [(chunk.request, chunk.start, chunk.end) for chunk in prefill(s, s.prefilling)]
    assert found == [(first, 0, 8), (first, 8, 16), (first, 16, 18), (second, 0, 8), (second, 8, 9)]


def test_in_pieces_what_is_cached_is_whole_blocks_that_prompts_filled():
    s = in_pieces()
    (first,) = admitted(s, range(10))
    while s.prefilling:
        prefill(s, s.prefilling)
    for _ in range(5):
        decode(s)
    said = [*first.ids]
    s.finish(first)
    (again,) = admitted(s, [*said, 7])
    # Not the two ids of the prompt's last block, nor the block that the answer filled, nor a part of one that differs.
    assert (again.computed, again.cached_tokens) == (8, 8)
    assert prefill(s, [again])[0].start == 8


def test_in_pieces_nobody_is_preempted_because_each_has_its_memory_from_the_start():
    s = in_pieces(num_blocks=9)  # 32 ids
    requests = admitted(s, *([n] * 5 for n in (1, 2, 3)), limit=8)  # 12 of them must be held, 3 blocks each
    assert s.running == requests[:2]
    while s.prefilling:
        prefill(s, s.prefilling)
    for _ in range(7):
        assert decode(s) == []
    s.finish(requests[0])
    s.admit()
    assert requests[2] in s.running


def test_in_pieces_a_request_alone_has_room_to_its_limit():
    s = in_pieces(num_blocks=5)  # 16 ids
    (only,) = admitted(s, range(6), limit=10)
    prefill(s, [only])
    for _ in range(9):
        assert decode(s) == []
    assert len(only.ids) == 16


def test_in_pieces_a_step_that_failed_shares_nothing_that_decode_steps_computed():
    s = in_pieces()
    (only,) = admitted(s, range(10))
    while s.prefilling:
        prefill(s, s.prefilling)
    for _ in range(5):
        decode(s)
    s.rewind([only])
    assert only.computed == 8


# ---- Shares: whoever asks for little is served beside whoever asks for much ----


def test_a_second_client_is_the_next_however_many_of_the_first_wait():
    s = scheduler()
    first = admitted(s, *([n] * 3 for n in range(9)), client="first")
    s.add(second := request([50], client="second"))
    s.add(third := request([60], client="third"))
    assert s.line == [second, third, *first[3:]]
    assert [s.position(each) for each in (second, third, first[3], first[8])] == [1, 2, 3, 8]


def test_who_runs_already_waits_behind_who_does_not():
    s = scheduler()
    first, second, also_first = [request([n], client=client) for n, client in enumerate(["a", "b", "a"])]
    third = request([9], client="c")
    for each in (first, second):
        s.add(each)
    s.admit()
    for each in (also_first, third):
        s.add(each)
    assert s.line == [third, also_first]


def test_a_client_with_all_slots_makes_room_for_another_until_both_have_as_many():
    s = scheduler()
    hogs = admitted(s, *([n] * 3 for n in range(9)), client="first")
    assert s.in_the_way is None  # all are the same client's
    s.add(second := request([50], client="second"))
    s.admit()
    assert s.in_the_way is hogs[2]
    s.preempt(hogs[2], memory_full=False)
    s.admit()
    assert s.running == [*hogs[:2], second]
    assert s.position(hogs[2]) == 1
    s.add(request([60], client="second"))
    s.admit()
    assert s.in_the_way is None  # the first client would have fewer


def test_a_client_with_all_memory_makes_room_for_another():
    s = scheduler(num_blocks=9)
    hogs = admitted(s, [1] * 11, [2] * 11, client="first")
    assert s.running == hogs
    s.add(second := request([50] * 7, client="second"))
    s.admit()
    s.preempt(s.in_the_way, memory_full=False)
    s.admit()
    assert s.running == [hogs[0], second]


def test_where_blocks_leave_for_the_host_first_one_comes_in_at_a_time():
    """Of 32 users, those who had their first token waited for the second until blocks for all others were copied."""
    s = scheduler(Host(), max_batch=9, num_blocks=33)
    for n in range(8):  # all blocks keep something
        admitted(s, [n] * 15)
        prefill(s, s.running)
        s.finish(s.running[0])
    wanted = admitted(s, *([10 + n] * 7 for n in range(6)), client="first")
    other = admitted(s, [20] * 7, client="second")[0]
    assert s.running == [wanted[0], other]
    assert s.in_the_way is None
    for count in range(3, 8):
        s.admit()
        assert len(s.running) == count


def test_when_memory_is_full_whoever_has_most_gives_some_of_it_back():
    s = scheduler()
    first = admitted(s, [1] * 3, [2] * 3, client="first")
    s.add(second := request([3] * 3, client="second"))
    s.admit()
    assert s.running == [*first, second]
    assert s.youngest is first[1]


def test_in_pieces_nobody_makes_room():
    s = in_pieces()
    admitted(s, [1], [2], [3], [4], client="first")
    s.add(request([50], client="second"))
    s.admit()
    assert s.in_the_way is None


def test_a_full_line_has_a_place_for_whoever_has_fewest_in_it():
    s = scheduler(queue_limit=3)
    first = [request([n], client="first") for n in range(3)]
    for each in first:
        s.add(each)
    assert s.add(second := request([50], client="second")) is first[2]
    assert s.line == [first[0], second, first[1]]
    for client in ("first", "second"):
        with pytest.raises(Busy, match="3 waiting"):
            s.add(request([9], client=client))


def test_a_chunk_is_shared_by_clients_and_not_by_prompts():
    s = scheduler(max_batch=4, num_blocks=65)
    first = admitted(s, [1] * 40, [2] * 40, [3] * 40, client="first")
    s.add(second := request([4] * 6, client="second"))
    s.admit()
    s.measured(s.prefill_chunks([first[0]]), seconds=0.0075)  # 4 tokens, so 16 in a chunk's time
    assert [(c.request, c.end) for c in prefill(s, s.prefilling)] == [(first[0], 10), (second, 6)]


def test_of_a_chunk_the_client_who_needs_least_has_three_quarters():
    s = scheduler(num_blocks=65)
    first = admitted(s, [1] * 40, [2] * 40, client="first")
    s.add(second := request([4] * 30, client="second"))
    s.admit()
    s.measured(s.prefill_chunks([first[0]]), seconds=0.0075)  # 4 tokens, so 16 in a chunk's time
    assert [(c.request, c.end) for c in prefill(s, s.prefilling)] == [(first[0], 4), (second, 12)]


def test_in_pieces_clients_are_read_by_turns():
    s = in_pieces()
    first = admitted(s, range(20), range(30, 50), client="first")
    s.add(second := request(range(60, 70), client="second"))
    s.admit()
    found = [prefill(s, s.prefilling)[0].request for _ in range(5)]
    assert found == [first[0], second, first[0], second, first[0]]


@examples(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.sampled_from("abc")), min_size=1, max_size=30),
    st.integers(16, 40),
    st.sampled_from([None, 8]),
)
def test_with_shares_everybody_is_served_in_the_end_too(visitors, num_blocks, piece_size):
    s = scheduler(num_blocks=num_blocks, piece_size=piece_size)
    for prompt_tokens, answer_tokens, client in visitors:
        s.add(request([ord(client)] * prompt_tokens, answer_tokens, client=client))
    finished = 0
    for _ in range(20_000):
        if not (s.waiting or s.running):
            break
        s.admit()
        while (in_the_way := s.in_the_way) is not None:
            s.preempt(in_the_way, memory_full=False)
            s.admit()
        assert s.running
        if s.prefilling:
            prefill(s, s.prefilling)
        decode(s)
        for each in [each for each in s.running if each.answer_tokens >= each.limit]:
            s.finish(each)
            finished += 1
    assert finished == len(visitors)
    assert s.kv_tokens == 0


def test_a_guess_takes_no_block_that_another_may_need_next():
    s = scheduler(num_blocks=6)
    first, second = admitted(s, [1, 2, 3], [4, 5, 6])  # a block each, three are left
    prefill(s, [first, second])
    assert s.grow(first, guesses=1)
    assert (len(first.blocks), s.cache.available) == (2, 2)
    assert not s.grow(first, guesses=6)
    assert s.grow(second, guesses=0)
    assert (len(first.blocks), len(second.blocks)) == (2, 1)


def test_whose_guesses_cannot_be_computed_is_read_again_from_its_last_whole_block():
    s = scheduler()
    (one,) = admitted(s, [1, 2, 3, 4, 5, 6])
    prefill(s, [one])
    assert s.grow(one, guesses=4)
    assert s.unread(one) == one.blocks.blocks[1:]
    assert (one.computed, s.prefilling) == (4, [one])
    assert [chunk.ids for chunk in s.prefill_chunks([one])] == [[5, 6, 0]]
