"""PEFT adapters: beside the weights of their base, or in them."""

from __future__ import annotations

import itertools
import json
import logging
import re
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.disk import Files
from llama2_chat.loading.hub import cached_repo
from llama2_chat.loading.read import load_tokenizer, translate_errors
from llama2_chat.text import first_line

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger("llama2_chat")

EMBEDDING = re.compile(r"(embed_tokens|lm_head)\.weight$")  # in an adapter that holds one whole
# Tensors with a row, or else a column, for each token of the vocabulary.
OF_ALL_TOKENS = re.compile(r"(embed_tokens|lm_head)\.(weight|lora_B\.weight|(?P<columns>lora_embedding_A))$")
# Ways to begin that change the base by data, or on a GPU, that are not here: PEFT cannot do it again.
NOT_REPEATED = ("corda", "loftq", "lora_ga")
SUBTRACTED = ("pissa", "olora")  # ways to begin with a part of the base, which is taken away from it
RESIDUAL = 0.5  # a base that has less than this in the directions of an adapter is what was left of another
INSIDE = re.compile(r"\.(base_layer|modules_to_save|original_module)\b")  # of what PEFT puts around a layer


def load_adapter(model: PreTrainedModel, checkpoint: Checkpoint, is_trainable: bool = False) -> PeftModel:
    """The base model with the checkpoint's adapter beside its weights."""
    from peft import PeftConfig, PeftModel

    adapter = checkpoint.adapter
    assert adapter is not None
    with translate_errors(adapter):
        check_kind(adapter)
        config: Any = None  # the adapter's own
        if begins_by(adapter).startswith(SUBTRACTED) and _is_residual(model, adapter):
            log.info("%s is what the beginning of %s left of its base", checkpoint.base, adapter)
            config = PeftConfig.from_pretrained(str(adapter.folder))
            config.init_lora_weights = True  # else PEFT would take the beginning away once more
        elif "_niter_" in begins_by(adapter):
            raise ModelUnavailable(
                f"The adapter {adapter} begins with a part of its base that is found by chance (init_lora_weights: "
                f"{begins_by(adapter)}), and it would not be the same one here. Set BASE_MODEL to the residual base "
                "that was saved with it, or merge it where it was trained."
            )
        embeddings: Any = model.get_input_embeddings()
        vocabulary = max(len(load_tokenizer(checkpoint)), _embedding_rows(adapter))
        if vocabulary > embeddings.num_embeddings:
            model.resize_token_embeddings(vocabulary)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are refused below
                adapted = PeftModel.from_pretrained(model, adapter.folder, is_trainable=is_trainable, config=config)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelUnavailable(
                f"The adapter {adapter} cannot be put on {checkpoint.base}: {first_line(error)}. Check BASE_MODEL and "
                "its adapter_config.json."
            ) from error
        _check_tensors(adapted, adapter)
    warn_of_another_base(adapter, checkpoint.base)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelUnavailable(
            f"{adapter} is a prompt, not LoRA or a similar adapter, and cannot be used. Choose another."
        )
    return adapted


def check_kind(adapter: Files) -> None:
    """Raise ModelUnavailable for LoRA that would answer otherwise than it was made to, or without a word not at all."""
    config = _read_json(adapter.folder / "adapter_config.json")
    if config.get("alora_invocation_tokens"):
        raise ModelUnavailable(
            f"The adapter {adapter} is an activated LoRA, which some tokens switch on (alora_invocation_tokens), and "
            "this program cannot. Choose one that is plain LoRA."
        )
    begins = begins_by(adapter)
    if begins.startswith(NOT_REPEATED):
        raise ModelUnavailable(
            f"The adapter {adapter} belongs to a base that was changed before its training (init_lora_weights: "
            f"{begins}), and that cannot be repeated here. Merge it where it was trained, and set MODEL_ID to that."
        )


def begins_by(adapter: Files) -> str:
    """What its init_lora_weights says, in small letters: "true", "pissa", "pissa_niter_4", ..."""
    return str(_read_json(adapter.folder / "adapter_config.json").get("init_lora_weights", True)).lower()


def _is_residual(model: PreTrainedModel, adapter: Files) -> bool:
    """Whether the base is what was left of another one, once the beginning of an adapter had been subtracted.

    Its weights are then almost zero in the directions of B, in which the whole ones are larger than in others. Training
    moves B, but not by much.
    """
    from peft.utils import load_peft_weights
    from peft.utils.integrations import dequantize_module_weight

    tensors, layers = load_peft_weights(str(adapter.folder), device="cpu"), dict(model.named_modules())
    shares = []
    for name, b in itertools.islice(((name, b) for name, b in tensors.items() if name.endswith(".lora_B.weight")), 8):
        layer: Any = layers.get(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
        if not isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            continue
        weight = dequantize_module_weight(layer).detach().float().cpu()
        weight = weight if len(weight) == len(b) else weight.T  # GPT-2 keeps them the other way round
        if len(weight) == len(b):
            directions = torch.linalg.qr(b.float()).Q  # [out_features, r]
            share = (directions.T @ weight).square().sum() / weight.square().sum()
            shares.append(float(share) * len(b) / b.shape[1])  # 1 in any directions
    return bool(shares) and statistics.median(shares) < RESIDUAL


def _check_tensors(adapted: PeftModel, adapter: Files) -> None:
    """Raise ModelUnavailable if tensors of the adapter are missing, or belong nowhere: PEFT leaves them out, and the
    base answers as if it had none. load_adapter() has seen to embeddings that are saved whole."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = adapted.active_peft_config
    if config.is_prompt_learning:
        return
    if getattr(config, "layer_replication", None):
        raise ModelUnavailable(
            f"The adapter {adapter} repeats layers of its base, which this program cannot. Merge it."
        )
    here, expected = (
        {name for name in tensors if not EMBEDDING.search(INSIDE.sub("", name))}
        for tensors in (
            load_peft_weights(str(adapter.folder), device="cpu"),
            get_peft_model_state_dict(adapted, save_embedding_layers=False),
        )
    )
    if wrong := sorted(expected - here) or sorted(here - expected):
        what = "lacks" if expected - here else "holds tensors for no layer of its base, such as"
        raise ModelUnavailable(
            f"The adapter {adapter} {what} {wrong[0]}, so it would change other answers than it was made to, or none. "
            "Check BASE_MODEL, or copy or save the adapter again."
        )


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
    if repo := cached_repo(name):
        return repo
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


def check_stays_beside(adapted: PeftModel, adapter: Files, precision: str) -> None:
    """Raise ModelUnavailable for a kind of adapter that PEFT computes beside plain weights only."""
    kind = str(getattr(adapted.active_peft_config.peft_type, "value", adapted.active_peft_config.peft_type))
    if kind in ("IA3", "LOHA", "LOKR"):
        raise ModelUnavailable(
            f"The adapter {adapter} is {kind}, which cannot stay beside weights in {precision}. Set QUANTIZATION=none, "
            "and it is merged into its base."
        )


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
    try:
        return merged.merge_and_unload()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelUnavailable(
            f"The adapter cannot be merged into its base: {first_line(error)}. Merge it where it was trained."
        ) from error


def _embedding_rows(adapter: Files) -> int:
    """Of the embedding that an adapter was made for, perhaps padded to a multiple of 64; 0 if it changes none."""
    from peft.utils import load_peft_weights

    tensors = load_peft_weights(str(adapter.folder), device="cpu")
    found = [(OF_ALL_TOKENS.search(name), tensor) for name, tensor in tensors.items()]
    return max((tensor.shape[1 if name["columns"] else 0] for name, tensor in found if name), default=0)
