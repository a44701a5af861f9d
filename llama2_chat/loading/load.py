"""Weights and tokenizer of a Checkpoint into memory, ready to run, to be trained or to be merged.

load_tokenizer() comes first and needs no weights; load() and load_base() download these if they are not here. Whatever
goes wrong is a ModelUnavailable with a sentence. Nothing here knows prompts, decoding or the page.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.config import check_tokenizer_files, read_config, read_generation_config
from llama2_chat.loading.dequantize import check_readable, method_of, quantization_of
from llama2_chat.loading.disk import Files
from llama2_chat.loading.hub import Progress, fetch_weights
from llama2_chat.loading.memory import (
    MIN_CONTEXT_TOKENS,
    NO_INT4,
    DeviceMap,
    Gpu,
    Size,
    check_memory,
    choose_device_map,
    choose_precision,
    compute_dtype,
    translate_out_of_memory,
    visible_gpus,
)
from llama2_chat.loading.meta import convert_weights
from llama2_chat.loading.packing import (
    PackedConfig,
    finish_packed,
    packed_copy,
    save_packed,
    why_not_packed,
)
from llama2_chat.loading.quantize import int8_config, nf4_config, precision_of, quantize_int8, speed_up_nf4
from llama2_chat.loading.unpack import check_room, unpacked
from llama2_chat.prompt import find_ending
from llama2_chat.text import first_line, is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("llama2_chat")

EMBEDDING = re.compile(r"(embed_tokens|lm_head)\.weight$")  # in an adapter that holds one whole
UNPACKED = {"int4": "nf4", "int8": "int8"}  # what is next to a packed precision, by bitsandbytes
UNQUANTIZED = ("float32", "bfloat16", "float16")
# Tensors of older checkpoints that the model computes by itself.
HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and how it got there in words."""

    model: PreTrainedModel
    why: str
    needed_bytes: int = 0  # of GPU memory, with one conversation

    @cached_property
    def precision(self) -> str:
        """As precision_of() reads it from the layers."""
        return precision_of(self.model)

    @property
    def device(self) -> str:
        """ "cpu", "cuda:0", "2 x cuda"."""
        devices = {parameter.device for parameter in self.model.parameters()}
        return str(devices.pop()) if len(devices) == 1 else f"{len(devices)} x cuda"


# ---- Before there are weights ----


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer and template, if it has them, else those of the model."""
    files, adapter = checkpoint.base, checkpoint.adapter
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if adapter and any((adapter.folder / name).is_file() for name in names):
        files = adapter
    check_tokenizer_files(files)
    with translate_errors(files):
        config = read_config(files) if files is checkpoint.base else None
        tokenizer = AutoTokenizer.from_pretrained(files.folder, config=config, trust_remote_code=False)
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if getattr(tokenizer, name) == "":  # there is none; as a token it would be looked up, without an end
            setattr(tokenizer, name, None)
    return tokenizer


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> set[int]:
    """The ids that end an answer: the tokenizer's EOS, those of the generation config, and the chat template's."""
    ends = generation.eos_token_id if generation is not None else None
    named = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return named | find_ending(tokenizer).ids


def measure(files: Files) -> Size:
    """What the model will weigh. Needs its configuration and the names of its weights, not the weights."""
    with translate_errors(files):
        config = read_config(files)
        read_generation_config(files)  # refused before the weights are fetched, if it is
        size = Size.of(config)
    if quantization := quantization_of(config):
        check_readable(files, quantization)
        return replace(size, comes_in=method_of(quantization))
    return size


def check_headers(files: Files) -> None:
    """Raise ModelUnavailable if a file of weights is here but cut off or a Git LFS pointer. Reads only its header."""
    with translate_errors(files):
        for name in files.weights():
            if name.endswith(".safetensors") and (files.folder / name).is_file():
                with safe_open(files.folder / name, "pt"):
                    pass


# ---- Loading ----


def load(checkpoint: Checkpoint, progress: Progress) -> Loaded:
    """Download the weights if they are not here, after checking that they will fit, and load them."""
    files, adapter, gpus = checkpoint.base, checkpoint.adapter, visible_gpus()
    size = measure(files)
    precision, why = choose_precision(checkpoint.quantization, size, gpus)
    check_memory(quoted(checkpoint.model_id), precision, size, gpus)
    if size.comes_in:
        check_room(files, read_config(files), checkpoint.cache_dir)
    bring_weights(files, progress)
    if adapter:
        fetch_weights(adapter, progress)
    progress("load", 0, 0)
    if size.comes_in:
        with translate_errors(files):
            files = unpacked(files, read_config(files), checkpoint.cache_dir)
        why = f"Its weights came quantised by {size.comes_in} and were unpacked. {why}"
    packs = precision in UNPACKED and bool(gpus)
    if packs and (reason := why_not_packed(gpus)):
        packs, precision = False, UNPACKED[precision]
        why = f"{why} Its products are those of bitsandbytes, since {reason}."
    needed_bytes = size.needed_bytes(precision, MIN_CONTEXT_TOKENS)
    with translate_out_of_memory(quoted(checkpoint.model_id), precision, needed_bytes):
        with translate_errors(files):
            model = _load_for_serving(files, precision, size, gpus, checkpoint.cache_dir if packs else None)
        if adapter:
            # In 4 or 8 bits merging would round the change away: there it stays apart.
            merge = precision in UNQUANTIZED or (precision == "int8" and not gpus)
            with translate_errors(adapter):
                adapted: Any = load_adapter(model, checkpoint)
                model = merge_adapter(adapted) if merge else adapted.get_base_model()
        if packs:
            finish_packed(model)
    if precision == "int8" and not gpus:
        quantize_int8(model)
    if precision == "nf4" and gpus:
        speed_up_nf4(model)
    model.eval().requires_grad_(False)
    loaded = Loaded(model, f"{checkpoint.why} {why}", needed_bytes)
    if loaded.precision != precision:
        return replace(loaded, why=f"{loaded.why} Not all of its layers can be in {precision}.")
    return loaded


def load_base(checkpoint: Checkpoint, precision: str, device: str | int, progress: Progress) -> PreTrainedModel:
    """The model without its adapter, whole on one device, to be trained or merged rather than served.

    precision: one of UNQUANTIZED; "nf4" or "int8" by bitsandbytes, which computes in what suits the device; or "int4",
    on a GPU, to be looked at and not trained.
    """
    files, gpus = checkpoint.base, visible_gpus()
    if precision == "int4" and not gpus:
        raise ModelUnavailable(NO_INT4)
    size, dtype = measure(files), compute_dtype(gpus)
    if method := size.comes_in:
        raise ModelUnavailable(f"{files} comes quantised by {method}. Choose the original weights to train or merge.")
    bring_weights(files, progress)
    configs: dict[str, Any] = {"nf4": nf4_config(dtype), "int8": int8_config(), "int4": PackedConfig("int4")}
    needed_bytes = size.needed_bytes(precision, 0)
    with translate_out_of_memory(str(files), precision, needed_bytes), translate_errors(files):
        own = getattr(torch, precision) if precision in UNQUANTIZED else dtype
        model = _read(files, own, configs.get(precision), {"": device})
        if precision == "int4":
            finish_packed(model)
        return model


def bring_weights(files: Files, progress: Progress) -> None:
    """Have them on this disk in a format that transformers reads."""
    if files.original:
        convert_weights(files, progress)
    else:
        fetch_weights(files, progress)


def load_adapter(model: PreTrainedModel, checkpoint: Checkpoint) -> PeftModel:
    """The base model with the checkpoint's adapter beside its weights."""
    from peft import PeftModel

    adapter = checkpoint.adapter
    assert adapter is not None
    with translate_errors(adapter):
        embeddings: Any = model.get_input_embeddings()
        vocabulary = max(len(load_tokenizer(checkpoint)), _embedding_rows(adapter))
        if vocabulary > embeddings.num_embeddings:
            model.resize_token_embeddings(vocabulary)
        adapted = PeftModel.from_pretrained(model, adapter.folder)
    made_for = str(adapted.active_peft_config.base_model_name_or_path)
    if not _is_made_for(adapter, made_for, checkpoint.base):
        base = checkpoint.base.repo or str(checkpoint.base.folder)
        log.warning("The adapter %s was made for %s and is used on %s: check BASE_MODEL.", adapter, made_for, base)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelUnavailable(
            f"{adapter} is a prompt, not LoRA or a similar adapter, and cannot be used. Choose another."
        )
    return adapted


def _is_made_for(adapter: Files, name: str, base: Files) -> bool:
    """By the fingerprint that a training here leaves in run.json, or else by the name of the base."""
    try:
        trained_on = json.loads((adapter.folder / "run.json").read_text("utf-8"))["model_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        trained_on = None
    return trained_on == base.fingerprint() if trained_on else Path(name).name == Path(base.repo or base.folder).name


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The base model with the adapter in its weights.

    Where embedding and output head share their weights, and the adapter changes one of them, each gets its own: else
    what is added to one would be added to the other too.
    """
    model: Any = adapted.get_base_model()
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if embedding is not layers[0] or head is not layers[1]:
        if head is not None and head.weight is embedding.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    merged: Any = adapted
    return merged.merge_and_unload()


def _embedding_rows(adapter: Files) -> int:
    """Of the embedding that an adapter holds whole, perhaps padded to a multiple of 64; 0 if it holds none."""
    rows = [0]
    for file in adapter.weights():
        if file.endswith(".safetensors"):
            with safe_open(adapter.folder / file, "pt") as opened:
                names = filter(EMBEDDING.search, opened.keys())
                rows += [opened.get_slice(name).get_shape()[0] for name in names]
    return max(rows)


def _load_for_serving(
    files: Files, precision: str, size: Size, gpus: Sequence[Gpu], packs_in: Path | None
) -> PreTrainedModel:
    """packs_in: the cache for packed weights; None if these are not to be packed."""
    device_map, max_memory = choose_device_map(precision, size, gpus)
    dtype, config = compute_dtype(gpus), None
    if precision == "float32":
        dtype = torch.float32
    elif precision == "nf4":
        config = nf4_config(dtype)
    elif precision == "int8" and gpus and not packs_in:
        config, dtype = int8_config(), torch.float16  # it computes in float16 and would cast
    if packs_in:
        model = _read_packed(files, precision, packs_in, dtype, device_map, max_memory)
    else:
        model = _read(files, dtype, config, device_map, max_memory)
    if isinstance(device_map, dict):
        remove_hook_from_module(model, recurse=True)  # they move inputs between devices, and there is only one
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) and gpus:
        raise torch.OutOfMemoryError("some layers did not fit on the GPUs")
    return model


def _read_packed(
    files: Files,
    precision: str,
    cache_dir: Path,
    dtype: torch.dtype,
    device_map: DeviceMap,
    max_memory: dict[int, int] | None,
) -> PreTrainedModel:
    """From the copy in cache_dir, which is made if there is none: what quantising leaves behind in the memory of a GPU
    is gone by then. Without room for a copy it has to do without."""
    if copy := packed_copy(files, precision, cache_dir):
        try:
            return _read(copy, dtype, None, device_map, max_memory)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            log.warning("%s is damaged and made anew", copy, exc_info=True)
            shutil.rmtree(copy.folder)
    model = _read(files, dtype, PackedConfig(precision), device_map, max_memory)
    copy = save_packed(model, files, precision, cache_dir)
    if copy is None:
        return model
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _read(copy, dtype, None, device_map, max_memory)


def _read(
    files: Files,
    dtype: torch.dtype,
    config: BitsAndBytesConfig | PackedConfig | None,
    device_map: DeviceMap,
    max_memory: dict[int, int] | None = None,
) -> PreTrainedModel:
    quantization = {"quantization_config": config} if config else {}  # None would override what config.json says
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.folder,
        config=read_config(files),
        generation_config=read_generation_config(files),
        dtype=dtype,
        **quantization,
        device_map=device_map,
        max_memory=max_memory,
        trust_remote_code=False,  # None would ask at the terminal
        output_loading_info=True,
    )
    model, report = loaded
    if lost := sorted(report["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise ValueError(f"{len(lost)} tensors are missing, such as {lost[0]}")
    if unknown := sorted(name for name in report["unexpected_keys"] if not name.endswith(HARMLESS)):
        raise ValueError(f"{len(unknown)} tensors belong to no layer, such as {unknown[0]}")
    return model


# ---- What went wrong, in words ----

# What transformers, safetensors, tokenizers and peft raise at a file that is not what it should be.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@contextmanager
def translate_errors(files: Files) -> Iterator[None]:
    """What the libraries raise while reading `files`, as a sentence; the log keeps the original."""
    try:
        yield
    except MemoryError as error:
        raise ModelUnavailable(_loading_sentence(files, "not enough memory")) from error
    except ImportError as error:
        log.warning("Loading %s: %s", files, error)
        raise ModelUnavailable(
            f"{files} needs a package that is missing or does not work here: {first_line(error)}."
        ) from error
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise  # for translate_out_of_memory() to say
        log.warning("Loading %s failed", files, exc_info=True)
        raise ModelUnavailable(_loading_sentence(files, str(error))) from error


def _loading_sentence(files: Files, error: str) -> str:
    if "trust_remote_code" in error:
        return f"{files} needs Python code of its own, which this program does not run. Choose another model."
    if "Unrecognized" in error or "model type" in error or "does not recognize this architecture" in error:
        return f"{files} is not a causal language model that this version of transformers knows. Choose another model."
    if "tensors are missing" in error:
        tied = " If its output head is its embedding, its config.json should say so: tie_word_embeddings."
        head = tied if "such as lm_head" in error else ""
        return f"The weights of {files} are damaged or incomplete: {error}. Copy or download them again.{head}"
    if "belong to no layer" in error:
        return f"{files} holds more than its config.json says: {error}. It would answer wrongly. Choose another copy."
    if "size mismatch" in error:
        return f"The weights of {files} do not fit their model. An adapter needs its own base: check BASE_MODEL."
    if "CUDA" in error:
        return f"The GPU reported an error while loading {files}. See the log, and whether nvidia-smi works here."
    if "t allocate memory" in error or "not enough memory" in error:
        return f"Memory ran out while loading {files}. Choose a smaller model or a machine with more."
    if "bitsandbytes" in error.lower() or "bnb" in error.lower():
        return f"bitsandbytes does not work here, so {files} cannot be quantised. Set QUANTIZATION=none."
    if files.repo:
        copy = quoted(files.folder.parents[1])
        return f"A file of {files} is damaged. Remove {copy} and start again to download it again."
    return f"A file in {files} is damaged, missing or not what its name says. Copy or save the model there again."
