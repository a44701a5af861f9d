"""Who may see the page: names and hashed passwords in AUTH_FILE, a line for each.

    python app.py --hash-password >> users.txt        asks for a name and a password
    python app.py --auth-file users.txt

A line is name:scrypt$N$r$p$salt$hash. Programs have keys instead, which limits.py checks.
"""

from __future__ import annotations

import asyncio
import base64
import getpass
import hashlib
import hmac
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.named_files import read_text

# What OWASP advises: 32 MiB and some tenths of a second for each guess.
COST = {"n": 2**15, "r": 8, "p": 3}
MEMORY = 64 * 2**20  # that scrypt may take; OpenSSL's own limit is just below what COST needs


log = logging.getLogger("llama2_chat")


class Users:
    """The names and hashes of an AUTH_FILE."""

    def __init__(self, lines: dict[str, str]) -> None:
        self._hashes = lines
        self.on_change: Callable[[Collection[str]], None] = lambda names: None  # told whose hash is no longer the same
        self._nobody = hash_password(secrets.token_hex())
        self._one_at_a_time = threading.Lock()  # many guesses at once must not take all memory and cores

    def replace(self, users: Users) -> None:
        """From now on these are the users."""
        before, self._hashes = self._hashes, users._hashes
        self.on_change({name for name, hashed in before.items() if self._hashes.get(name) != hashed})

    def __len__(self) -> int:
        return len(self._hashes)

    async def knows(self, name: str, password: str) -> bool:
        """Whether this is a user and their password. An unknown name takes as long as a wrong password."""
        return await asyncio.to_thread(self._knows, name, password)

    def _knows(self, name: str, password: str) -> bool:
        with self._one_at_a_time:
            fits = _fits(self._hashes.get(name, self._nobody), password)
        return fits and name in self._hashes


def read_users(path: Path) -> Users:
    """The users in a file. Raises ChatError for one that cannot be read or says nothing."""
    text = read_text("AUTH_FILE", path, "Give the path of a file of login lines.")
    users = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        name, _, hashed = line.rpartition(":")
        try:
            _parse(hashed)
        except ValueError as error:
            raise ChatError(
                f"Line {number} of AUTH_FILE {path} is not name:hash. Make it with python app.py --hash-password."
            ) from error
        users[name] = hashed
    if not users:
        raise ChatError(f"AUTH_FILE {path} names no user. Make a line with python app.py --hash-password.")
    return Users(users)


def read_again(users: Users, path: Path) -> None:
    """The users as the file has them now; as they were, with a line in the log, where it cannot be read."""
    try:
        users.replace(read_users(path))
    except ChatError as error:
        log.warning("%s Until then the users stay as they were.", error)
    else:
        log.info("AUTH_FILE was read again: %d may log in", len(users))


def main() -> int:
    """Ask for a name and a password, and print their line."""
    try:
        print("Name: ", end="", file=sys.stderr, flush=True)  # the line alone goes to stdout
        name = input().strip()
        password = getpass.getpass("Password: ")
        again = getpass.getpass("Once more: ")
    except (EOFError, KeyboardInterrupt):
        return 1
    if not name or not password or password != again:
        print("A name, and twice the same password, are needed.", file=sys.stderr)
        return 1
    print(f"{name}:{hash_password(password)}")
    return 0


def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    return "$".join(["scrypt", *map(str, COST.values()), _base64(salt), _base64(_scrypt(password, salt, **COST))])


def _fits(hashed: str, password: str) -> bool:
    cost, salt, expected = _parse(hashed)
    return hmac.compare_digest(_scrypt(password, salt, **cost), expected)


def _parse(hashed: str) -> tuple[dict[str, int], bytes, bytes]:
    """Cost, salt and hash; ValueError if they are not there."""
    name, *cost, salt, expected = hashed.split("$")
    if name != "scrypt":
        raise ValueError(name)
    values = dict(zip(COST, map(int, cost), strict=True))
    return values, base64.b64decode(salt, validate=True), base64.b64decode(expected, validate=True)


def _scrypt(password: str, salt: bytes, **cost: int) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, maxmem=MEMORY, dklen=32, **cost)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
