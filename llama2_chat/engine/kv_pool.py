"""The memory for keys and values of all conversations, in blocks. Which block holds what is prefix_cache's to know.

They are kept as the model computes them, on a CPU transposed (CpuPool), or in 8 bits (EightBitPool). Another
format is a subclass with its own `allocate`, `write` and `read`; whoever computes a step asks for nothing else, apart
from the kernels, which take the tensors as they lie.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.kv_codes import CODES, SCALES, decode, encode
from llama2_chat.kv_cache import choose_format, enough_tokens, head_bytes

BLOCK_SIZE = 64  # tokens
GB = 1_000_000_000
INFINITE_BITS = 0x7F80 << 1  # of a bfloat16 that is infinite, without its sign; those of NaN are more
LEAST_BLOCKS = 8  # 512 tokens; with less no conversation is worth the wait


class KVPool:
    """For each layer its keys and its values, [num_blocks, BLOCK_SIZE, kv_heads, head_dim], on the layer's device.

    `kv_index`, int64 [T], says where tokens lie: block * BLOCK_SIZE + offset in it. Padding is written to block 0.
    """

    layers: list[tuple[Tensor, ...]]  # what allocate() makes for each, and attention takes
    beside: list[tuple[Tensor, ...]]
    is_exact = True  # a token finds what was computed of those before it, to the last bit

    def __init__(
        self,
        model: PreTrainedModel,
        free_bytes: Callable[[], Mapping[torch.device, int]],
        context_length: int,
        max_batch: int,
        beside: Sequence[Tensor] = (),
    ) -> None:
        """Take what max_batch requests with a full context need, or what is free; on a CPU at least what one needs.

        free_bytes: what may be taken of each device; asked once the model has run and has all that it keeps.
        beside: keys as layers beside the model's make them, those of a model that guesses, which have the same blocks.
        Raises ModelUnavailable if the model keeps something else than keys and values, or nothing is left for them.
        """
        probe = probe_keys(model)
        free = free_bytes()
        self.dtype = probe[0].dtype  # in which the model computes
        block_bytes = _block_bytes([*probe, *beside], self.token_bytes)
        fitting = _fitting(free, block_bytes)
        whole = -(-context_length // BLOCK_SIZE)
        if all(device.type == "cpu" for device in block_bytes):
            fitting = max(fitting, whole)
        wanted = max_batch * whole
        fewest = min(LEAST_BLOCKS, wanted)  # of a small window nobody needs more
        if not self._allocate_layers(probe, beside, min(fitting, wanted), fewest):
            least, most = fewest * sum(block_bytes.values()), sum(free[device] for device in block_bytes)
            raise ModelUnavailable(
                f"The model leaves {most / GB:.1f} GB of GPU memory for conversations, and the shortest takes "
                f"{least / GB:.1f} GB. Set QUANTIZATION=nf4 if it is not, lower KV_HEADROOM_GB, or use a larger GPU."
            )

    def _allocate_layers(self, probe: Sequence[Tensor], beside: Sequence[Tensor], fitting: int, fewest: int) -> bool:
        """Take so many blocks, or fewer if what is free lies in pieces. False if that leaves too few."""
        while fitting >= fewest:
            self.num_blocks = 1 + fitting
            with suppress(torch.OutOfMemoryError):
                self.layers, self.beside = ([self.allocate(keys) for keys in each] for each in (probe, beside))
                return True
            torch.cuda.empty_cache()
            fitting = fitting * 15 // 16
        return False

    @staticmethod
    def token_bytes(keys: Tensor) -> int:
        """Of one token's keys in one layer; the values take as many. keys: [1, kv_heads, 1, head_dim]."""
        return keys.nbytes

    def allocate(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Zeros for what one layer keeps, each [num_blocks, ...]. keys: [1, kv_heads, 1, head_dim], its own."""
        shape = self.num_blocks, BLOCK_SIZE, keys.shape[1], keys.shape[3]
        return _zeros(shape, keys.dtype, keys.device), _zeros(shape, keys.dtype, keys.device)

    @property
    def format(self) -> str:
        """A KV_CACHE, read from what is kept."""
        return next((name for name, codes in CODES.items() if codes == self.layers[0][0].dtype), "none")

    @property
    def tensors(self) -> list[Tensor]:
        """All that keeps a block, [num_blocks, ...], as numbers that can be copied and set to 0 everywhere."""
        return [_plain(kept) for layer in self.layers + self.beside for kept in layer]

    @property
    def tokens(self) -> int:
        return (self.num_blocks - 1) * BLOCK_SIZE

    @property
    def bytes(self) -> int:
        return sum(kept.nbytes for kept in self.tensors)

    @property
    def devices(self) -> set[torch.device]:
        return {kept.device for kept in self.tensors}

    def zero(self, blocks: list[int] | slice) -> None:
        """What is masked is still multiplied, and 0 * NaN is NaN."""
        for kept in self.tensors:
            kept[blocks] = 0

    def are_finite(self, blocks: list[int]) -> bool:
        """Whether numbers were computed here: NaN in one layer is NaN in those after it."""
        return bool(self.layers[-1][-1][blocks].isfinite().all())

    def copy(self, source: int, target: int) -> None:
        for kept in self.tensors:
            kept[target] = kept[source]

    def as_kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [1, kv_heads, T, head_dim], as they come back once they were written."""
        return key, value

    def of_beside(self) -> KVPool:
        """The same blocks, for the layers beside the model's."""
        pool = copy(self)
        pool.layers, pool.beside = self.beside, []
        return pool

    def write(self, layer: int, key: Tensor, value: Tensor, kv_index: Tensor) -> None:
        """Put new keys and values, [1, kv_heads, T, head_dim], at their kv_index, int64 [T]."""
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            states.view(-1, *states.shape[2:]).index_copy_(0, kv_index.to(states.device), new[0].transpose(0, 1))

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of one request, [1, kv_heads, length, head_dim].

        blocks: int64 [B] on the CPU or the layer's device. On a CPU the result is a view if they lie in a row.
        """
        keys, values = (_gather(states, blocks, length) for states in self.layers[layer])
        return keys, values

    def read_batch(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of several requests, [N, kv_heads, B * BLOCK_SIZE, head_dim]. tables: int64 [N, B]."""
        keys, values = (_gather_batch(states, tables) for states in self.layers[layer])
        return keys, values


class CpuPool(KVPool):
    """For each layer of a model on the CPU its keys, [num_blocks, kv_heads, head_dim, BLOCK_SIZE], and its values,
    [num_blocks, kv_heads, BLOCK_SIZE, head_dim]: a query is multiplied with all keys of a block at once. Read in
    float32."""

    def allocate(self, keys: Tensor) -> tuple[Tensor, ...]:
        blocks, kv_heads, head_dim = self.num_blocks, keys.shape[1], keys.shape[3]
        shapes = (blocks, kv_heads, head_dim, BLOCK_SIZE), (blocks, kv_heads, BLOCK_SIZE, head_dim)
        return tuple(_zeros(shape, keys.dtype, keys.device) for shape in shapes)

    def write(self, layer: int, key: Tensor, value: Tensor, kv_index: Tensor) -> None:
        keys, values = self.layers[layer]
        block, offset = kv_index // BLOCK_SIZE, kv_index % BLOCK_SIZE
        keys[block, :, :, offset] = key[0].transpose(0, 1).to(keys.dtype)
        values[block, :, offset] = value[0].transpose(0, 1).to(values.dtype)

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self.read_batch(layer, blocks[None])
        return keys[:, :, :length], values[:, :, :length]

    def read_batch(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        found = [states.index_select(0, tables.flatten()).unflatten(0, tables.shape) for states in (keys.mT, values)]
        keys, values = (states.transpose(1, 2).flatten(2, 3).float() for states in found)
        return keys, values

    @cached_property
    def bits(self) -> list[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
        """Of each layer its keys and values, where they are bfloat16, as arrays for compiled functions."""
        plain = [[states.view(torch.uint16).numpy() for states in layer] for layer in self.layers]
        return [(keys, values) for keys, values in plain]

    def are_finite(self, blocks: list[int]) -> bool:
        if self.layers[-1][-1].dtype != torch.bfloat16:
            return super().are_finite(blocks)
        # Asked of each step with guesses: one pass instead of four. Without signs, what is not finite is the largest.
        return bool((self.bits[-1][1][blocks] << 1).max(initial=0) < INFINITE_BITS)

    def of_beside(self) -> KVPool:
        pool = super().of_beside()
        vars(pool).pop("bits", None)
        return pool


class EightBitPool(KVPool):
    """For each layer the codes of its keys and values, [num_blocks, BLOCK_SIZE, kv_heads, head_dim], and the scales of
    both, [num_blocks, kv_heads, BLOCK_SIZE]."""

    is_exact = False

    def __init__(
        self,
        codes: torch.dtype,
        model: PreTrainedModel,
        free_bytes: Callable[[], Mapping[torch.device, int]],
        context_length: int,
        max_batch: int,
        beside: Sequence[Tensor] = (),
    ) -> None:
        """codes: one of kv_codes.CODES; the rest as KVPool takes it."""
        self._codes = codes
        super().__init__(model, free_bytes, context_length, max_batch, beside)

    @staticmethod
    def token_bytes(keys: Tensor) -> int:
        return keys.shape[1] * head_bytes(keys.shape[3], bits=8)

    def allocate(self, keys: Tensor) -> tuple[Tensor, ...]:
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        codes = self.num_blocks, BLOCK_SIZE, kv_heads, head_dim
        scales = self.num_blocks, kv_heads, BLOCK_SIZE
        return (
            *(_zeros(codes, self._codes, keys.device) for _ in range(2)),
            *(_zeros(scales, SCALES, keys.device) for _ in range(2)),
        )

    def as_kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (decode(*encode(states, self._codes), states.dtype) for states in (key, value))
        return key, value

    def write(self, layer: int, key: Tensor, value: Tensor, kv_index: Tensor) -> None:
        kept = self.layers[layer]
        index = kv_index.to(key.device)
        for codes, scales, new in zip(kept[:2], kept[2:], (key, value), strict=True):
            found, its_scales = encode(new[0].transpose(0, 1), self._codes)
            _plain(codes).view(-1, *codes.shape[2:]).index_copy_(0, index, _plain(found))
            scales[index // BLOCK_SIZE, :, index % BLOCK_SIZE] = its_scales

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self.read_batch(layer, blocks[None])
        return keys[:, :, :length], values[:, :, :length]

    def read_batch(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.layers[layer]
        tables = tables.to(kept[0].device)
        keys, values = (
            decode(
                _gather_batch(_plain(codes), tables).view(self._codes),
                _gather_batch(scales.transpose(1, 2), tables),
                self.dtype,
            )
            for codes, scales in zip(kept[:2], kept[2:], strict=True)
        )
        return keys, values


def make_pool(
    kv_cache: str,
    model: PreTrainedModel,
    free_bytes: Callable[[], Mapping[torch.device, int]],
    context_length: int,
    max_batch: int,
    beside: Sequence[Tensor] = (),
) -> KVPool:
    """The pool that a KV_CACHE asks for. The rest as KVPool takes it.

    Raises ModelUnavailable as KVPool does, and for a format that one of the GPUs cannot compute with.
    """
    room, probe = 0, probe_keys(model)
    devices = {keys.device for keys in probe}
    gpus = [torch.cuda.get_device_capability(device) for device in devices if device.type == "cuda"]
    if gpus and kv_cache == "auto":
        room = _fitting(free_bytes(), _block_bytes([*probe, *beside], KVPool.token_bytes)) * BLOCK_SIZE
    name = choose_format(kv_cache, gpus, room, enough_tokens(max_batch, context_length))
    if name is None:
        kind = CpuPool if all(device.type == "cpu" for device in devices) else KVPool
        return kind(model, free_bytes, context_length, max_batch, beside)
    return EightBitPool(CODES[name], model, free_bytes, context_length, max_batch, beside)


def _block_bytes(probe: Sequence[Tensor], token_bytes: Callable[[Tensor], int]) -> dict[torch.device, int]:
    """Of a block of all layers, for each device. probe: as probe_keys() makes it; token_bytes: a pool's."""
    found: dict[torch.device, int] = {}
    for keys in probe:
        found[keys.device] = found.get(keys.device, 0) + 2 * BLOCK_SIZE * token_bytes(keys)
    return found


def _fitting(free: Mapping[torch.device, int], block_bytes: Mapping[torch.device, int]) -> int:
    return min(free[device] // size for device, size in block_bytes.items())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on a CPU such as take memory only once conversations are written over them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **own)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _gather(states: Tensor, blocks: Tensor, length: int) -> Tensor:
    if states.device.type == "cpu" and bool((blocks.diff() == 1).all()):
        found = states[blocks[0] : blocks[-1] + 1]
    else:
        found = states[blocks.to(states.device)]
    return found.flatten(0, 1)[:length].transpose(0, 1)[None]


def _gather_batch(states: Tensor, tables: Tensor) -> Tensor:
    """[N, kv_heads, B * BLOCK_SIZE, ...] of states [num_blocks, BLOCK_SIZE, kv_heads, ...]."""
    return states.index_select(0, tables.flatten()).unflatten(0, tables.shape).flatten(1, 2).transpose(1, 2)


def _plain(states: Tensor) -> Tensor:
    """The same memory as bytes, where few operations know the numbers in it."""
    return states.view(torch.uint8) if states.dtype == torch.float8_e4m3fn else states


@torch.inference_mode()
def probe_keys(model: PreTrainedModel) -> list[Tensor]:
    """The keys of one token, [1, kv_heads, 1, head_dim], as each layer makes them."""
    cache = DynamicCache(config=model.config)
    device = input_embeddings(model).weight.device
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    if len(layers) < len(cache.layers):
        raise ModelUnavailable(
            "This model keeps more than keys and values of past tokens, which this program cannot share between "
            "visitors. Choose a Llama 2, or a model that attends as it does."
        )
    return [cast(Tensor, cast(DynamicLayer, layer).keys) for layer in layers]


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())
