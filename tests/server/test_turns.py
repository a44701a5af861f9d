"""Turns of server/limits.py: one after another for each client."""

import asyncio

import pytest

from llama2_chat.errors import Busy
from llama2_chat.server.limits import Turns


def test_many_of_one_client_keep_nobody_else_waiting():
    async def play():
        turns, order = Turns(most=3), []

        async def take(client):
            async with turns.turn(client):
                order.append(client)
                await asyncio.sleep(0)

        async with turns.turn("guesser"):
            waiting = [asyncio.create_task(take("guesser")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Busy, match="Too many attempts"):
                await take("guesser")
            await take("visitor")
            assert order == ["visitor"]
        await asyncio.gather(*waiting)
        assert order == ["visitor", "guesser", "guesser"]

    asyncio.run(play())
