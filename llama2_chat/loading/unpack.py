"""Plain copies of checkpoints that come quantised, in CACHE_DIR/unpacked: made once, removed when they are outdated.

What a format's tensors stand for is dequantize.py's to say. Each copy may be deleted while no program is loading it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.config import read_config, read_generation_config
from llama2_chat.loading.dequantize import plain_tensors, quantization_of
from llama2_chat.loading.disk import (
    Files,
    check_free_space,
    folder_bytes,
    in_gb,
    not_writable,
    remove_copies,
    source_digest,
    state_digest,
    translate_write_errors,
)
from llama2_chat.loading.read import UNREADABLE

log = logging.getLogger("llama2_chat")

VERSION = 2  # of what is written here: older copies are made anew
SHARD_BYTES = 2_000_000_000


def unpacked(files: Files, config: PreTrainedConfig, cache_dir: Path) -> Files:
    """The same model in plain weights of its own dtype, made once and found again at the next start.

    Raises ModelUnavailable if there is no room for it, or if a tensor is there that nothing here understands.
    """
    folder = _home(cache_dir) / f"{source_digest(files)}-{state_digest(files, VERSION)}"
    if _is_whole(folder):  # also where nothing can be written
        return Files(folder)
    with translate_write_errors():
        lock = FileLock(folder.with_name(f"{source_digest(files)}.lock")).acquire()
    with lock:
        if not _is_whole(folder):  # else another process has made it meanwhile
            if folder.is_dir():
                log.warning("The plain copy %s is damaged and made anew", folder)
            remove_copies(folder.parent, source_digest(files), str(files))
            check_room(files, config, cache_dir)
            _make(files, config, folder)
    return Files(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a copy is there, and none of its files is missing or cut off."""
    if not folder.is_dir():
        return False
    copy = Files(folder)
    try:
        read_config(copy)
        read_generation_config(copy)
        for name in copy.weights():
            with safe_open(folder / name, "pt"):
                pass
    except (ModelUnavailable, *UNREADABLE):
        return False
    return True


def check_room(files: Files, config: PreTrainedConfig, cache_dir: Path) -> int:
    """Bytes that unpacking will write: 0 if the weights are plain, or unpacked already.

    Raises ModelUnavailable if the disk of cache_dir has no room for them and for what is still to be downloaded to it.
    """
    if quantization_of(config) is None:
        return 0
    home, missing = _home(cache_dir), sum(files.missing().values())
    if not missing and _is_whole(home / f"{source_digest(files)}-{state_digest(files, VERSION)}"):
        return 0
    needed = sum(tensor.numel() for tensor in _expected(config).values()) * _dtype(config).itemsize
    on_one_disk = home.stat().st_dev == files.folder.stat().st_dev
    total = needed + missing * on_one_disk
    check_free_space(str(files), total, home, "set CACHE_DIR to a folder on a larger disk")
    return needed


def _home(cache_dir: Path) -> Path:
    home = cache_dir / "unpacked"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(error, "set CACHE_DIR to a folder that can be written") from error
    return home


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _expected(config: PreTrainedConfig) -> dict[str, Tensor]:
    with torch.device("meta"):  # names and shapes without memory
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()


def _make(files: Files, config: PreTrainedConfig, folder: Path) -> None:
    quantization = quantization_of(config)
    assert quantization is not None
    staging = folder.with_suffix(".staging")
    staging.mkdir()
    try:
        _write(plain_tensors(files, quantization, _dtype(config), _expected(config)), staging)
        _copy_others(files.folder, staging)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    log.info("%s is unpacked and takes %s more on disk: %s", files, in_gb(folder_bytes(folder)), folder)


def _copy_others(source: Path, target: Path) -> None:
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config), "utf-8")


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Shards and their index, as from_pretrained reads them."""
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        try:
            save_file(shard, folder / name, {"format": "pt"})
        except (OSError, SafetensorError) as error:  # the disk was filled by somebody else meanwhile
            raise ModelUnavailable(
                f"{quoted(folder / name)} could not be written: {error}. Free some space, or set CACHE_DIR to another "
                "folder."
            ) from error
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.contiguous()
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), "utf-8")
