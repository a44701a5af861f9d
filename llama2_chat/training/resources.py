"""Memory and disk: how much is used, how to free it, and what to do when there is no more."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from llama2_chat.errors import ChatError


def memory_gb() -> float:
    """The most that this process has taken of the GPU, or what it takes of a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


def free_memory() -> None:
    gc.collect()  # a trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def let_others_read(folder: Path, beside: str = "tokenizer_config.json") -> None:
    """Give a model's weights the mode of what was written beside them: safetensors leaves them to their owner alone."""
    mode = (folder / beside).stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


@contextmanager
def translate_resource_errors(remedies: Iterable[str], folder: Path, kept: str) -> Iterator[None]:
    """Errors of full memory and of a full disk become ChatErrors that say what to do.

    remedies: what takes less memory, best first. folder: what is being written. kept: what is not lost, in a sentence.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ChatError) else error
        if cause is None:
            raise
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(cause):
            raise ChatError(f"Out of memory. Try, in this order: {'; '.join(remedies)}. {kept}") from error
        # torch.save and safetensors say it in many ways, or only that a file is shorter than it should be.
        if "No space left" in str(cause) or (folder.is_dir() and shutil.disk_usage(folder).free < 2**20):
            raise ChatError(f"The disk of {folder} is full. Make room there. {kept}") from error
        raise
