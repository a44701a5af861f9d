"""8 and 4 bits: what bitsandbytes is asked for, int8 on a CPU, and faster NF4 layers on a GPU."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from llama2_chat.kernels.int8 import Int8Linear, join_int8

# Layers of one input, in the order in which attention and feed-forward layers ask them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def int8_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantize_int8(model: nn.Module) -> None:
    """Turn the linear layers of a bfloat16 model on the CPU into Int8Linear, one at a time to spare memory."""
    for parent in list(model.modules()):
        fitting = {name: child for name, child in parent.named_children() if _fits_int8(child)}
        for names in TOGETHER:
            if all(name in fitting for name in names):
                linears = [fitting.pop(name) for name in names]
                for name, joined in zip(names, join_int8(linears), strict=True):
                    setattr(parent, name, joined)
        for name, linear in fitting.items():
            setattr(parent, name, Int8Linear(linear))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else what was not converted keeps the whole file mapped
    with suppress(AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what converting needed stays with the process otherwise, 0.3 GB


def _fits_int8(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.in_features % Int8Linear.MULTIPLE == 0


def speed_up_nf4(model: nn.Module) -> None:
    """Let bitsandbytes' layers take a few tokens at once through kernels.nf4's nf4_linear, on the same weights."""
    try:
        from bitsandbytes.nn import Linear4bit

        from llama2_chat.kernels import nf4  # noqa: F401 - registers the operator; needs Triton
    except ImportError:
        return

    class Nf4Linear(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.llama2_chat.nf4_linear(
                x, self.packed, self.absmax, self.code, self.absmax_scale, self.offset, self.out_features
            )

    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if type(module) is not Linear4bit or module.bias is not None or not state.nested:
            continue
        if (state.quant_type, state.blocksize, state.dtype) == ("nf4", 64, torch.bfloat16):
            buffers = {"packed": module.weight.data, "absmax": state.absmax, "code": state.state2.code}
            buffers |= {"absmax_scale": state.state2.absmax, "offset": state.offset}
            for name, tensor in buffers.items():
                module.register_buffer(name, tensor, persistent=False)
            module.__class__ = Nf4Linear
