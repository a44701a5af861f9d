"""From the thread that puts to the one reader: order, waking, and nothing lost, whoever leaves when."""

import asyncio
import queue
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.channel import Channel, ChannelReply

ITEMS = 5000


def in_a_thread(put, *items, after_s=0.0):
    """Put these items from another thread, and return it."""

    def put_all():
        time.sleep(after_s)
        for item in items:
            put(item)

    thread = threading.Thread(target=put_all)
    thread.start()
    return thread


async def get(channel):
    """The next item, as an async reader gets it."""
    await channel.wait()
    return channel.get_nowait()


def test_items_arrive_in_the_order_in_which_they_were_put():
    channel = Channel()
    thread = in_a_thread(channel.put, *range(ITEMS))
    assert [channel.get() for _ in range(ITEMS)] == list(range(ITEMS))
    thread.join()
    with pytest.raises(queue.Empty):
        channel.get_nowait()


def test_a_reader_in_a_thread_is_woken():
    channel = Channel()
    thread = in_a_thread(channel.put, "late", after_s=0.05)
    assert channel.get() == "late"
    thread.join()


def test_an_async_reader_is_woken_from_another_thread_while_its_loop_goes_on():
    async def read(channel):
        ticks = 0
        waiting = asyncio.ensure_future(get(channel))
        while not waiting.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return waiting.result(), ticks

    channel = Channel()
    thread = in_a_thread(channel.put, "late", after_s=0.2)
    item, ticks = asyncio.run(read(channel))
    thread.join()
    assert item == "late"
    assert ticks > 2


def test_an_item_that_is_there_already_is_not_waited_for():
    channel = Channel()
    channel.put("early")
    assert asyncio.run(get(channel)) == "early"


def test_no_wake_up_is_lost_between_a_hasty_thread_and_a_reader():
    """An item put between the reader's look at the channel and its waiting would never be read."""
    random_pauses = random.Random(0)

    def put_slowly(item):
        channel.put(item)
        if random_pauses.random() < 0.3:
            time.sleep(random_pauses.choice([0, 0.00001, 0.0001]))

    async def read_all():
        async with asyncio.timeout(60):
            return [await get(channel) for _ in range(ITEMS)]

    channel = Channel()
    thread = in_a_thread(put_slowly, *range(ITEMS))
    assert asyncio.run(read_all()) == list(range(ITEMS))
    thread.join()


def test_several_threads_may_put():
    async def read_all():
        async with asyncio.timeout(60):
            return [await get(channel) for _ in range(3 * ITEMS)]

    channel = Channel()
    threads = [in_a_thread(channel.put, *((name, i) for i in range(ITEMS))) for name in "abc"]
    items = asyncio.run(read_all())
    for thread in threads:
        thread.join()
    for name in "abc":
        assert [i for who, i in items if who == name] == list(range(ITEMS))


def test_a_reader_who_gives_up_waiting_loses_no_item():
    async def give_up_and_come_back(channel):
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await channel.wait()
        thread = in_a_thread(channel.put, "late", after_s=0.05)
        item = await get(channel)
        thread.join()
        return item

    assert asyncio.run(give_up_and_come_back(Channel())) == "late"


def test_items_are_not_lost_to_readers_who_give_up_at_any_moment():
    async def read_impatiently():
        items, patience = [], random.Random(0)
        while len(items) < ITEMS:
            try:
                async with asyncio.timeout(patience.choice([0, 0.0001, 0.001])):
                    await channel.wait()
            except TimeoutError:
                continue
            items.append(channel.get_nowait())
        return items

    channel = Channel()
    thread = in_a_thread(channel.put, *range(ITEMS))
    assert asyncio.run(read_impatiently()) == list(range(ITEMS))
    thread.join()


def test_whoever_puts_does_not_mind_that_the_readers_loop_has_closed():
    channel = Channel()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(channel.wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    channel.put("for nobody")
    assert channel.get() == "for nobody"
    waiting._log_destroy_pending = False  # it is left waiting on purpose
    waiting.get_coro().close()


# ---- A reply over a channel ----


class Letters(ChannelReply):
    """Pieces of text; "" makes nothing certain, None is the end, and an exception is one that failed."""

    def __init__(self, *items):
        self._channel = Channel()
        self._error = None
        for item in items:
            self._channel.put(item)

    @property
    def channel(self):
        return self._channel

    def close(self):
        self.finish_reason = self.finish_reason or "cancelled"
        self._channel.put(None)

    def _read(self, item):
        if isinstance(item, str):
            return item
        self._error = item
        self.finish_reason = self.finish_reason or ("error" if item else "stop")
        return ""

    def _raise_error(self):
        if self._error:
            raise self._error


async def read_async(reply):
    async with reply:
        return [piece async for piece in reply]


@given(st.lists(st.sampled_from(["", "a", "bc"])))
def test_both_kinds_of_reader_get_the_same_text_and_never_an_empty_piece(items):
    pieces = list(Letters(*items, None))
    assert pieces == [item for item in items if item]
    assert asyncio.run(read_async(Letters(*items, None))) == (["".join(items)] if any(items) else [])


def test_an_async_reader_gets_what_is_there_at_once_and_waits_for_the_rest():
    async def read(reply):
        first = await anext(reply)
        thread = in_a_thread(reply.channel.put, "", "c", None, after_s=0.05)
        rest = [piece async for piece in reply]
        thread.join()
        return first, rest, reply.finish_reason

    assert asyncio.run(read(Letters("a", "b"))) == ("ab", ["c"], "stop")


@pytest.mark.parametrize("read", [list, lambda reply: asyncio.run(read_async(reply))], ids=["sync", "async"])
def test_an_error_is_raised_after_the_text_that_came_before(read):
    pieces = []
    with pytest.raises(ValueError, match="broken"):
        read(reply := Letters("a", ValueError("broken")))
    assert reply.finish_reason == "error"
    with pytest.raises(ValueError, match="broken"):
        pieces.extend(iter(reply := Letters("a", ValueError("broken"))))
    assert pieces == ["a"]


def test_close_from_another_thread_wakes_a_reader_and_may_be_called_twice():
    async def read(reply):
        timer = threading.Timer(0.05, reply.close)
        timer.start()
        async with asyncio.timeout(60):
            return await read_async(reply)

    reply, other = Letters("a"), Letters("a")
    assert asyncio.run(read(reply)) == ["a"]
    reply.close()
    assert reply.finish_reason == "cancelled"
    threading.Timer(0.05, other.close).start()
    assert list(other) == ["a"]


def test_leaving_the_context_closes_the_reply():
    with Letters("a", "b") as reply:
        assert next(reply) == "a"
    assert reply.finish_reason == "cancelled"
