"""Products with the same input, as those of query, key and value, done as one: it reads weights faster than several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llama2_chat.kernels.lora import AdaptedLinear
from llama2_chat.kernels.packed import JoinedPackedLinear
from llama2_chat.kernels.rank_sum import SummedLinear


@torch.no_grad()  # else what is joined would hold on to what it was joined from
def join_projections(model: LlamaForCausalLM) -> None:
    """Let what is multiplied with the same input be one product, which reads weights faster than several small ones.

    The single weights become views of the joined ones, so that the model itself computes as before and takes no more
    memory. Quantised and adapted layers stay as they are: packed ones are joined where they are made.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        outputs: list[Any] = [attention.o_proj, mlp.down_proj]
        alone = [[each.part if isinstance(each, SummedLinear) else each] for each in outputs]
        _join_layer([*groups, *alone])
    torch.cuda.empty_cache()  # else PyTorch would keep the memory of the copies


def project(x: Tensor, *linears: nn.Module, mask: Tensor | None = None) -> Sequence[Tensor]:
    """What each of these layers makes of x, in one product where they have been joined.

    mask: which adapters are added, as AdapterRows.mask_of() makes it; None for none.
    """
    first: Any = linears[0]
    if not isinstance(first, AdaptedLinear):
        return _project(x, *linears)
    bases: list[Any] = [linear.base_layer for linear in linears]
    parts = _project(x, *bases)
    lora = first.lora if len(linears) == 1 else first.shared
    if mask is None or lora is None:
        return parts
    return [part if added is None else part + added for part, added in zip(parts, lora(x, mask), strict=True)]


def _project(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    first: Any = linears[0]
    if isinstance(first, JoinedPackedLinear):
        y = first.whole(x)
    elif (joined := getattr(first, "joined", None)) is not None:
        y = F.linear(x, joined)
    else:
        return [linear(x) for linear in linears]
    return y.split([linear.out_features for linear in linears], -1)


def _join_layer(groups: list[list[Any]]) -> None:
    """Join the weights of each group of linear layers, and move those of the others beside them.

    All weights of a layer leave their place before the first joined one is allocated: each place alone is too small
    for it and would stay empty, 6 GB for the 13B in bfloat16. So at no time is more than one layer there twice.
    """
    plain = [group for group in groups if all(type(linear) is nn.Linear and linear.bias is None for linear in group)]
    copies = [[linear.weight.clone() for linear in group] for group in plain]
    for linear in itertools.chain(*plain):
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    for group, weights in zip(plain, copies, strict=True):
        joined = torch.cat(weights)
        for linear, part in zip(group, joined.split([linear.out_features for linear in group]), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
        if len(group) > 1:
            group[0].register_buffer("joined", joined, persistent=False)
