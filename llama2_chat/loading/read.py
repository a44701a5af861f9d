"""What transformers reads from a folder, the tokenizer and the weights, and in words what goes wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.config import check_tokenizer_files, read_config, read_generation_config
from llama2_chat.loading.disk import Files
from llama2_chat.loading.memory import DeviceMap
from llama2_chat.loading.parts import Part
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

# Tensors of older checkpoints that the model computes by itself.
HARMLESS = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
CAUSAL_MASKS = {"gpt_neo": "attention.bias", "gptj": "attn.bias"}  # by the model's type: of others it may be a bias


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer and template, if it has them, else those of the model."""
    files, adapter = checkpoint.base, checkpoint.adapter
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if adapter and any((adapter.folder / name).is_file() for name in names):
        files = adapter
    check_tokenizer_files(files)
    with translate_errors(files):
        config = read_config(files) if files is checkpoint.base else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(files.folder, config=config, trust_remote_code=False)
        except AttributeError as error:  # JSON, but not of what it should be
            raise ValueError("tokenizer_config.json") from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ModelUnavailable(f"The chat template of {files} is no text. Correct it, or remove it.")
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if getattr(tokenizer, name) == "":  # there is none; as a token it would be looked up, without an end
            setattr(tokenizer, name, None)
    return tokenizer


def read_model(
    files: Files,
    dtype: torch.dtype,
    config: QuantizationConfigMixin | None,
    device_map: DeviceMap,
    max_memory: dict[Any, int] | None = None,
    part: Part | None = None,
) -> PreTrainedModel:
    """max_memory: how many bytes each GPU, and "cpu", may take. part: what of the model; None for all of it."""
    quantization = {"quantization_config": config} if config else {}  # None would override what config.json says
    source: dict[str, Any] = {"pretrained_model_name_or_path": files.folder, "config": read_config(files)}
    read: Any = AutoModelForCausalLM.from_pretrained
    if part is not None:
        source = {"pretrained_model_name_or_path": None, "config": part.config(source["config"])}
        source["state_dict"], read = part.weights(files), LlamaForCausalLM.from_pretrained
    loaded: Any = read(
        **source,
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
    harmless = (*HARMLESS, *filter(None, [CAUSAL_MASKS.get(model.config.model_type)]))
    if unknown := sorted(name for name in report["unexpected_keys"] if not name.endswith(harmless)):
        raise ValueError(f"{len(unknown)} tensors belong to no layer, such as {unknown[0]}")
    return model


# ---- What went wrong, in words ----

# What transformers, safetensors, tokenizers and peft raise at a file that is not what it should be.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@contextmanager
def translate_errors(files: Files) -> Iterator[None]:
    """What the libraries raise while reading `files`, as a sentence; the log keeps the original."""
    try:
        yield
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
    if "ignore_mismatched_sizes" in error:
        return (
            f"The weights of {files} have other shapes than its config.json says; the log names them. Copy or download "
            "both again."
        )
    if "size mismatch" in error:
        return f"The weights of {files} do not fit their model. An adapter needs its own base: check BASE_MODEL."
    if "CUDA" in error:
        return f"The GPU reported an error while loading {files}. See the log, and whether nvidia-smi works here."
    if "bitsandbytes" in error.lower() or "bnb" in error.lower():
        return f"bitsandbytes does not work here, so {files} cannot be quantised. Set QUANTIZATION=none."
    if files.repo:
        copy = quoted(files.folder.parents[1])
        return f"A file of {files} is damaged. Remove {copy} and start again to download it again."
    return f"A file in {files} is damaged, missing or not what its name says. Copy or save the model there again."
