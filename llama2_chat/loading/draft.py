"""DRAFT_MODEL: what guesses for a model, an EAGLE head or a small model with its vocabulary, checked and read."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.config import TOKENIZER_FILES, read_config, translate_config_errors
from llama2_chat.loading.disk import Files, translate_parse_errors
from llama2_chat.loading.hub import Progress, fetch_weights
from llama2_chat.loading.memory import translate_out_of_memory
from llama2_chat.loading.quantize import precision_of, quantize_int8
from llama2_chat.loading.read import load_tokenizer, read_model, translate_errors

FITS = "DRAFT_MODEL must be a head that was trained for this model, or a small model with the same vocabulary"


def check_draft(checkpoint: Checkpoint) -> PreTrainedConfig | None:
    """Raise ModelUnavailable for a DRAFT_MODEL that cannot guess for this model, as far as it can be told without its
    weights: by its configuration, and by its tokenizer if it has one.

    Returns the configuration of a small model: whether the engine can compute it is for others to say.
    """
    if (files := checkpoint.draft) is None:
        return None
    served: Any = read_config(checkpoint.base)
    text = served.get_text_config()
    if has_tokenizer(files):
        small: Any = read_config(files)
        _check_size(files, small.get_text_config().vocab_size, text.vocab_size)
        other = load_tokenizer(Checkpoint(str(files), "", "none", files, checkpoint.cache_dir))
        if other.get_vocab() != load_tokenizer(checkpoint).get_vocab():
            raise _does_not_fit(files, "its tokenizer has other tokens than the model's")
        return small
    with translate_parse_errors(files):
        config = json.loads((files.folder / "config.json").read_text("utf-8"))
        size, hidden = (int(config[name]) for name in ("vocab_size", "hidden_size"))
        layers = [int(behind) for behind in config.get("feature_layers", [])]
        count = int(config.get("num_hidden_layers", 1))
    _check_size(files, size, text.vocab_size)
    if hidden != text.hidden_size:
        raise _does_not_fit(
            files, f"it goes on from {hidden:,} numbers a token, and the model has {text.hidden_size:,}"
        )
    if odd := [behind for behind in layers if not 0 < behind <= text.num_hidden_layers]:
        raise _does_not_fit(files, f"it goes on from layer {odd[0]}, and the model has {text.num_hidden_layers}")
    if count > text.num_hidden_layers:  # each takes memory, also without weights
        raise _does_not_fit(files, f"it has {count:,} layers, and the model {text.num_hidden_layers}")
    _outline(files, _head_config(files))
    return None


def has_tokenizer(files: Files) -> bool:
    """Whether it is a model of its own; heads have none."""
    return any((files.folder / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer.model"))


def read_draft(
    checkpoint: Checkpoint, model: PreTrainedModel, progress: Progress
) -> EagleHead | PreTrainedModel | None:
    """What guesses for this model, beside it: in 8 bits where it is on a CPU and in 8 bits, else in 16 or 32. None if
    nothing was asked for, or if nothing can be guessed for this model."""
    files = checkpoint.draft
    if files is None or not can_have_guesses(model):
        return None
    fetch_weights(files, progress)
    precision = precision_of(model)
    needed = sum(files.weights().values())
    with translate_out_of_memory(str(files), precision, needed), translate_errors(files):
        if has_tokenizer(files):
            draft: EagleHead | PreTrainedModel = read_model(files, model.dtype, None, {"": "cpu"})
        else:
            draft = read_head(files)
        if precision == "int8" and model.device.type == "cpu":
            quantize_int8(draft)
        else:
            nn.Module.to(draft, model.device)
            for weight in draft.parameters():  # not what rotary positions are computed from
                if weight.is_floating_point():
                    weight.data = weight.data.to(model.dtype)
    return draft.eval().requires_grad_(False)


def can_have_guesses(model: PreTrainedModel) -> bool:
    """On a CPU any model; on a GPU what has recorded steps there."""
    devices = {parameter.device for parameter in model.parameters()}
    on_gpu = type(model) is LlamaForCausalLM and len(devices) == 1 and model.dtype == torch.bfloat16
    return model.device.type == "cpu" or on_gpu


def read_head(files: Files) -> EagleHead:
    """Raises ModelUnavailable for weights of something else, and whatever libraries raise at damaged files."""
    tensors: dict[str, Tensor] = {}
    for name in files.weights():
        file = files.folder / name
        tensors |= load_file(file) if name.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise _does_not_fit(files, f"{odd[0]!r:.40} is no name of a tensor")
    tensors.pop("embed_tokens.weight", None)  # a copy of the model's
    if "fc.weight" not in tensors:
        raise _does_not_fit(files, "it has no tokenizer, and is no head of EAGLE's first kind")
    if odd := [name for name, states in tensors.items() if not isinstance(states, Tensor)]:
        raise _does_not_fit(files, f"{odd[0]} is no tensor")
    for name in [name for name in tensors if name.endswith("_scale")]:
        whole = name.removesuffix("_scale")
        tensors[whole] = tensors[whole].float() * tensors.pop(name).unsqueeze(-1)
    ids = tensors.pop("ids", None)
    config = _head_config(files)
    kinds: dict[str, Any] = {
        "bias": "fc.bias" in tensors,
        "input_norm": "layers.0.input_layernorm.weight" in tensors,
        "vocabulary": None if ids is None else ids.long(),
    }
    if ids is not None and not (ids.dim() == 1 and len(ids) and ids.min() >= 0 and ids.max() < config.vocab_size):
        raise _does_not_fit(files, "the tokens among which it guesses are none of the model's")
    outline = _outline(files, config, **kinds).state_dict()
    wanted = {name: states.shape for name, states in outline.items() if name != "ids"}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise _does_not_fit(files, f"it is a head of another kind than EAGLE's first ({odd[0]})")
    if odd := [name for name, shape in wanted.items() if tensors[name].shape != shape]:
        raise _does_not_fit(files, f"{odd[0]} has another shape than its config.json says")
    if odd := [name for name, states in tensors.items() if not states.isfinite().all()]:
        raise _does_not_fit(files, f"{odd[0]} holds what are no numbers: it is damaged, or its training failed")
    head = EagleHead(config, **kinds)
    head.load_state_dict(tensors, strict=False)
    return head


def _check_size(files: Files, size: int, wanted: int) -> None:
    if size != wanted:
        raise _does_not_fit(files, f"it knows {size:,} tokens, and the model {wanted:,}")


def _head_config(files: Files) -> LlamaConfig:
    with translate_config_errors(files):
        return LlamaConfig.from_dict(json.loads((files.folder / "config.json").read_text("utf-8")))


def _outline(files: Files, config: LlamaConfig, **kinds: Any) -> EagleHead:
    """The head without its numbers: whatever its configuration says, it takes no memory for them."""
    with translate_config_errors(files), torch.device("meta"):
        return EagleHead(config, **kinds)


def _does_not_fit(files: Files, why: str) -> ModelUnavailable:
    return ModelUnavailable(f"{files} cannot guess for this model: {why}. {FITS}.")
