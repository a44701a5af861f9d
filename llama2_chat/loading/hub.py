"""Repositories of the Hugging Face Hub: names go in, folders come out, and each failure is a sentence.

A download runs beside the calling thread, which reports how far it is; whatever the report raises stops it. What the
files mean is not known here.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2
import huggingface_hub
from huggingface_hub import errors
from tqdm.auto import tqdm

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.disk import POLL_S, Files, check_free_space, not_writable
from llama2_chat.named_files import in_home

# Phase, done bytes, total bytes (0 while unknown). May raise, which ends what it reports on.
Progress = Callable[[Literal["download", "convert", "load"], int, int], None]

LICENCES = ["LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*"]  # which go along with whatever is made of a model
# Configuration, tokenizer, and what the model's page says, which names its licence.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", *LICENCES, "README.md"]
SUBFOLDERS = ["*/*"]  # nothing transformers loads; Llama 2 keeps Meta's own format there, as large again
# A repository's folder in the cache, or one of its snapshots.
CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)([/\\]snapshots[/\\][^/\\]+)?[/\\]?$")
# What the system answers about a folder that cannot take a download. An OSError of the network has other numbers.
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC}


def fetch_small_files(
    source: str, progress: Progress, cache_dir: Path | None = None, ignored: list[str] = SUBFOLDERS
) -> Files:
    """Configuration and tokenizer of a local folder or a Hub id: the newest, or the cached ones if the Hub is away.

    source: a folder, a Hub id, or a Hub id with a branch, tag or commit, such as "owner/name@v1".
    cache_dir: where repositories are kept, or None for huggingface_hub's own place. ignored: patterns of paths.
    """
    if folder := find_folder(source):
        if folder.is_dir():
            return Files(folder)
        raise ModelUnavailable(
            f"There is no folder {quoted(source)}. Check the path, or give the id of a model on the Hub."
        )
    repo, revision = split_revision(source)
    return Files(_snapshot(repo, revision, SMALL_FILES, 0, progress, cache_dir, ignored), repo)


def find_folder(source: str) -> Path | None:
    """The folder that a source means, be it there or not; None if it means a repository of the Hub."""
    folder = in_home(source)
    return folder if folder.is_dir() or source.startswith((".", "/", "~")) or folder.is_absolute() else None


def cached_repo(folder: str) -> str | None:
    """The id of the repository whose snapshot a folder is, in the Hub's cache of this computer or another."""
    found = CACHED.search(folder)
    return f"{found[1]}/{found[2]}" if found else None


def split_revision(source: str) -> tuple[str, str]:
    """A Hub id and its branch, tag or commit: "owner/name@v1" -> ("owner/name", "v1"), without one "main"."""
    repo, at, revision = source.partition("@")
    if at and not revision:
        raise ModelUnavailable(
            f"{source} names no revision after the @. Add a branch, tag or commit, or leave out the @."
        )
    return repo, revision or "main"


def fetch_weights(files: Files, progress: Progress) -> None:
    """Download what is missing of the weights, if there is room for it on the disk."""
    missing = to_download(files)
    if missing and files.repo:
        _snapshot(files.repo, files.folder.name, list(missing), sum(missing.values()), progress, files.cache_dir)


def to_download(files: Files) -> dict[str, int]:
    """Name and bytes of the weights that are not here yet. Raises ModelUnavailable if the disk has no room for them."""
    missing = files.missing()
    check_free_space(str(files), sum(missing.values()), files.folder, "set HF_HOME to a folder on a larger disk")
    return missing


def check_reachable(repo: str, name: str = "config.json", cache_dir: Path | None = None) -> None:
    """Raise ModelUnavailable unless this account may download `name` of `repo` now, or the cache holds the model."""
    try:
        # The model's page is public even where its files are not: only asking for a file tells.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name))
    except (OSError, httpx2.HTTPError) as error:
        if not _is_cached_whole(repo, cache_dir):
            raise ModelUnavailable(_hub_sentence(repo, error)) from error


def _is_cached_whole(repo: str, cache_dir: Path | None) -> bool:
    folder = _cached(repo, "main", SMALL_FILES, cache_dir, SUBFOLDERS)
    try:
        return folder is not None and not Files(folder, repo).missing()
    except ModelUnavailable:  # not even the names of the weights are known
        return False


def _cached(repo: str, revision: str, patterns: list[str], cache_dir: Path | None, ignored: list[str]) -> Path | None:
    """The folder of a repository's files that match `patterns`, if the cache holds all of them."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                ignore_patterns=ignored,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None


def _snapshot(
    repo: str,
    revision: str,
    patterns: list[str],
    total: int,
    progress: Progress,
    cache_dir: Path | None,
    ignored: list[str] = SUBFOLDERS,
) -> Path:
    """The folder of a repository's files that match `patterns`, downloaded where the cache does not have them."""
    bars: list[Any] = []
    stop = threading.Event()

    class Bar(tqdm):
        """huggingface_hub draws several; those that count bytes (of the network, of the files) are ours to read."""

        def __init__(self, *args: Any, unit: str = "it", **kwargs: Any) -> None:
            super().__init__(*args, unit=unit, disable=None, **kwargs)
            self.bytes = 0.0  # tqdm's own n stands still without a terminal
            bars.extend([self] if unit == "B" else [])

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise InterruptedError
            self.bytes += n or 0
            return super().update(n)

    def report() -> None:
        progress("download", min(total, int(max((bar.bytes for bar in bars), default=0))), total)

    def download() -> str:
        return huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            tqdm_class=Bar,
        )

    try:
        return Path(_run_beside(download, report))
    except (OSError, ValueError, httpx2.HTTPError) as error:  # ValueError: no id, or a login page instead of JSON
        # huggingface_hub falls back to the cache itself, but not after a proxy's error or a cut connection.
        if folder := _cached(repo, revision, patterns, cache_dir, ignored):
            return folder
        if isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno in NOT_WRITABLE):
            raise not_writable(error, "set HF_HOME to a folder that has room and is yours") from error
        raise ModelUnavailable(_hub_sentence(repo, error, revision)) from error
    finally:
        stop.set()


def _run_beside(work: Callable[[], Any], report: Callable[[], None]) -> Any:
    """What work() returns, from a thread of its own; report() is called meanwhile and may raise to leave."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # handed to the thread that waits
            outcome["error"] = error

    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    while thread.is_alive():
        report()
        thread.join(POLL_S)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


# ---- What went wrong, in words ----


def _hub_sentence(repo: str, error: BaseException, revision: str = "main") -> str:
    """What went wrong between us and the Hub, and what to do about it. Never carries the token."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return f"{repo} is not in the cache and HF_HUB_OFFLINE is set. Unset it to let the model be downloaded."
    if isinstance(error, UnicodeEncodeError):  # the token is sent in a header, which is ASCII
        return (
            "HF_TOKEN contains a character that cannot be part of a token. "
            "Copy the token again from https://hf.co/settings/tokens."
        )
    answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None and answer.response is not None:
        return _http_sentence(repo, answer, revision)
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return (
            f"{repo!r} is neither a folder here nor an id on the Hub, which looks like owner/name. Check its spelling."
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or any(isinstance(c, httpx2.HTTPError) for c in causes):
        return (
            f"{repo} is not complete in the cache and the Hugging Face Hub cannot be reached. "
            "Check the network connection and start again."
        )
    return f"Downloading {repo} failed ({type(error).__name__}). Start again; files that are complete are kept."


def _http_sentence(repo: str, error: errors.HfHubHTTPError, revision: str) -> str:
    status, token = error.response.status_code, huggingface_hub.get_token()
    page = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
    if status == 401 and token:  # the Hub answers a valid token with 403 or 404, even where no token gets 401
        return "The Hugging Face Hub rejected HF_TOKEN as invalid. Make a new one at https://hf.co/settings/tokens."
    if isinstance(error, errors.GatedRepoError) and not token:
        return (
            f"{repo} is gated and no token is set. Accept its licence at {page}, "
            "then set HF_TOKEN to a token of that account."
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"The account of this HF_TOKEN may not download {repo}. Accept its licence at {page}, wait for the "
            "approval, and make sure that the token may read gated repositories."
        )
    if isinstance(error, errors.RepositoryNotFoundError) and not token:
        return f"There is no folder and no public model {repo}. Check its spelling; a private model needs HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is no folder and no model {repo} that the account of this HF_TOKEN can see. Check its spelling."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The repository {repo} has no branch, tag or commit {revision}. Check its spelling."
    if status == 403:
        return f"The Hugging Face Hub does not let this HF_TOKEN read {repo}. Give the token read access to it."
    if status == 429:
        return "The Hugging Face Hub asks for a pause (too many requests). Wait a few minutes and start again."
    return f"The Hugging Face Hub answered with error {status} for {repo}. Start again later."
