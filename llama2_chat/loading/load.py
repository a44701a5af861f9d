"""The weights of a Checkpoint into memory, ready to run, to be trained or to be merged.

load() and load_base() download them if they are not here. Whatever goes wrong is a ModelUnavailable with a sentence.
Nothing here knows prompts, decoding or the page.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.lora import LoraWeights
from llama2_chat.kv_cache import check_format
from llama2_chat.loading.adapters import check_stays_beside, load_adapter, merge_adapter, said_of_base
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.compile_cache import keep_compiled
from llama2_chat.loading.config import made_from, read_config, read_generation_config, translate_config_errors
from llama2_chat.loading.dequantize import check_readable, comes_in_nf4, method_of, quantization_of
from llama2_chat.loading.disk import Files
from llama2_chat.loading.draft import read_draft
from llama2_chat.loading.hub import Progress, cached_repo, fetch_weights
from llama2_chat.loading.lora import read_adapters
from llama2_chat.loading.memory import (
    GB,
    MIN_CONTEXT_TOKENS,
    NO_INT4,
    Gpu,
    Size,
    check_memory,
    choose_device_map,
    choose_precision,
    compute_dtype,
    own_gpu,
    translate_out_of_memory,
    visible_gpus,
)
from llama2_chat.loading.meta import convert_weights
from llama2_chat.loading.packing import PackedConfig, finish_packed, read_packed, why_not_packed
from llama2_chat.loading.parts import Part, choose_parts, share, why_not_divided
from llama2_chat.loading.quantize import adopt_nf4, int8_config, nf4_config, precision_of, quantize_int8, speed_up_nf4
from llama2_chat.loading.read import read_model, translate_errors
from llama2_chat.loading.unpack import check_room, unpacked
from llama2_chat.prompt import LLAMA_2_FORMAT, NO_FORMAT, checked_format, encode, find_ending
from llama2_chat.settings import Settings
from llama2_chat.types import Message

log = logging.getLogger("llama2_chat")

# Of a model that may have been trained to chat in another.
GUESSED_FORMAT = (
    "Its files name no chat format, so Llama 2's is used, which is a guess: a chat_template.jinja beside its tokenizer "
    "gives another, and CHAT_FORMAT=llama-2 says that this is right."
)
LLAMA_2_CHAT = re.compile(r"llama([-_.]?2)?[-_.]\d+b[-_.](chat|instruct)", re.IGNORECASE)
UNPACKED = {"int4": "nf4", "int8": "int8"}  # what is next to a packed precision, by bitsandbytes
UNQUANTIZED = ("float32", "bfloat16", "float16")
# In which a chat template writes all its tokens.
EXCHANGE: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Hello"},
]


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and how it got there in words."""

    model: PreTrainedModel
    why: str
    needed_bytes: int = 0  # of GPU memory, or of this computer's without one, with one conversation
    part: Part | None = None  # what of the model it is; None for all of it
    adapters: tuple[LoraWeights, ...] = ()  # to be put beside it
    draft: EagleHead | PreTrainedModel | None = None  # what guesses for it

    @cached_property
    def precision(self) -> str:
        """As precision_of() reads it from the layers."""
        return precision_of(self.model)

    @property
    def device(self) -> str:
        """ "cpu", "cuda:0", "2 x cuda"."""
        devices = {parameter.device for parameter in self.model.parameters()}
        count = self.part.of if self.part else len(devices)
        return str(devices.pop()) if count == 1 else f"{count} x {devices.pop().type}"


# ---- Before there are weights ----


def find_format(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """prompt.checked_format() of a checkpoint. Raises ModelUnavailable, too, if its prompts would hold tokens for which
    the model has no embedding: no message could be answered."""
    chat_format, files = checked_format(tokenizer, checkpoint.chat_format), checkpoint.base
    if chat_format == NO_FORMAT or checkpoint.adapter:  # with an adapter's tokenizer the embedding grows
        return chat_format
    rows = read_config(files).get_text_config(decoder=True).vocab_size
    if unknown := [id for id in encode(tokenizer, EXCHANGE, chat_format) if id >= rows]:
        raise ModelUnavailable(
            f"The chat template of {files} writes {tokenizer.convert_ids_to_tokens(unknown[0])}, and the model has no "
            f"embedding for that token: its number is {unknown[0]:,} of {rows:,}. Copy the tokenizer that the model "
            "was trained with, or the weights that were trained with this one."
        )
    return chat_format


def guesses_format(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether find_format() says Llama 2's and nothing else does: no setting, template or name of Meta's."""
    base = checkpoint.base
    if checkpoint.chat_format or tokenizer.chat_template or base.original:
        return False
    names = (base.repo or cached_repo(str(base.folder)) or base.folder.resolve().name, made_from(base))
    if any(LLAMA_2_CHAT.search(name.rstrip("/").rpartition("/")[2]) for name in names):
        return False
    return find_format(checkpoint, tokenizer) == LLAMA_2_FORMAT


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> set[int]:
    """The ids that end an answer: the tokenizer's EOS, those of the generation config, and the chat template's."""
    ends = generation.eos_token_id if generation is not None else None
    named = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return named | find_ending(tokenizer).ids


def measure(files: Files, headroom_gb: float = Settings.kv_headroom_gb, kv_cache: str = Settings.kv_cache) -> Size:
    """What the model will weigh. Needs its configuration and the names of its weights, not the weights.

    headroom_gb: of each GPU, which is to be left alone; kv_cache: a KV_CACHE.
    """
    with translate_errors(files):
        config = read_config(files)
        read_generation_config(files)  # refused before the weights are fetched, if it is
        with translate_config_errors(files):
            measured = Size.of(config)
        size = replace(measured, headroom_bytes=int(headroom_gb * GB), kv_cache=kv_cache)
    if quantization := quantization_of(config):
        check_readable(files, quantization)
        return replace(size, comes_in=method_of(quantization))
    return size


def measure_checkpoint(checkpoint: Checkpoint) -> Size:
    """measure() of its model, with the adapters that requests choose from, all filled up to the largest, and with what
    guesses for it."""
    largest = max((sum(adapter.files.weights().values()) for adapter in checkpoint.adapters), default=0)
    size = measure(checkpoint.base, checkpoint.headroom_gb, checkpoint.kv_cache)
    draft = sum(checkpoint.draft.weights().values()) if checkpoint.draft else 0
    return replace(size, adapter_bytes=largest * len(checkpoint.adapters) + draft)


def check_headers(files: Files, is_head: bool = False) -> None:
    """Raise ModelUnavailable if a file of weights is here but cut off, a Git LFS pointer, or holds whole numbers of
    which nothing says what they stand for. Reads only its header, or the names and kinds in a pickle.

    is_head: of a DRAFT_MODEL, whose scales stand beside its weights.
    """
    with translate_errors(files):
        is_plain = not is_head and files.stem == "model" and not quantization_of(read_config(files))
        for path in (files.folder / name for name in files.weights()):
            whole = _in_whole_numbers(path) if path.is_file() else []
            if is_plain and whole:
                raise ModelUnavailable(
                    f"{files} holds {whole[0]} as whole numbers, and its config.json has no quantization_config "
                    "that says what they stand for. Choose another copy."
                )


def _in_whole_numbers(path: Path) -> list[str]:
    """The names of those weights in a file that are no floating point numbers."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        return [name for name, kind in kinds.items() if name.endswith(".weight") and kind.startswith(("I", "U"))]
    tensors = dict(torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True))
    weights = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if odd := [name for name in weights if not isinstance(name, str)]:
        raise ValueError(f"{odd[0]!r:.40} is no name of a tensor")
    return [name for name, tensor in weights.items() if name.endswith(".weight") and not tensor.is_floating_point()]


def divided(checkpoint: Checkpoint) -> Checkpoint:
    """The first part of it, and in which precision all parts are, if several GPUs shall compute it together."""
    requested, quantization, gpus = checkpoint.tensor_parallel, checkpoint.quantization, visible_gpus()
    if requested == "1" or (requested == "auto" and len(gpus) < 2):
        return checkpoint
    size = measure_checkpoint(checkpoint)
    with translate_errors(checkpoint.base):
        config = read_config(checkpoint.base)
    parts = choose_parts(requested, quantization, config, size, gpus, _why_whole(checkpoint))
    if parts == 1:
        return checkpoint
    fewest = sorted(gpus[:parts], key=lambda gpu: gpu.free_bytes)[:1]
    precision, why = choose_precision(quantization, share(size, parts), fewest)
    check_memory(quoted(checkpoint.model_id), precision, share(size, parts), fewest)
    reason = why_not_divided(config, parts, precision, gpus)
    if not reason and gpus and precision in UNPACKED and (why_not := why_not_packed(gpus[:parts])):
        if requested == "auto":
            return checkpoint
        reason = f"only products by humming-kernels are divided in {precision}, and {why_not}"
    if reason:
        raise ModelUnavailable(f"TENSOR_PARALLEL={parts} does not work here: {reason}.")
    together = f"{parts} {'GPUs' if gpus else 'processes'} compute each layer together."
    if checkpoint.draft:
        together = f"{together} DRAFT_MODEL is left out: it guesses for a model that is whole."
    said = f"{checkpoint.why} {why} {together}"
    return replace(checkpoint, part=Part(0, parts), quantization=precision, draft=None, why=said)


def _why_whole(checkpoint: Checkpoint) -> str | None:
    """Why a model is not divided, whatever it is, as part of a sentence; None if it may be."""
    if checkpoint.adapter or checkpoint.adapters:
        return "adapters need a model that is whole; one they are merged into can be divided"
    if not all(name.endswith(".safetensors") for name in checkpoint.base.weights()):
        return "its weights are pickles, which can only be read whole; save_pretrained() writes safetensors"
    return None


# ---- Loading ----


def load(checkpoint: Checkpoint, progress: Progress) -> Loaded:
    """Download the weights if they are not here, after checking that they will fit, and load them."""
    files, adapter, part = checkpoint.base, checkpoint.adapter, checkpoint.part
    gpus, size = visible_gpus() if part is None else own_gpu(part.rank), measure_checkpoint(checkpoint)
    if part is not None:
        size = share(size, part.of)
    if gpus:
        keep_compiled(checkpoint.cache_dir)
    precision, why = choose_precision(checkpoint.quantization, size, gpus)
    check_memory(quoted(checkpoint.model_id), precision, size, gpus)
    check_format(checkpoint.kv_cache, [gpu.capability for gpu in gpus])
    if size.comes_in:
        check_room(files, read_config(files), checkpoint.cache_dir)
    for other in checkpoint.adapters:
        fetch_weights(other.files, progress)
    adapters = read_adapters(checkpoint)
    bring_weights(files, progress)
    check_headers(files)
    if adapter:
        fetch_weights(adapter, progress)
    progress("load", 0, 0)
    needed_bytes = (size.needed_bytes if gpus else size.host_bytes)(precision, MIN_CONTEXT_TOKENS)
    if size.comes_in:
        with translate_out_of_memory(quoted(checkpoint.model_id), precision, needed_bytes), translate_errors(files):
            files = unpacked(files, read_config(files), checkpoint.cache_dir)
        why = f"Its weights came quantised by {size.comes_in} and were unpacked. {why}"
    packs = precision in UNPACKED and bool(gpus)
    if packs and (reason := why_not_packed(gpus)):
        packs, precision = False, UNPACKED[precision]
        why = f"{why} Its products are those of bitsandbytes, since {reason}."
    with translate_out_of_memory(quoted(checkpoint.model_id), precision, needed_bytes):
        with translate_errors(files):
            # What is packed from another copy lies in that, and is removed with it.
            home = files.folder if size.comes_in or files.original else checkpoint.cache_dir
            model = _load_for_serving(files, precision, size, gpus, home if packs else None, part)
        if adapter:
            # In 4 or 8 bits merging would round the change away: there it stays apart.
            merge = precision in UNQUANTIZED or (precision == "int8" and not gpus)
            with translate_errors(adapter):
                adapted: Any = load_adapter(model, checkpoint)
                if not merge:
                    check_stays_beside(adapted, adapter, precision)
                model = merge_adapter(adapted) if merge else adapted.get_base_model()
        if packs:
            finish_packed(model)
        if precision == "int8" and not gpus:
            quantize_int8(model)
        if precision == "nf4" and gpus:
            speed_up_nf4(model)
    model.eval().requires_grad_(False)
    if part:
        why = ""  # divided() has said it
    draft = read_draft(checkpoint, model, progress)
    if checkpoint.draft and draft is None:
        why = (
            f"{why} DRAFT_MODEL is left out: on a GPU it guesses for a Llama in 16 bits or fewer that is whole on one."
        )
    why = f"{why} {said_of_base(checkpoint.all_adapters, checkpoint.base)}".rstrip()
    loaded = Loaded(model, f"{checkpoint.why} {why}".rstrip(), needed_bytes, part, adapters, draft)
    if loaded.precision != precision:
        return replace(loaded, why=f"{loaded.why} Not all of its layers can be in {precision}.")
    return loaded


def check_precision(precision: str) -> None:
    """Raise ModelUnavailable for one in which load_base() loads no model here."""
    if precision != "int4":
        return
    gpus = visible_gpus()
    if not gpus:
        raise ModelUnavailable(NO_INT4)
    if reason := why_not_packed(gpus):
        raise ModelUnavailable(f"int4 is not to be had here: {reason}. Choose nf4, or see the log.")


def load_base(
    checkpoint: Checkpoint, precision: str, device: str | int, progress: Progress, divisible: bool = False
) -> PreTrainedModel:
    """The model without its adapter, whole on one device, to be trained or merged rather than served.

    precision: one of UNQUANTIZED; "nf4" or "int8" by bitsandbytes, which computes in what suits the device; or "int4",
    on a GPU, to be looked at and not trained. Weights that come in NF4 stay as they are where NF4 is asked for.
    divisible: let FSDP divide it among GPUs.
    """
    check_precision(precision)
    files, gpus = checkpoint.base, visible_gpus()
    size, dtype = measure(files), compute_dtype(gpus)
    files = bring_base(checkpoint, precision, progress)
    configs: dict[str, Any] = {"nf4": nf4_config(dtype, divisible), "int8": int8_config(), "int4": PackedConfig("int4")}
    needed_bytes = size.needed_bytes(precision, 0)
    with translate_out_of_memory(str(files), precision, needed_bytes), translate_errors(files):
        own = getattr(torch, precision) if precision in UNQUANTIZED else dtype
        comes_so = quantization_of(read_config(files)) is not None
        model = read_model(files, own, None if comes_so else configs.get(precision), {"": device})
        if comes_so:
            adopt_nf4(model, dtype, divisible)
        if precision == "int4":
            finish_packed(model)
        return model


def bring_base(checkpoint: Checkpoint, precision: str, progress: Progress) -> Files:
    """Have what load_base() reads on this disk."""
    if precision != "nf4" or not comes_in_nf4(read_config(checkpoint.base)):
        return bring_plain(checkpoint, progress)
    bring_weights(checkpoint.base, progress)
    return checkpoint.base


def bring_weights(files: Files, progress: Progress) -> None:
    """Have them on this disk in a format that transformers reads."""
    if files.original:
        convert_weights(files, progress)
    else:
        fetch_weights(files, progress)


def bring_plain(checkpoint: Checkpoint, progress: Progress) -> Files:
    """Have its weights on this disk as they are read, unpacked if they come quantised."""
    config = read_config(checkpoint.base)
    if not quantization_of(config):
        bring_weights(checkpoint.base, progress)
        return checkpoint.base
    check_room(checkpoint.base, config, checkpoint.cache_dir)
    bring_weights(checkpoint.base, progress)
    with translate_errors(checkpoint.base):
        return unpacked(checkpoint.base, config, checkpoint.cache_dir)


def _load_for_serving(
    files: Files, precision: str, size: Size, gpus: Sequence[Gpu], packs_in: Path | None, part: Part | None
) -> PreTrainedModel:
    """packs_in: the cache for packed weights; None if these are not to be packed. part: None for all of the model."""
    device_map, max_memory = choose_device_map(precision, size, gpus)
    if part is not None and gpus:
        device_map = {"": part.rank}
    dtype, config = compute_dtype(gpus), None
    if precision == "float32":
        dtype = torch.float32
    elif precision == "nf4":
        config = nf4_config(dtype)
    elif precision == "int8" and gpus and not packs_in:
        config, dtype = int8_config(), torch.float16  # it computes in float16 and would cast
    if packs_in:
        model = read_packed(files, precision, packs_in, dtype, device_map, max_memory, part)
    else:
        model = read_model(files, dtype, config, device_map, max_memory, part)
    if isinstance(device_map, dict):
        remove_hook_from_module(model, recurse=True)  # they move inputs between devices, and there is only one
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) and gpus:
        raise torch.OutOfMemoryError("some layers did not fit on the GPUs")
    return model
