"""Adapters beside the linear layers of a model: put there once the layers are as steps compute them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama2_chat.engine.kv_pool import input_embeddings
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.kernels.lora import AdaptedLinear, AdapterRows, Int8Lora, Lora, LoraWeights, stack

# Layers of one input in a Llama, in the order in which what they give lies side by side.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def add_adapters(model: PreTrainedModel, adapters: Sequence[LoraWeights]) -> AdapterRows | None:
    """Let each linear layer add what the adapters say to the rows that take them; None if there are no adapters.

    Raises ModelUnavailable if a layer does not see the rows of a step as they come.
    """
    if not adapters:
        return None
    weight, rank = input_embeddings(model).weight, max(adapter.rank for adapter in adapters)
    in_int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    multiple, mask_dtype = (Int8Lora.MULTIPLE, torch.bfloat16) if in_int8 else (1, dtype)
    rows = AdapterRows(len(adapters), rank, multiple, weight.device, mask_dtype)
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        lora = _lora(stack(adapters, name, rank, rows.columns), linear, dtype, rank)
        setattr(model.get_submodule(parent), child, AdaptedLinear(linear, lora, rows))
    for module in list(model.modules()):
        for names in TOGETHER:
            _share(module, names, rows)
    _check(model, rows)
    return rows


def _lora(stacked: tuple[Tensor, Tensor], linear: nn.Module, dtype: torch.dtype, rank: int) -> Lora:
    if isinstance(linear, Int8Linear):
        return Int8Lora.of(*stacked)
    device = next(itertools.chain(linear.parameters(), linear.buffers())).device
    down, up = (states.to(device, dtype) for states in stacked)
    kernels = _kernels(device)
    return kernels.GpuLora(down, [up], up, rank) if kernels else Lora(down, [up])


def _kernels(device: torch.device) -> Any:
    """kernels/gpu_lora.py, where it runs."""
    if device.type == "cpu":
        return None
    try:
        from llama2_chat.kernels import gpu_lora
    except ImportError:  # no Triton here
        return None
    return gpu_lora if gpu_lora.can_add(device) else None


def _share(parent: nn.Module, names: Sequence[str], rows: AdapterRows) -> None:
    """Of layers that may be computed together none is adapted or all are: the first is asked for all of them."""
    linears: list[Any] = [getattr(parent, name, None) for name in names]
    if None in linears or not any(isinstance(linear, AdaptedLinear) for linear in linears):
        return
    adapted = [each if isinstance(each, AdaptedLinear) else AdaptedLinear(each, None, rows) for each in linears]
    for name, linear in zip(names, adapted, strict=True):
        setattr(parent, name, linear)
    adapted[0].share(adapted)


@torch.inference_mode()
def _check(model: PreTrainedModel, rows: AdapterRows) -> None:
    """Three tokens, of which one takes an adapter, go through the model."""
    ids = torch.zeros(1, 3, dtype=torch.long, device=input_embeddings(model).weight.device)
    try:
        with rows.taking([0, 1, 0]):
            model(input_ids=ids, use_cache=False)
    except RuntimeError as error:  # shapes that do not fit
        raise ModelUnavailable(
            f"Adapters change a layer of {type(model).__name__} that sees only some tokens of a step, as experts of a "
            "mixture do, and cannot be chosen per request there. Set MODEL_ID to the adapter, and leave out ADAPTERS."
        ) from error
