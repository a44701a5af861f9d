"""8 and 4 bits: what bitsandbytes is asked for, int8 on a CPU, faster NF4 layers on a GPU, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from llama2_chat.kernels.int8 import Int8Linear, join_int8
from llama2_chat.kernels.packed import PackedLinear
from llama2_chat.process import trim_memory

# Layers of one input, in the order in which attention and feed-forward layers ask them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NEGLIGIBLE = 0.01  # of all weights: the routers of mixtures of experts stay in float32, and nobody asks for those


def int8_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def nf4_config(compute_dtype: torch.dtype, divisible: bool = False) -> BitsAndBytesConfig:
    """divisible: let FSDP divide the weights among GPUs, which takes no others than numbers of the compute dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype if divisible else torch.uint8,
    )


def adopt_nf4(model: nn.Module, compute_dtype: torch.dtype, divisible: bool) -> None:
    """Let layers that came in NF4 be as nf4_config() would have them, whatever their config says."""
    from bitsandbytes.nn import Linear4bit

    storage = compute_dtype if divisible else torch.uint8
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = compute_dtype
            module.quant_storage = weight.quant_storage = storage
            weight.data = weight.data.view(-1).view(storage)[:, None]


def quantize_int8(model: nn.Module) -> None:
    """Turn the linear layers of a bfloat16 model on the CPU into Int8Linear, one at a time to spare memory."""
    # A list of all modules would keep the weights that are replaced to the end: 13 GB of a 7B.
    for parent in [module for module in model.modules() if any(map(_fits_int8, module.children()))]:
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
    trim_memory()  # 0.3 GB


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


def precision_of(model: PreTrainedModel) -> str:
    """In what the layers hold their weights: "int8", "nf4", a dtype, or "int8 and bfloat16", the larger part first.

    Read from the layers themselves. Embeddings, output head, norms and what an adapter adds do not count.
    """
    weights: Counter[str] = Counter()
    for module in _layers(model):
        if isinstance(module, (PackedLinear, Int8Linear)):
            weights[module.precision] += module.in_features * module.out_features
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                weights[state.quant_type] += state.shape.numel()
            elif tensor.dim() > 1 and (isinstance(tensor, nn.Parameter) or name == "weight"):
                weights[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    named = [name for name, count in weights.most_common() if count >= NEGLIGIBLE * weights.total()]
    return " and ".join(named) or str(model.dtype).removeprefix("torch.")


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules of a model without its embeddings, its output head, and what PEFT puts beside a layer."""
    left_out: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out += [head] if (head := model.get_output_embeddings()) is not None else []
    for module in model.modules():
        if hasattr(module, "base_layer"):
            left_out += [child for name, child in module.named_children() if name != "base_layer"]
    skipped = {id(inner) for outer in left_out for inner in outer.modules()}
    return (module for module in model.modules() if id(module) not in skipped)
