"""PEFT adapters: beside the weights of their base, or in them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.disk import Files
from llama2_chat.loading.read import load_tokenizer, translate_errors

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("llama2_chat")

EMBEDDING = re.compile(r"(embed_tokens|lm_head)\.weight$")  # in an adapter that holds one whole


def load_adapter(model: PreTrainedModel, checkpoint: Checkpoint, is_trainable: bool = False) -> PeftModel:
    """The base model with the checkpoint's adapter beside its weights."""
    from peft import PeftModel

    adapter = checkpoint.adapter
    assert adapter is not None
    with translate_errors(adapter):
        embeddings: Any = model.get_input_embeddings()
        vocabulary = max(len(load_tokenizer(checkpoint)), _embedding_rows(adapter))
        if vocabulary > embeddings.num_embeddings:
            model.resize_token_embeddings(vocabulary)
        adapted = PeftModel.from_pretrained(model, adapter.folder, is_trainable=is_trainable)
    warn_of_another_base(adapter, str(adapted.active_peft_config.base_model_name_or_path), checkpoint.base)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelUnavailable(
            f"{adapter} is a prompt, not LoRA or a similar adapter, and cannot be used. Choose another."
        )
    return adapted


def warn_of_another_base(adapter: Files, made_for: str, base: Files) -> None:
    """Log it if an adapter that was made for the base of this name is used on another one."""
    if not _is_made_for(adapter, made_for, base):
        used_on = base.repo or str(base.folder)
        log.warning("The adapter %s was made for %s and is used on %s: check BASE_MODEL.", adapter, made_for, used_on)


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
