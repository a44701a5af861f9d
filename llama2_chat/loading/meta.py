"""Meta's own download: from consolidated.NN.pth to safetensors in CACHE_DIR/converted, once.

prepare() converts configuration and tokenizer, convert_weights() the rest, once it is known that the model fits. Each
file is written aside and then renamed: a start that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.disk import (
    Files,
    check_free_space,
    digest,
    file_stamp,
    in_gb,
    one_at_a_time,
    remove_copies,
    translate_write_errors,
)
from llama2_chat.loading.hub import Progress
from llama2_chat.loading.meta_folder import NOT_LLAMA_2, check_md5, find_tokenizer, find_weights, read_config
from llama2_chat.loading.shards import Part, file_bytes, groups, mapped, write
from llama2_chat.loading.tokenizer_model import convert_tokenizer

log = logging.getLogger("llama2_chat")

VERSION = 1  # of what is written here: older copies are made anew
INDEX = "model.safetensors.index.json"


def prepare(original: Path, cache_dir: Path, progress: Progress) -> Files:
    """The model as transformers takes it: configuration and tokenizer are there, weights perhaps still to be converted.

    Raises ModelUnavailable for a folder that is incomplete, damaged or of another model.
    """
    paths, tokenizer = find_weights(original), find_tokenizer(original)
    source = digest(str(original.resolve()))
    stamps = map(file_stamp, [*paths, tokenizer, original / "params.json"])
    folder = cache_dir / "converted" / f"{source}-{digest(f'{VERSION} {[*stamps]}')}"
    if not folder.is_dir():
        with translate_write_errors():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(_lock(folder), lambda: progress("convert", 0, 0)):
                if not folder.is_dir():
                    remove_copies(folder.parent, source, str(original))
                    _prepare(original, paths, tokenizer, folder)
    sizes = json.loads((folder / INDEX).read_text("utf-8"))["metadata"]["file_bytes"]
    return Files(folder, original=original, to_convert=tuple(sizes.items()))


def convert_weights(files: Files, progress: Progress) -> None:
    """Write the files of weights that are not there yet, after checking the originals by their MD5."""
    if not files.missing():
        return
    with translate_write_errors(), one_at_a_time(_lock(files.folder), lambda: progress("convert", 0, 0)):
        if missing := files.missing():  # another process may have made them while we waited
            _convert(files, missing, progress)


def check_room(files: Files) -> int:
    """Bytes that are still to be written. Raises ModelUnavailable if the disk has no room for them."""
    needed = sum(files.missing().values())
    check_free_space(_name(files), needed, files.folder, "set CACHE_DIR to a folder on a larger disk")
    return needed


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name.partition('-')[0]}.lock")


def _name(files: Files) -> str:
    assert files.original is not None
    return quoted(files.original)


def _prepare(original: Path, paths: list[Path], tokenizer_model: Path, folder: Path) -> None:
    for path in (original / "params.json", tokenizer_model):
        check_md5(path)
    with mapped(paths) as shards:
        config = read_config(original, shards)
    try:
        tokenizer = convert_tokenizer(tokenizer_model)
    except ValueError as error:
        raise ModelUnavailable(f"{quoted(tokenizer_model)} is no tokenizer of a Llama 2. {NOT_LLAMA_2}") from error
    staging = folder.with_suffix(".staging")
    staging.mkdir()
    try:
        tokenizer.save_pretrained(staging)
        config.save_pretrained(staging)
        GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(staging)
        (staging / INDEX).write_text(json.dumps(_index(config)), "utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(config: LlamaConfig) -> dict[str, Any]:
    """As from_pretrained reads it, with the size that each file will have."""
    files = groups(config)
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert isinstance(config.dtype, torch.dtype)
    sizes = {name: file_bytes(parts, config.dtype) for name, parts in zip(names, files, strict=True)}
    places = {part.name: name for name, parts in zip(names, files, strict=True) for part in parts}
    return {"metadata": {"file_bytes": sizes}, "weight_map": places}


def _convert(files: Files, missing: dict[str, int], progress: Progress) -> None:
    assert files.original is not None
    for part in files.folder.glob("*.part"):  # of a start that was cut off
        part.unlink()
    needed = check_room(files)
    paths, done = find_weights(files.original), 0
    total = needed + sum(path.stat().st_size for path in paths)

    def report(more_bytes: int) -> None:
        nonlocal done
        done += more_bytes
        progress("convert", done, total)

    log.info("Converting %s, once: %s go to %s", _name(files), in_gb(needed), files.folder)
    for path in paths:
        check_md5(path, report)
    parts_of = zip(dict(files.to_convert), groups(LlamaConfig.from_pretrained(files.folder)), strict=True)
    for name, parts in parts_of:
        if name in missing:
            _write(paths, parts, files.folder / name)
            report(missing[name])


def _write(paths: list[Path], parts: list[Part], target: Path) -> None:
    aside = target.with_suffix(".part")
    try:
        with mapped(paths) as shards:  # anew for each file: what was read of them leaves the memory
            write(parts, shards, aside)
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)
