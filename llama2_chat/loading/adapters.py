"""PEFT adapters: beside the weights of their base, or in them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
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
    warn_of_another_base(adapter, checkpoint.base)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelUnavailable(
            f"{adapter} is a prompt, not LoRA or a similar adapter, and cannot be used. Choose another."
        )
    return adapted


def warn_of_another_base(adapter: Files, base: Files) -> None:
    """Log it if an adapter that was made for another base is used on this one."""
    if (made_for := other_base(adapter, base)) is not None:
        used_on = base.repo or str(base.folder)
        log.warning("The adapter %s was made for %s and is used on %s: check BASE_MODEL.", adapter, made_for, used_on)


def said_of_base(adapters: Iterable[Files], base: Files) -> str:
    """A sentence, for visitors too, on the first adapter that was made for another base; "" if all fit."""
    for adapter in adapters:
        if (made_for := other_base(adapter, base)) is not None:
            names = (
                _short(str(adapter.repo or adapter.folder)),
                _short(made_for),
                _short(base.repo or str(base.folder)),
            )
            return "The adapter {} was made for {} and is used on {}: it may answer wrongly.".format(*names)
    return ""


def other_base(adapter: Files, base: Files) -> str | None:
    """The base that an adapter was made for, if it is another than this one; None also where nothing says so.

    By the fingerprint that a training here leaves in run.json, or else by the name: of two on the Hub the whole of it,
    of a folder its last part.
    """
    made_for = _read_json(adapter.folder / "adapter_config.json").get("base_model_name_or_path")
    if not made_for:
        return None
    trained_on = _read_json(adapter.folder / "run.json").get("model_sha256")
    if trained_on and not base.missing():
        return None if trained_on == base.fingerprint() else str(made_for)
    ours, theirs = _hub_name(base.repo or str(base.folder)), _hub_name(str(made_for))
    if not ("/" in ours and "/" in theirs):
        ours, theirs = ours.rpartition("/")[2], theirs.rpartition("/")[2]
    return None if ours.casefold() == theirs.casefold() else str(made_for)


def _hub_name(name: str) -> str:
    """A repository's, of a copy in the Hub's cache too; of another folder the last part."""
    if cached := re.search(r"models--([^/\\]+)--([^/\\]+)", name):
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else _short(name)


def _short(name: str) -> str:
    """As visitors may read it: no folders of this computer."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


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
