"""QLoRA with fewer kernels: a layer in NF4 and what LoRA adds to it as one step of autograd, and norms as one kernel.

A step of training waits for the processor, which PEFT and bitsandbytes have launch some fifteen kernels for each of a
7B's 224 layers, three times a step, and transformers eight for each norm. Here it is half as many and one, and they
compute the same, up to how bfloat16 is rounded. What is measured and answered goes through PEFT's own layers.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def speed_up_qlora(model: nn.Module) -> None:
    """Let a model with LoRA over bitsandbytes' layers in 4 bits compute so in train mode."""
    from peft.tuners.lora.bnb import Linear4bit

    class FewerKernels(Linear4bit):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name, *others = self.lora_A
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            is_other = self.disable_adapters or self.merged or others or args or kwargs
            if is_other or not self.training or {x.dtype, down.dtype} != {torch.bfloat16}:
                return super().forward(x, *args, **kwargs)
            dropout = self.lora_dropout[name]
            p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
            return LoraLinear.apply(x, down, up, self.base_layer, self.scaling[name], p)

    for module in model.modules():
        if type(module) is Linear4bit and _is_plain(module):
            module.__class__ = FewerKernels
        elif type(module) is LlamaRMSNorm:
            module.__class__ = OneKernelNorm


def _is_plain(layer: Any) -> bool:
    """Whether it has one adapter, which is nothing but LoRA, no bias, and weights that unpack to bfloat16."""
    parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
    is_alone = len(layer.lora_A) == 1 and not layer.lora_variant and all(part.bias is None for part in parts)
    return is_alone and layer.base_layer.quant_state.dtype is torch.bfloat16


class OneKernelNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LoraLinear(torch.autograd.Function):
    """x @ W.T + scaling * dropout(x) @ down.T @ up.T, with the gradients of all but W, which is in 4 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Any, scaling: float, p: float) -> Tensor:
        """x: [..., in_features]; down: [rank, in_features]; up: [out_features, rank]; p: of dropout."""
        rows = x.reshape(-1, x.shape[-1])
        kept, mask = torch.native_dropout(rows, p, True) if p else (rows, None)
        hidden = kept @ down.T
        output = (rows @ unpack(base).T).addmm_(hidden, up.T, alpha=scaling)
        ctx.save_for_backward(kept, mask, hidden, down, up)
        ctx.base, ctx.scaling, ctx.p, ctx.shape = base, scaling, p, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, mask, hidden, down, up = ctx.saved_tensors
        of_output = of_output.reshape(-1, of_output.shape[-1])
        of_hidden = torch.addmm(hidden, of_output, up, beta=0, alpha=ctx.scaling)  # beta=0: only its shape counts
        of_up = torch.addmm(up, of_output.T, hidden, beta=0, alpha=ctx.scaling)
        of_down = of_hidden.T @ kept
        if not ctx.needs_input_grad[0]:
            return None, of_down, of_up, None, None, None
        of_x = of_output @ unpack(ctx.base)
        if mask is None:
            of_x.addmm_(of_hidden, down)
        else:
            of_x += torch.ops.aten.native_dropout_backward(of_hidden @ down, mask, 1 / (1 - ctx.p))
        return of_x.view(ctx.shape), of_down, of_up, None, None, None


def unpack(layer: Any) -> Tensor:
    """The weights of one of bitsandbytes' layers in 4 bits, [out_features, in_features]."""
    weight, state = layer.weight.detach(), layer.quant_state
    if weight.is_cuda and (nf4 := _kernels()) and _is_known(state) and nf4.can_unpack(*state.shape):
        scales = state.absmax, state.state2.code, state.state2.absmax, state.offset
        return nf4.unpack(weight.view(torch.uint8), *scales, state.shape[0])
    return dequantize_4bit(weight, state)


def _is_known(state: Any) -> bool:
    """Whether the weights are as nf4_config() asks for them, to be computed with in bfloat16."""
    return state.nested and (state.quant_type, state.blocksize, state.dtype) == ("nf4", 64, torch.bfloat16)


@cache
def _kernels() -> ModuleType | None:
    try:
        from llama2_chat.kernels import nf4
    except ImportError:  # there is no Triton
        return None
    return nf4
