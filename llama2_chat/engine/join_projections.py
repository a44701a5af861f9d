"""Products with the same input, as those of query, key and value, done as one: it reads weights faster than several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llama2_chat.kernels.lora import AdaptedLinear, Taken
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


def project(x: Tensor, *linears: nn.Module, taken: Taken | None = None) -> Sequence[Tensor]:
    """What each of these layers makes of x, in one product where they have been joined.

    taken: which adapters are added to it; None for none.
    """
    first: Any = linears[0]
    adapted = isinstance(first, AdaptedLinear)
    bases: list[Any] = [linear.base_layer for linear in linears] if adapted else [*linears]
    if adapted and taken is not None:
        begun = first.begin_all(x, taken)
        parts = _project(x, *bases)
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        parts = [first.add_to_all(y, x, taken, begun)]
    else:
        parts = _project(x, *bases)
    if len(parts) == len(bases):
        return parts
    return parts[0].split([base.out_features for base in bases], -1)


def _project(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """One for all of them, side by side, where they have been joined, else one for each."""
    first: Any = linears[0]
    if isinstance(first, JoinedPackedLinear):
        return [first.whole(x)]
    if (joined := getattr(first, "joined", None)) is not None:
        return [F.linear(x, joined)]
    return [linear(x) for linear in linears]


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
