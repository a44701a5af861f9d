"""A Llama in parts, one for each of several GPUs: how many there should be, and what of each weight belongs to which.

A part is a Llama itself, with fewer heads and a narrower MLP, and with embeddings, norms and output head whole. What
its attention and its MLP give has to be summed over all parts. Of each weight only the part is read from the disk.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.disk import Files
from llama2_chat.loading.memory import LEAST_CONTEXT_TOKENS, Gpu, Size, compute_dtype

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of whose output each part computes some
COLUMNS = ("o_proj", "down_proj")  # of whose input each part has some


@dataclass(frozen=True)
class Part:
    """One of `of` parts of a Llama; rank 0 is the first."""

    rank: int
    of: int

    def __str__(self) -> str:
        return f"part {self.rank + 1} of {self.of}"

    def config(self, whole: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the Llama that this part is."""
        part: Any = copy.deepcopy(whole)
        part.head_dim = _head_dim(whole)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(part, name, getattr(part, name) // self.of)
        return part

    def weights(self, files: Files) -> dict[str, PartOfTensor]:
        """What belongs to this part of each tensor, by name, to be read when transformers asks for it."""
        found = {}
        for name in files.weights():
            file = safe_open(files.folder / name, "pt")
            found.update({key: PartOfTensor(file, key, self) for key in file.keys()})  # noqa: SIM118 - no dict
        return found


class PartOfTensor:
    """What transformers takes for a tensor of a safetensors file that is not read yet."""

    def __init__(self, file: Any, name: str, part: Part) -> None:
        self._slice, self._part = file.get_slice(name), part
        *_, self._layer, self._kind = ("", *name.split("."))

    def get_shape(self) -> list[int]:
        shape = list(self._slice.get_shape())
        if (dim := self._dim(len(shape))) is not None:
            shape[dim] //= self._part.of
        return shape

    def get_dtype(self) -> str:
        return self._slice.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        """The part, read. index: ... for all of it."""
        shape = self._slice.get_shape()
        dim = self._dim(len(shape))
        if dim is None:
            tensor = self._slice[...]
            first = self._part.rank == 0 or self._layer not in COLUMNS
            return (tensor if first else torch.zeros_like(tensor))[index]  # a bias is added by the first part alone
        size = shape[dim] // self._part.of
        start, end = self._part.rank * size, (self._part.rank + 1) * size
        return (self._slice[start:end] if dim == 0 else self._slice[:, start:end])[index]

    def _dim(self, dims: int) -> int | None:
        """Along which dimension the tensor is divided; None if each part has it whole."""
        if self._layer in ROWS:
            return 0
        return 1 if self._layer in COLUMNS and dims == 2 else None


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---- How many ----


def choose_parts(
    requested: str, quantization: str, config: PreTrainedConfig, size: Size, gpus: Sequence[Gpu], why_whole: str | None
) -> int:
    """How many GPUs compute each layer together, 1 for one that has it whole.

    requested: a TENSOR_PARALLEL. quantization: a QUANTIZATION, or "float32". why_whole: why the model is not divided,
    whatever it is; None if it may be.

    Raises ModelUnavailable if so many were asked for and it cannot be.
    """
    if requested != "auto":
        count = int(requested)
        if count > 1 and (reason := why_whole or why_not_divided(config, count, quantization, gpus)):
            raise ModelUnavailable(f"TENSOR_PARALLEL={count} does not work here: {reason}. Set TENSOR_PARALLEL=1.")
        return count
    unquantized = str(compute_dtype(gpus)).removeprefix("torch.")
    precision = unquantized if quantization in ("auto", "none") else quantization
    if len(gpus) < 2 or why_whole or size.needed_bytes(precision, size.context) <= max(g.free_bytes for g in gpus):
        return 1
    # Without room for a full context QUANTIZATION=auto takes NF4, which is not divided.
    for context in (size.context, *([] if quantization == "auto" else [LEAST_CONTEXT_TOKENS])):
        for count in range(2, len(gpus) + 1):
            needed = share(size, count).needed_bytes(precision, context)
            fits = needed <= min(gpu.free_bytes for gpu in gpus[:count])
            if fits and not why_not_divided(config, count, precision, gpus):
                return count
    return 1


def share(size: Size, parts: int) -> Size:
    """What each of so many parts weighs."""
    return replace(
        size,
        linear=size.linear // parts,
        kv_bytes_per_token=size.kv_bytes_per_token // parts,
        kv_bytes_in_8_bits=size.kv_bytes_in_8_bits // parts,
    )


def why_not_divided(config: PreTrainedConfig, parts: int, precision: str, gpus: Sequence[Gpu]) -> str | None:
    """Why a model cannot be computed by so many GPUs together, as part of a sentence; None if it can."""
    if os.name != "posix":
        return "it needs Linux"
    if type(config) is not LlamaConfig:
        return f"only a Llama can be divided, and this is a {config.model_type}"
    if precision == "nf4":
        return "weights in NF4 are not divided; QUANTIZATION=int4 takes as much memory"
    for name, what in (
        ("num_key_value_heads", "heads of keys and values"),
        ("num_attention_heads", "heads"),
        ("intermediate_size", "numbers between the layers of its MLP"),
    ):
        if (count := getattr(config, name)) % parts:
            return f"the model has {count:,} {what}, which cannot be divided by {parts}"
    if not gpus:
        return None  # on a CPU as many processes as one likes
    if len(gpus) < parts:
        return "there is one GPU here" if len(gpus) == 1 else f"there are {len(gpus)} GPUs here"
    if len({(gpu.name, gpu.capability) for gpu in gpus[:parts]}) > 1:
        return f"the first {parts} GPUs are not alike ({', '.join(gpu.name for gpu in gpus[:parts])})"
    return None
