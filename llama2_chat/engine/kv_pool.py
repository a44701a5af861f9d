"""The memory for keys and values of all conversations, in blocks. Which block holds what is prefix_cache's to know.

A second format (fewer bits, another layout) is a subclass with its own `write` and `read`; whoever computes a step asks
for nothing else, apart from the kernels, which take the tensors of this one as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llama2_chat.errors import ModelUnavailable

BLOCK_SIZE = 64  # tokens
GB = 1_000_000_000
LEAST_BLOCKS = 8  # 512 tokens; with less no conversation is worth the wait


class KVPool:
    """For each layer its keys and its values, [num_blocks, BLOCK_SIZE, kv_heads, head_dim], on the layer's device.

    `kv_index`, int64 [T], says where tokens lie: block * BLOCK_SIZE + offset in it. Padding is written to block 0.
    """

    suits_kernels = True  # kernels.attention reads and writes `layers` as they lie

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
        block_bytes: dict[torch.device, int] = {}
        for keys in (*probe, *beside):
            block_bytes[keys.device] = block_bytes.get(keys.device, 0) + 2 * BLOCK_SIZE * self.token_bytes(keys)
        fitting = min(free[device] // size for device, size in block_bytes.items())
        whole = -(-context_length // BLOCK_SIZE)
        if all(device.type == "cpu" for device in block_bytes):
            fitting = max(fitting, whole)
        if not self._allocate_layers(probe, beside, min(fitting, max_batch * whole)):
            least, most = LEAST_BLOCKS * sum(block_bytes.values()), sum(free[device] for device in block_bytes)
            raise ModelUnavailable(
                f"The model leaves {most / GB:.1f} GB of GPU memory for conversations, and the shortest takes "
                f"{least / GB:.1f} GB. Set QUANTIZATION=nf4 if it is not, lower KV_HEADROOM_GB, or use a larger GPU."
            )

    def _allocate_layers(self, probe: Sequence[Tensor], beside: Sequence[Tensor], fitting: int) -> bool:
        """Take so many blocks, or fewer if what is free lies in pieces. False if that leaves too few."""
        while fitting >= LEAST_BLOCKS:
            self.num_blocks = 1 + fitting
            with suppress(torch.OutOfMemoryError):
                self.layers, self.beside = (
                    [(self.allocate(keys), self.allocate(keys)) for keys in each] for each in (probe, beside)
                )
                return True
            torch.cuda.empty_cache()
            fitting = fitting * 15 // 16
        return False

    def token_bytes(self, keys: Tensor) -> int:
        """Of one token's keys in one layer; the values take as many. keys: [1, kv_heads, 1, head_dim]."""
        return keys.nbytes

    def allocate(self, keys: Tensor) -> Tensor:
        """Zeros for all keys of one layer, or all values. keys: [1, kv_heads, 1, head_dim], as the model makes them."""
        return keys.new_zeros(self.num_blocks, BLOCK_SIZE, keys.shape[1], keys.shape[3])

    @property
    def tensors(self) -> list[Tensor]:
        """All that keeps a block, [num_blocks, ...]."""
        return [states for layer in self.layers for states in layer]

    @property
    def tokens(self) -> int:
        return (self.num_blocks - 1) * BLOCK_SIZE

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers + self.beside)

    @property
    def devices(self) -> set[torch.device]:
        return {keys.device for keys, _ in self.layers}

    def zero(self, blocks: list[int] | slice) -> None:
        """What is masked is still multiplied, and 0 * NaN is NaN."""
        for keys, values in self.layers + self.beside:
            keys[blocks] = 0
            values[blocks] = 0

    def are_finite(self, blocks: list[int]) -> bool:
        """Whether numbers were computed here: NaN in one layer is NaN in those after it."""
        return bool(self.layers[-1][1][blocks].isfinite().all())

    def copy(self, source: int, target: int) -> None:
        for keys, values in self.layers + self.beside:
            keys[target], values[target] = keys[source], values[source]

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
        N, blocks = tables.shape
        shape, which = (N, blocks * BLOCK_SIZE, *self.layers[layer][0].shape[2:]), tables.flatten()
        keys, values = (states.index_select(0, which).view(shape).transpose(1, 2) for states in self.layers[layer])
        return keys, values


def _gather(states: Tensor, blocks: Tensor, length: int) -> Tensor:
    if states.device.type == "cpu" and bool((blocks.diff() == 1).all()):
        found = states[blocks[0] : blocks[-1] + 1]
    else:
        found = states[blocks.to(states.device)]
    return found.flatten(0, 1)[:length].transpose(0, 1)[None]


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
