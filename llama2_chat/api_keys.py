"""The API keys of a file, which may change while the server runs, beside those of the environment."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.named_files import read_text

log = logging.getLogger("llama2_chat")


class ApiKeys(Collection[str]):
    """given: those of the environment. path: of a file with a key a line. Raises ChatError for one that holds none."""

    def __init__(self, given: tuple[str, ...], path: Path) -> None:
        self._given, self._path = given, path
        self._keys = (*given, *_keys_in(path))

    def read_again(self) -> None:
        """The keys as the file has them now; as they were, with a line in the log, where it cannot be read."""
        try:
            self._keys = (*self._given, *_keys_in(self._path))
        except ChatError as error:
            log.warning("%s Until then the keys stay as they were.", error)
        else:
            log.info("API_KEY_FILE was read again; keys: %d", len(self))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


def _keys_in(path: Path) -> list[str]:
    text = read_text("API_KEY_FILE", path, "Give the path of a file of keys.")
    lines = map(str.strip, text.splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ChatError(f"API_KEY_FILE {path} contains no key. Write one a line.")
    return keys
