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
from typing import NamedTuple

import torch

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.disk import Files, translate_parse_errors
from llama2_chat.loading.hub import (
    Progress,
    cached_repo,
    check_reachable,
    fetch_small_files,
    find_folder,
    split_revision,
)
from llama2_chat.loading.meta import prepare
from llama2_chat.loading.meta_folder import is_chat, is_metas
from llama2_chat.loading.parts import Part
from llama2_chat.loading.small_model import fetch_embedded
from llama2_chat.named_files import in_home
from llama2_chat.prompt import NO_FORMAT
from llama2_chat.settings import Settings

log = logging.getLogger("llama2_chat")

LLAMA_2_MODEL_ID = "meta-llama/Llama-2-13b-chat-hf"
# Models that complete texts and that nothing in their files tells from those that chat.
KNOWN_BASE = re.compile(
    r"(meta-llama/)?Llama-2-\d+b-hf|((codellama|meta-llama)/)?CodeLlama-\d+b(-Python)?-hf", re.IGNORECASE
)
METAS_REPOSITORY = re.compile(
    r"(meta-llama/Llama-2-\d+b(-chat)?|(codellama|meta-llama)/CodeLlama-\d+b(-Python|-Instruct)?)", re.IGNORECASE
)
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
    chat_format: str | None = None  # overrides what the model's files or its name say: "llama-2", or "none" to complete
    headroom_gb: float = Settings.kv_headroom_gb  # of each GPU, left alone
    kv_cache: str = Settings.kv_cache
    adapters: tuple[tuple[str, str], ...] = ()  # names and sources of those that requests choose from
    draft_model: str | None = None  # a Hub id or folder of what guesses for the model
    tensor_parallel: str = Settings.tensor_parallel  # GPUs that compute each layer together

    @property
    def is_embedded(self) -> bool:
        return self.model_id == EMBEDDED

    @property
    def name(self) -> str:
        """What page and API call it: of a folder its own name, or its repository's, and never where it lies."""
        if folder := find_folder(self.model_id):
            return cached_repo(str(folder.resolve())) or folder.resolve().name
        return split_revision(self.model_id)[0]


class NamedAdapter(NamedTuple):
    """A LoRA adapter that a request may choose."""

    name: str  # as page and API call it
    files: Files


@dataclass(frozen=True)
class Checkpoint:
    """A fetched model: its configuration and tokenizer are on this disk, its weights perhaps not yet."""

    model_id: str  # as the plan's
    why: str
    quantization: str
    base: Files
    cache_dir: Path  # where weights that come quantised are unpacked
    adapter: Files | None = None  # for all requests
    adapters: tuple[NamedAdapter, ...] = ()  # of which each request may choose one
    draft: Files | None = None  # what guesses for it
    chat_format: str | None = None  # "llama-2", "none" for a model that completes texts; None as its tokenizer says
    headroom_gb: float = Settings.kv_headroom_gb  # as the plan's
    kv_cache: str = Settings.kv_cache
    tensor_parallel: str = Settings.tensor_parallel  # as the plan's
    part: Part | None = None  # what of the model to load; None for all of it

    @property
    def is_embedded(self) -> bool:
        return self.model_id == EMBEDDED

    @property
    def all_adapters(self) -> list[Files]:
        """For all requests and for some."""
        return [files for files in (self.adapter, *(adapter.files for adapter in self.adapters)) if files]


def choose(settings: Settings, has_gpu: bool | None = None) -> Plan:
    """The model that the settings ask for, or else the best one this machine can reach. May ask the Hub.

    has_gpu: None looks whether PyTorch sees a CUDA GPU.
    """
    plan = Plan(
        EMBEDDED,
        "",
        settings.quantization,
        in_home(settings.cache_dir),
        settings.hub_cache_dir,
        settings.base_model,
        None if settings.chat_format == "auto" else settings.chat_format,
        settings.kv_headroom_gb,
        settings.kv_cache,
        settings.named_adapters,
        settings.draft_model,
        settings.tensor_parallel,
    )
    if settings.zero_gpu:
        log.warning("%s", ZERO_GPU)
    if settings.model_id:
        _refuse_other_formats(settings.model_id)
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


def _refuse_other_formats(model_id: str) -> None:
    """What people reach for and transformers cannot load, refused by name before any download."""
    model_id, _ = split_revision(model_id)
    if model_id.lower().endswith(".gguf"):
        raise _is_gguf(model_id)
    if METAS_REPOSITORY.fullmatch(model_id):
        raise _is_metas_repository(model_id)


def _is_gguf(name: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{quoted(name)} is a GGUF, a format for llama.cpp: choose the same model as safetensors, such as "
        f"MODEL_ID={LLAMA_2_MODEL_ID.replace('13b', '7b')}, or let llama.cpp's server load the file and set "
        "INFERENCE_URL to its address, such as http://127.0.0.1:8080."
    )


def _is_metas_repository(repo: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{repo} holds the model in Meta's own format only. Set MODEL_ID={repo}-hf, or download it and set MODEL_ID to "
        "the folder."
    )


def fetch(plan: Plan, progress: Progress) -> Checkpoint:
    """The planned model with its configuration and tokenizer on this disk; the embedded model with its weights too."""
    checkpoint = _fetch_model(plan, progress)
    if checkpoint.adapter and plan.adapters:
        raise ModelUnavailable(
            f"{quoted(plan.model_id)} is an adapter, and those of ADAPTERS are chosen beside their base. Set MODEL_ID "
            f"to the base, and add {quoted(plan.model_id)} to ADAPTERS under a name."
        )
    adapters = tuple(_fetch_adapter(*named, plan, progress) for named in plan.adapters)
    return replace(checkpoint, adapters=adapters, draft=_fetch_draft(plan, progress))


def _fetch_adapter(name: str, source: str, plan: Plan, progress: Progress) -> NamedAdapter:
    if name == plan.name:
        raise ModelUnavailable(f"ADAPTERS calls an adapter {name}, as the model is called. Choose another name.")
    try:
        files = fetch_small_files(source, progress, plan.hub_cache_dir)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"The adapter {name}: {error.detail}") from error
    if not (files.folder / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"The adapter {name}: {files} holds no adapter_config.json, so it is no adapter of PEFT. Check ADAPTERS."
        )
    return NamedAdapter(name, replace(files, stem="adapter_model"))


def _fetch_draft(plan: Plan, progress: Progress) -> Files | None:
    if plan.draft_model is None:
        return None
    try:
        return _check_is_model(fetch_small_files(plan.draft_model, progress, plan.hub_cache_dir))
    except ModelUnavailable as error:
        raise ModelUnavailable(f"DRAFT_MODEL: {error.detail}") from error


def _fetch_model(plan: Plan, progress: Progress) -> Checkpoint:
    if sys.flags.optimize >= 2:
        raise ModelUnavailable(
            "Python runs with -OO or PYTHONOPTIMIZE=2, which takes out the docstrings that transformers reads while it "
            "loads a model. Leave it out, or set PYTHONOPTIMIZE=1."
        )
    if plan.is_embedded:
        return _checkpoint(plan, Files(fetch_embedded(plan.cache_dir, progress)))
    files = fetch_small_files(plan.model_id, progress, plan.hub_cache_dir)
    if not files.repo and is_metas(files.folder):
        chats = plan.chat_format is not None or is_chat(plan.name)
        checkpoint = _checkpoint(plan, prepare(files.folder, plan.cache_dir, progress))
        return checkpoint if chats else replace(checkpoint, chat_format=NO_FORMAT)
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
    known_base = KNOWN_BASE.fullmatch(plan.name) and not _has_template(base)
    chat_format = plan.chat_format or (NO_FORMAT if known_base else None)
    return Checkpoint(
        plan.model_id,
        plan.why,
        plan.quantization,
        base,
        plan.cache_dir,
        adapter,
        chat_format=chat_format,
        headroom_gb=plan.headroom_gb,
        kv_cache=plan.kv_cache,
        tensor_parallel=plan.tensor_parallel,
    )


def _has_template(files: Files) -> bool:
    """Whether a tokenizer brings a chat template, as that of a model which was trained to chat does."""
    config = files.folder / "tokenizer_config.json"
    return (files.folder / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text("utf-8", errors="replace")
    )


def _base_of(adapter: Files, plan: Plan) -> str:
    with translate_parse_errors(adapter):
        config = json.loads((adapter.folder / "adapter_config.json").read_text("utf-8"))
        base = plan.base_model or config["base_model_name_or_path"]
    if not base or not isinstance(base, str):
        raise ModelUnavailable(
            f"The adapter {quoted(plan.model_id)} does not name its base model. Set BASE_MODEL to it."
        )
    return base


def _check_is_model(files: Files) -> Files:
    has_config, names = (files.folder / "config.json").is_file(), files.sizes().keys()
    if any(name.endswith(".gguf") for name in names) and not any(
        name.endswith((".safetensors", ".bin")) for name in names
    ):
        raise _is_gguf(str(files))
    if files.repo and is_metas(files.folder):
        raise _is_metas_repository(files.repo)
    if not has_config:
        raise ModelUnavailable(
            f"{files} holds no config.json, so it is not a model in the format of transformers. Choose another model."
        )
    return files
