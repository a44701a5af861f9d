"""Files that an operator names in a setting: what they hold, or a sentence with the next step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llama2_chat.errors import ChatError, quoted


def in_home(path: str | Path) -> Path:
    """The path with its ~ written out; as it is where nobody knows of such a home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_text(setting: str, path: Path, remedy: str) -> str:
    """The text in UTF-8, without the mark that editors of Windows put before it.

    Raises ChatError, with `remedy` as its last sentence, for a file that cannot be read or is not text.
    """
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it is not text"
        raise ChatError(f"{setting} {quoted(path)} cannot be read: {reason}. {remedy}") from error


def read_json(setting: str, path: Path, remedy: str) -> Any:
    """The same of a file that must hold JSON."""
    text = read_text(setting, path, remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{setting} {quoted(path)} is not JSON: {error!s:.100}. {remedy}") from error
