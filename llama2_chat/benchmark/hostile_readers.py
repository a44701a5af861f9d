"""Readers of a soak who mean harm, each kind from addresses of its own, and how they reach the server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx


LONG = "Print the first 5,000 prime numbers."
SETTINGS = {"maxNewTokens": 1_000, "temperature": 1, "topP": 1, "topK": 0, "repetitionPenalty": 1}
BETWEEN_S = 0.2  # of one reader's attempts: a flood would measure how fast this program is
ODD = ["{", "null", '{"messages": [{}]}', '{"messages": 1e999}', "[" * 10_000, '{"prompt": "\\ud800"}']


@dataclass(frozen=True)
class Target:
    """A server that is soaked. keys: the last one is the hostile readers'."""

    url: str
    pid: int
    password: str
    keys: list[str]

    def key(self, number: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[number]}"}


def client(target: Target, source: str) -> httpx.AsyncClient:
    """One that comes from this address, where a computer has more than one of its own for itself."""
    import httpx

    address = source if sys.platform == "linux" else None
    transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
    return httpx.AsyncClient(base_url=target.url, transport=transport, timeout=600)


def main() -> None:
    """Reads a target, how many readers there are and until when, as time.time() has it; prints what they have tried, by
    kind, and at what the server has failed. Computes when others do not."""
    if os.name == "posix":
        os.nice(10)
    target, readers, over_at = json.load(sys.stdin)
    print(json.dumps(asyncio.run(_harass_together(Target(**target), readers, over_at))))


async def _harass_together(target: Target, readers: int, over_at: float) -> tuple[Counter[str], list[str]]:
    attempts: Counter[str] = Counter()
    failures: list[str] = []
    kinds = itertools.islice(itertools.cycle(KINDS), readers)
    harassing = (_harass(kind, target, number, over_at, attempts, failures) for number, kind in enumerate(kinds))
    await asyncio.gather(*harassing)
    return attempts, failures


async def _harass(
    kind: Kind, target: Target, number: int, over_at: float, attempts: Counter[str], failures: list[str]
) -> None:
    """Again and again as long as it lasts."""
    import httpx

    rng, source = random.Random(number), f"127.2.0.{number + 1}"
    async with client(target, source) as http:
        login = {"username": "hostile", "password": target.password}
        await http.post("/login", data=login)
        while time.time() < over_at:
            status = 0
            with contextlib.suppress(OSError, httpx.HTTPError):  # a timeout is an OSError, too
                async with asyncio.timeout(60):
                    status = await kind(Attack(target, http, rng, source))
            if status >= 500:
                failures.append(f"{kind.__name__}: {status}")
            attempts[kind.__name__.replace("_", " ")] += 1
            await asyncio.sleep(BETWEEN_S)


@dataclass(frozen=True)
class Attack:
    target: Target
    http: httpx.AsyncClient
    rng: random.Random
    source: str

    @property
    def body(self) -> dict[str, object]:
        """A question of the page whose answer is long."""
        return {"messages": [{"role": "user", "content": LONG}], "settings": SETTINGS}

    @property
    def path(self) -> str:
        return f"/page/answers/{secrets.token_hex(16)}"

    @property
    def key(self) -> dict[str, str]:
        return self.target.key(-1)


# What comes of one is the status of the answer, 0 where there is none.
Kind = Callable[[Attack], Awaitable[int]]


async def leaves_the_page(attack: Attack) -> int:
    async with attack.http.stream("PUT", attack.path, json=attack.body) as answer:
        await asyncio.sleep(attack.rng.uniform(0, 2))
        return answer.status_code


async def leaves_the_api(attack: Attack) -> int:
    body = {"messages": attack.body["messages"], "max_tokens": 1_000, "stream": True}
    async with attack.http.stream("POST", "/v1/chat/completions", json=body, headers=attack.key) as answer:
        await asyncio.sleep(attack.rng.uniform(0, 2))
        return answer.status_code


async def never_reads(attack: Attack) -> int:
    body = {"messages": attack.body["messages"], "max_tokens": 1_000, "stream": True}
    await _send(attack, _request("/v1/chat/completions", json.dumps(body).encode(), attack.key))
    return 0


async def sends_a_byte_a_second(attack: Attack) -> int:
    request = _request("/v1/chat/completions", b"{}", attack.key)
    await _send(attack, *(request[place : place + 1] for place in range(30)))
    return 0


async def says_nothing(attack: Attack) -> int:
    await _send(attack, b"")
    return 0


async def sends_megabytes(attack: Attack) -> int:
    text = "word " * attack.rng.randint(200_000, 1_600_000)
    body = {"messages": [{"role": "user", "content": text}]}
    return (await attack.http.post("/v1/chat/completions", json=body, headers=attack.key)).status_code


async def guesses_passwords(attack: Attack) -> int:
    login = {"username": f"reader{attack.rng.randrange(8)}", "password": secrets.token_hex(4)}
    return (await attack.http.post("/login", data=login)).status_code


async def sends_odd_bodies(attack: Attack) -> int:
    headers = {**attack.key, "Content-Type": "application/json"}
    method, path = attack.rng.choice((("PUT", attack.path), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")))
    return (await attack.http.request(method, path, content=attack.rng.choice(ODD), headers=headers)).status_code


KINDS: tuple[Kind, ...] = (
    *(leaves_the_page, leaves_the_api, never_reads, sends_a_byte_a_second),
    *(says_nothing, sends_megabytes, guesses_passwords, sends_odd_bodies),
)


def _request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    named = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def _send(attack: Attack, *pieces: bytes) -> None:
    """A connection of which nothing is read: a piece a second, and then nothing for up to half a minute."""
    loop, url = asyncio.get_running_loop(), urlsplit(attack.target.url)
    with socket.socket() as connection:
        connection.setblocking(False)
        if sys.platform == "linux":
            connection.bind((attack.source, 0))
        await loop.sock_connect(connection, (url.hostname, url.port))
        for piece in pieces:
            await loop.sock_sendall(connection, piece)
            await asyncio.sleep(1)
        await asyncio.sleep(attack.rng.uniform(0, 30))
