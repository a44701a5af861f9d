"""Tables of Markdown that nothing breaks, for pages that may be published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table; whatever a cell says stays in its cell."""
    head = list(head)
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: object) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 300 else f"{text[:300]} …"


def public(name: str) -> str:
    """Of a local path only its last part."""
    return Path(name).resolve().name if Path(name).exists() else name
