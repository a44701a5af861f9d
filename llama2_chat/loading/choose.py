"""Which model, and fetching its configuration and tokenizer: choose() makes a Plan, fetch() a Checkpoint of it.

The weights of a model from the Hub are not downloaded here: the caller may still refuse the tokenizer, or find that the
weights would not fit. load.py fetches and loads them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.disk import Files, translate_parse_errors
from llama2_chat.loading.hub import Progress, check_reachable, fetch_small_files, find_folder, split_revision
from llama2_chat.loading.small_model import fetch_embedded
from llama2_chat.settings import Settings

log = logging.getLogger("llama2_chat")

LLAMA_2_MODEL_ID = "meta-llama/Llama-2-13b-chat-hf"
ZERO_GPU = (
    "ZeroGPU is not supported: it lends a GPU for one function call, and this program keeps its model on one. "
    "Choose other hardware in the Space's settings."
)


@dataclass(frozen=True)
class Plan:
    """Which model to fetch, and where to keep it."""

    model_id: str  # a Hub id, perhaps with a revision, a folder, or the embedded model's name
    why: str
    quantization: str
    cache_dir: Path  # of the embedded model
    hub_cache_dir: Path | None = None  # None is huggingface_hub's own place
    base_model: str | None = None  # overrides what an adapter names

    @property
    def is_embedded(self) -> bool:
        return self.model_id == EMBEDDED

    @property
    def name(self) -> str:
        """What page and API call it: of a folder its own name, and never where it lies."""
        folder = find_folder(self.model_id)
        return folder.resolve().name if folder else split_revision(self.model_id)[0]


@dataclass(frozen=True)
class Checkpoint:
    """A fetched model: its configuration and tokenizer are on this disk, its weights perhaps not yet."""

    model_id: str  # as the plan's
    why: str
    quantization: str
    base: Files
    cache_dir: Path  # where weights that come quantised are unpacked
    adapter: Files | None = None

    @property
    def is_embedded(self) -> bool:
        return self.model_id == EMBEDDED


def choose(settings: Settings, has_gpu: bool | None = None) -> Plan:
    """The model that the settings ask for, or else the best one this machine can reach. May ask the Hub.

    has_gpu: None looks whether PyTorch sees a CUDA GPU.
    """
    plan = Plan(
        EMBEDDED,
        "",
        settings.quantization,
        settings.cache_dir.expanduser(),
        settings.hub_cache_dir,
        settings.base_model,
    )
    if settings.zero_gpu:
        log.warning("%s", ZERO_GPU)
    if settings.model_id:
        _refuse_known_base(settings.model_id)
        return replace(plan, model_id=settings.model_id, why="MODEL_ID asks for this model.")
    if settings.zero_gpu:
        return replace(plan, why=ZERO_GPU)
    if not (torch.cuda.is_available() if has_gpu is None else has_gpu):
        return replace(plan, why="Llama 2 needs a CUDA GPU, and there is none here.")
    try:
        check_reachable(LLAMA_2_MODEL_ID, cache_dir=plan.hub_cache_dir)
    except ModelUnavailable as error:
        return replace(plan, why=f"This is the small model instead of Llama 2: {error}")
    return replace(plan, model_id=LLAMA_2_MODEL_ID, why="There is a CUDA GPU and Llama 2 can be reached.")


def _refuse_known_base(model_id: str) -> None:
    """Base models carry no template. Those people reach for by mistake are refused by name, before any download."""
    model_id, _ = split_revision(model_id)
    if llama := re.fullmatch(r"(meta-llama/Llama-2-\d+b)(-hf|-chat)?", model_id, re.IGNORECASE):
        chat = f"{llama[1]}-chat-hf"
    elif code := re.fullmatch(r"((?:codellama|meta-llama)/CodeLlama-\d+b)(-Python)?(-hf)?", model_id, re.IGNORECASE):
        chat = f"{code[1]}-Instruct-hf"
    else:
        return
    raise ModelUnavailable(f"{model_id} is not a chat model that transformers can load. Set MODEL_ID={chat}.")


def fetch(plan: Plan, progress: Progress) -> Checkpoint:
    """The planned model with its configuration and tokenizer on this disk; the embedded model with its weights too."""
    if sys.flags.optimize >= 2:
        raise ModelUnavailable(
            "Python runs with -OO or PYTHONOPTIMIZE=2, which takes out the docstrings that transformers reads while it "
            "loads a model. Leave it out, or set PYTHONOPTIMIZE=1."
        )
    if plan.is_embedded:
        return _checkpoint(plan, Files(fetch_embedded(plan.cache_dir, progress)))
    files = fetch_small_files(plan.model_id, progress, plan.hub_cache_dir)
    if not (files.folder / "adapter_config.json").is_file():
        return _checkpoint(plan, _check_is_model(files))
    base = _base_of(files, plan)
    if base == EMBEDDED:
        return _checkpoint(plan, Files(fetch_embedded(plan.cache_dir, progress)), files)
    try:
        return _checkpoint(plan, _check_is_model(fetch_small_files(base, progress, plan.hub_cache_dir)), files)
    except ModelUnavailable as error:
        raise ModelUnavailable(
            f"The base model of the adapter {quoted(plan.model_id)}: {error.detail} BASE_MODEL overrides it."
        ) from error


def _checkpoint(plan: Plan, base: Files, adapter: Files | None = None) -> Checkpoint:
    adapter = adapter and replace(adapter, stem="adapter_model")
    return Checkpoint(plan.model_id, plan.why, plan.quantization, base, plan.cache_dir, adapter)


def _base_of(adapter: Files, plan: Plan) -> str:
    with translate_parse_errors(adapter):
        config = json.loads((adapter.folder / "adapter_config.json").read_text("utf-8"))
        base = plan.base_model or config["base_model_name_or_path"]
    if not base:
        raise ModelUnavailable(
            f"The adapter {quoted(plan.model_id)} does not name its base model. Set BASE_MODEL to it."
        )
    return base


def _check_is_model(files: Files) -> Files:
    if not (files.folder / "config.json").is_file():
        raise ModelUnavailable(
            f"{files} holds no config.json, so it is not a model in the format of transformers. Choose another model."
        )
    return files
