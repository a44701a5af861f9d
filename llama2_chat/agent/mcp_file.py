"""MCP_SERVERS: which servers of the Model Context Protocol an operator lets the model use, read from a file.

    {"mcpServers": {"files": {"command": "mcp-files", "args": ["/srv/public"], "env": {"PATH": "/usr/bin"}},
                    "search": {"url": "https://mcp.example.com/mcp", "headers": {"Authorization": "Bearer ..."},
                               "readOnly": ["search"]}}}

It is the form that other programs read, with "readOnly" besides: true, or the names of tools that may be called without
asking. Nothing is started here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama2_chat.errors import ChatError, quoted
from llama2_chat.named_files import read_json

SERVER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
OURS = {"readOnly", "type", "transport", "disabled"}  # beside those of its kind
KEYS = {"command": {"command", "args", "env", "cwd"}, "url": {"url", "headers"}}


@dataclass(frozen=True)
class McpServerSpec:
    """How one server is reached: by a command that is started, or at an address."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    read_only: bool | Collection[str] = False  # all of its tools, or those with these names

    def is_read_only(self, tool: str) -> bool:
        return self.read_only if isinstance(self.read_only, bool) else tool in self.read_only


def read_mcp_servers(path: Path) -> list[McpServerSpec]:
    """The servers that the file names. Raises ChatError, with one sentence, for a file that makes no sense."""
    named = f"MCP_SERVERS {quoted(path)}"
    read = read_json("MCP_SERVERS", path, "Correct the file, or start without MCP_SERVERS.")
    servers = read.get("mcpServers") if isinstance(read, dict) else None
    if not isinstance(servers, dict) or not servers:
        raise ChatError(f'{named} must hold {{"mcpServers": {{"name": {{"command": ...}} or {{"url": ...}}}}}}.')
    try:
        return [_spec(name, entry) for name, entry in servers.items() if not _is_disabled(entry)]
    except _Wrong as error:
        raise ChatError(f"{named}: {error}") from error


class _Wrong(Exception):
    """A sentence about one server of the file."""


def _is_disabled(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("disabled") is True


def _spec(name: str, entry: Any) -> McpServerSpec:
    if not SERVER_NAME.fullmatch(name):
        raise _Wrong(f"a server's name is a word of letters, digits, - and _; this is {name!r:.60}.")
    kinds = [kind for kind in KEYS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1:
        raise _Wrong(f'{name} must have either "command" or "url".')
    if unknown := next((key for key in entry if key not in KEYS[kinds[0]] | OURS), None):
        raise _Wrong(f"{name} has {unknown!r:.60}, which nothing here reads.")
    fields = {key: entry[key] for key in KEYS[kinds[0]] if key in entry}
    for key, check, wanted in CHECKS:
        if key in fields and not check(fields[key]):
            raise _Wrong(f'"{key}" of {name} must be {wanted}.')
    if "args" in fields:
        fields["args"] = tuple(fields["args"])
    return McpServerSpec(name, **fields, read_only=_read_only(name, entry.get("readOnly", False)))


def _read_only(name: str, value: Any) -> bool | Collection[str]:
    if isinstance(value, bool):
        return value
    if not _are_texts(value):
        raise _Wrong(f'"readOnly" of {name} must be true, false, or a list of names of tools.')
    return frozenset(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and "\0" not in each for each in value)


def _maps_texts(value: Any) -> bool:
    return isinstance(value, dict) and _are_texts([*value.values()]) and _are_texts([*value])


def _are_headers(value: Any) -> bool:
    return _maps_texts(value) and all(text.isascii() and text.isprintable() for pair in value.items() for text in pair)


def _is_address(value: Any) -> bool:
    try:
        parts = urlsplit(value)
        near = parts.hostname in ("localhost", "127.0.0.1", "::1")
        return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and near))
    except (ValueError, TypeError, AttributeError):
        return False


CHECKS = (
    ("command", _is_text, "the name or path of a program"),
    ("args", _are_texts, "a list of texts"),
    ("env", _maps_texts, "an object of texts"),
    ("cwd", _is_text, "a folder"),
    ("url", _is_address, "an address that begins with https://, or http:// on this machine"),
    ("headers", _are_headers, "an object of printable ASCII texts"),
)
