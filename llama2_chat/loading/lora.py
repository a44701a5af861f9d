"""Adapters of which each request chooses one: what can be served so, and reading it. Nothing is put into weights here.

Only LoRA on linear layers can: it is added to what a layer gives, whatever is in the layer's weights and in how many
bits. What changes more than that is refused by name, and can still be served alone, as MODEL_ID.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from llama2_chat import prompt
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.lora import LoraWeights
from llama2_chat.loading.adapters import check_kind, warn_of_another_base
from llama2_chat.loading.choose import Checkpoint, NamedAdapter
from llama2_chat.loading.config import read_config
from llama2_chat.loading.disk import translate_parse_errors
from llama2_chat.loading.read import load_tokenizer, translate_errors

TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
# Fields of LoraConfig that ask for more than LoRA, and what that is.
MORE_THAN_LORA = {
    "use_dora": "it is DoRA, which scales whole layers",
    "modules_to_save": "it brings whole layers of its own",
    "trainable_token_indices": "it changes the embeddings of tokens",
    "lora_bias": "it adds biases",
    "target_parameters": "it changes parameters outside of linear layers",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it is switched on by tokens",
    "use_qalora": "it is QALoRA",
}
# Ways to begin, after which the adapter belongs to a base that was changed, too.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A conversation that two chat templates would hardly write alike by accident.
PROBE: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
]

Shapes = Mapping[str, tuple[int, int]]  # in_features and out_features of the linear layers of a model, by their names


def check_adapters(checkpoint: Checkpoint) -> None:
    """Raise ModelUnavailable for adapters that cannot be used, or not be chosen per request over this base, as far as
    it can be told: by their configurations and tokenizers, and by the headers of weights that are here."""
    if checkpoint.adapter:
        check_kind(checkpoint.adapter)
    shapes = _shapes(read_config(checkpoint.base)) if checkpoint.adapters else {}
    for adapter in checkpoint.adapters:
        _check_config(adapter)
        _check_tokenizer(checkpoint, adapter)
        with translate_errors(adapter.files):
            for name in adapter.files.weights():
                if name.endswith(".safetensors") and (adapter.files.folder / name).is_file():
                    with safe_open(adapter.files.folder / name, "pt") as file:
                        keys = file.keys()
                        found = {key: file.get_slice(key).get_shape() for key in keys}
                        _check_tensors(checkpoint, adapter, shapes, found)


def read_adapters(checkpoint: Checkpoint) -> tuple[LoraWeights, ...]:
    """The adapters of a checkpoint, whose weights are here, in float32 on the CPU."""
    shapes = _shapes(read_config(checkpoint.base)) if checkpoint.adapters else {}
    return tuple(_read(checkpoint, adapter, shapes) for adapter in checkpoint.adapters)


def _shapes(config: PreTrainedConfig) -> Shapes:
    """Of the layers that an adapter may change: the output head is none of them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head, shapes = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            shapes[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            shapes[name] = module.nx, module.nf
    return shapes


def _check_config(adapter: NamedAdapter) -> dict[str, Any]:
    with translate_parse_errors(adapter.files):
        config: dict[str, Any] = json.loads((adapter.files.folder / "adapter_config.json").read_text("utf-8"))
        kind, begins = config["peft_type"], str(config.get("init_lora_weights", True)).lower()
    if kind != "LORA":
        raise _not_per_request(adapter, f"it is {kind}, and only LoRA can")
    for field, what in MORE_THAN_LORA.items():
        if config.get(field):
            raise _not_per_request(adapter, f"{what} ({field})")
    if config.get("bias", "none") != "none":
        raise _not_per_request(adapter, "it changes biases (bias)")
    if begins.startswith(CHANGES_THE_BASE):
        raise _not_per_request(adapter, f"it belongs to a base that was changed as well (init_lora_weights: {begins})")
    return config


def _not_per_request(adapter: NamedAdapter, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"The adapter {adapter.name} cannot be chosen per request: {why}. Leave it out of ADAPTERS, or serve it alone: "
        f"MODEL_ID={adapter.files}."
    )


def _check_tokenizer(checkpoint: Checkpoint, adapter: NamedAdapter) -> None:
    """All adapters are asked in the words of their base."""
    if _probe_ids(replace(checkpoint, adapter=adapter.files)) != _probe_ids(checkpoint):
        raise _not_per_request(
            adapter, "it comes with a tokenizer or chat template of its own, which writes a conversation otherwise"
        )


def _probe_ids(checkpoint: Checkpoint) -> list[int]:
    tokenizer = load_tokenizer(checkpoint)
    chat_format = prompt.checked_format(tokenizer, checkpoint.chat_format)
    if chat_format == prompt.NO_FORMAT:
        return [len(tokenizer), *prompt.encode_text(tokenizer, "\n".join(each["content"] for each in PROBE))]
    return [len(tokenizer), *prompt.encode(tokenizer, PROBE, chat_format)]


def _check_tensors(
    checkpoint: Checkpoint, adapter: NamedAdapter, shapes: Shapes, tensors: Mapping[str, Sequence[int]]
) -> None:
    """tensors: the shapes of its tensors by their names; A is [rank, in] and B [out, rank] of a layer."""
    for key, shape in tensors.items():
        found = TENSOR.fullmatch(key)
        layer = found["layer"] if found else key.removeprefix("base_model.model.")
        if found is None or layer.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise _not_per_request(adapter, f"it changes {layer}, and only linear layers before the output head can")
        width = shape[1] if found["part"] == "A" else shape[0]
        if layer not in shapes or width != shapes[layer]["AB".index(found["part"])]:
            made_for = _check_config(adapter).get("base_model_name_or_path") or "another model"
            raise ModelUnavailable(
                f"The adapter {adapter.name} does not fit {checkpoint.base}: it was made for {made_for}. "
                "Set MODEL_ID to the base of all adapters."
            )


def _read(checkpoint: Checkpoint, adapter: NamedAdapter, shapes: Shapes) -> LoraWeights:
    from peft import LoraConfig
    from peft.utils import load_peft_weights
    from peft.utils.other import get_pattern_key

    _check_config(adapter)
    with translate_errors(adapter.files):
        config: Any = LoraConfig.from_pretrained(str(adapter.files.folder))
        tensors: dict[str, torch.Tensor] = load_peft_weights(str(adapter.files.folder), device="cpu")
        _check_tensors(checkpoint, adapter, shapes, {key: tensor.shape for key, tensor in tensors.items()})
        layers = {}
        for layer in sorted({found["layer"] for key in tensors if (found := TENSOR.fullmatch(key))}):
            a, b = (tensors[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
            layers[layer] = a, b * (alpha / (len(a) ** 0.5 if config.use_rslora else len(a)))
    warn_of_another_base(adapter.files, checkpoint.base)
    return LoraWeights(adapter.name, layers)
