"""The folder that a report goes to."""

from __future__ import annotations

from pathlib import Path

from llama2_chat.errors import ChatError


def make_folder(folder: Path) -> None:
    """Raise ChatError now, rather than after hours, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ChatError(f"Nothing can be written to {folder} ({error.strerror}). Give another --output_dir.") from error
