"""What of a model lies on this disk, what is missing, and whether there is room for it. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub import errors

from llama2_chat.errors import ChatError, ModelUnavailable, quoted

log = logging.getLogger("llama2_chat")

POLL_S = 0.2
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of weights, for the fingerprint


@dataclass(frozen=True)
class Files:
    """A model or adapter: its folder and, when that is a snapshot of a Hub repository, the repository's id."""

    folder: Path
    repo: str | None = None
    stem: Literal["model", "adapter_model"] = "model"  # how the files of weights are called
    original: Path | None = None  # Meta's own folder, from which it is converted
    to_convert: tuple[tuple[str, int], ...] = ()  # name and bytes of each file of weights, be it converted or not

    def __str__(self) -> str:
        return self.repo or quoted(self.folder)

    @property
    def cache_dir(self) -> Path:
        """Of a snapshot, which lies in cache_dir/models--owner--name/snapshots/revision."""
        return self.folder.parents[2]

    def sizes(self) -> dict[str, int]:
        """Name and bytes of each file, those included that are on the Hub or to be converted, and not here yet."""
        if self.repo:
            try:
                tree = huggingface_hub.get_cached_repo_tree(
                    self.repo, revision=self.folder.name, cache_dir=self.cache_dir
                )
                return {file.path: file.size for file in tree}
            except errors.CachedRepoTreeNotFoundError:  # fetched by an older huggingface_hub, and now we are offline
                pass
        here = {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}
        return dict(self.to_convert) | here

    def weights(self) -> dict[str, int]:
        """Name and bytes of the files that hold the weights: safetensors, or pickles where there are none."""
        sizes = self.sizes()
        pickle = "pytorch_model.bin" if self.stem == "model" else f"{self.stem}.bin"
        for whole in (f"{self.stem}.safetensors", pickle):
            names = [whole] if whole in sizes else []
            if f"{whole}.index.json" in sizes and not names:
                names = self._shards(f"{whole}.index.json")
            if lost := [name for name in names if name not in sizes]:
                raise ModelUnavailable(f"{self} is incomplete: {lost[0]} is missing. Copy or download it again.")
            if names:
                return {name: sizes[name] for name in names}
        raise ModelUnavailable(
            f"{self} holds no weights that this program can read ({self.stem}.safetensors or PyTorch .bin files). "
            "Choose the folder or repository with the original weights."
        )

    def _shards(self, index: str) -> list[str]:
        with translate_parse_errors(self):
            return sorted(set(json.loads((self.folder / index).read_text("utf-8"))["weight_map"].values()))

    def fingerprint(self) -> str:
        """SHA-256 of which model this is: its configuration, and sizes and samples of its weights, which are here."""
        config = "adapter_config" if self.stem == "adapter_model" else "config"
        digest = hashlib.sha256((self.folder / f"{config}.json").read_bytes())
        for name, size in sorted(self.weights().items()):
            digest.update(f"{name} {size}".encode())
            with (self.folder / name).open("rb") as file:
                for i in range(SAMPLES):
                    file.seek(i * size // SAMPLES)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def missing(self) -> dict[str, int]:
        """Those of the weights that are still to be downloaded or converted."""
        return {name: size for name, size in self.weights().items() if not (self.folder / name).is_file()}


@contextmanager
def translate_parse_errors(files: Files) -> Iterator[None]:
    """A JSON file that cannot be parsed, or lacks what should be in it, becomes a sentence."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(
            f"A file of {files} is damaged or not in a format this program knows. Copy or download it again."
        ) from error


def check_free_space(name: str, needed_bytes: int, folder: Path, remedy: str) -> None:
    """Raise ModelUnavailable unless needed_bytes more fit on the disk of `folder`. remedy: what would help."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ModelUnavailable(
            f"{name} needs {in_gb(needed_bytes)} more on disk and {quoted(folder)} has {in_gb(free)} free. "
            f"Free some space, or {remedy}."
        )


def not_writable(error: OSError, remedy: str) -> ModelUnavailable:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    place = quoted(error.filename or "disk")
    return ModelUnavailable(f"The model cannot be written to {place}: {reason}. Please {remedy}.")


def not_readable(path: Path, error: OSError) -> ModelUnavailable:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return ModelUnavailable(f"{quoted(path)} cannot be read: {reason}. Check whose it is, and the disk that it is on.")


def in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def folder_bytes(folder: Path) -> int:
    """What lies in a folder that another process is writing to."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob() it goes on where a folder is removed meanwhile
        for name in names:
            with suppress(OSError):  # moved or removed meanwhile
                total += os.path.getsize(os.path.join(place, name))
    return total


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Copies in the cache that are made once ----


def digest(text: str) -> str:
    """A short name for a text of any length."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_stamp(path: Path) -> str:
    """Another one once the file has changed."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def source_digest(files: Files) -> str:
    """The same for a repository or folder whatever has become of it."""
    return digest(files.repo or str(files.folder.resolve()))


def state_digest(files: Files, version: int) -> str:
    """Another one when the weights, a configuration or the way in which copies are made, `version`, has changed."""
    stamps = [file_stamp(files.folder / name) for name in files.weights()]
    configs = [path.read_text("utf-8") for path in sorted(files.folder.glob("*config.json"))]
    return digest("\n".join([str(version), *stamps, *configs]))


def remove_copies(home: Path, source: str, name: str) -> None:
    """Copies of the same source as it was before, and what a start that was cut off has left of one.

    source: a digest, with which the names of its copies begin.
    """
    for copy in home.glob(f"{source}-*"):
        log.info("Removing an outdated copy of %s, %s (%s)", name, copy, in_gb(folder_bytes(copy)))
        shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def one_at_a_time(lock_file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time; those that wait go on reporting. The system frees the lock of a process that dies."""
    lock = FileLock(lock_file)
    while True:
        try:
            lock.acquire(timeout=POLL_S)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def translate_write_errors() -> Iterator[None]:
    try:
        yield
    except ChatError:
        raise
    except Exception as error:
        problem = error if isinstance(error, OSError) else _in_rust(error)
        if problem is None:
            raise
        raise not_writable(problem, "set CACHE_DIR to a folder that has room and is yours") from error


def _in_rust(error: Exception) -> OSError | None:
    """tokenizers and safetensors raise exceptions of their own, with the number of the system's error in their text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), str(error)) if number else None
