"""A head that guesses for a Llama whose weights are panels: what it reads, and all of a step's guesses behind it, in
one compiled call (kernels/llama_head.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llama2_chat.engine.cpu_attention import block_tables
from llama2_chat.engine.cpu_llama import Norm, compiled_layers
from llama2_chat.engine.draft_model import MOST_ROWS, DraftNet, HeadNet, Reading
from llama2_chat.engine.drafts import Guess
from llama2_chat.engine.kv_pool import BLOCK_SIZE, CpuPool, KVPool
from llama2_chat.engine.sampler import LikelyTokens
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.kernels.llama_head import HeadArrays, Joining, LlamaHead, Read, Wanted
from llama2_chat.kernels.llama_layers import Numbers


def in_one_call(net: HeadNet, pool: KVPool) -> DraftNet:
    """What guesses as this head does, in one call if all of it is such as that takes. pool: where its keys are."""
    head, output, embeddings = net.head, net.output, net.embeddings
    layers, norm = compiled_layers(head.layers), Norm.of(head.norm)
    fuse, fc = _joining(head.fuse) if head.feature_layers else None, _joining(head.fc)
    panels = output.panels if isinstance(output, Int8Linear) and output.bias is None else None
    in_16_bits = type(embeddings) is nn.Embedding and embeddings.weight.dtype == torch.bfloat16
    if layers is None or panels is None or fc is None or not in_16_bits or not isinstance(pool, CpuPool):
        return net
    ids = torch.arange(len(panels.scales)) if net.ids is None else net.ids
    weights: Any = embeddings.weight.detach().view(torch.uint16).numpy()
    if (head.feature_layers and fuse is None) or weights.shape[1] != head.fc.out_features or ids.max() >= len(weights):
        return net
    normed = norm or Norm(np.empty(0, np.float32), 0.0)
    arrays = HeadArrays(weights, head.embedding_scale, fuse, fc, *normed, panels, ids.numpy())
    return CompiledHeadNet(net, LlamaHead(layers, arrays))


def _joining(linear: Any) -> Joining | None:
    if not isinstance(linear, Int8Linear) or linear.panels is None:
        return None
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return Joining(linear.panels, bias.numpy())


class CompiledHeadNet:
    """Features are here what the model has computed: what a head goes on from is made of them where it is read."""

    def __init__(self, net: HeadNet, head: LlamaHead) -> None:
        self._head, self._rotary, self.probe = head, net.head.rotary_emb, net.probe
        self.bytes, self.feature_layers, self.ids = net.bytes, net.feature_layers, net.ids

    def features(self, of_layers: Sequence[Tensor], hidden: Tensor) -> Tensor:
        return torch.cat((*of_layers, hidden), -1).float()

    def read(self, reading: Reading, way: EagerWay) -> None:
        step: Any = way.step(reading.chunks, MOST_ROWS)
        turns = self._rotary(reading.features[None], step.positions[None])
        self._head.read(self._tokens(reading, step, turns), step.pool.bits, None)

    def guess(
        self, reading: Reading, way: EagerWay, likely: LikelyTokens, lengths: Sequence[int], least: Sequence[float]
    ) -> list[list[Guess]]:
        step: Any = way.step(reading.chunks, MOST_ROWS)
        ends = np.array([chunk.end for chunk in reading.chunks])
        later = ends + np.arange(max(lengths) - 1)[:, None]  # where guesses are read, [G - 1, N]
        positions = torch.from_numpy(np.concatenate((step.positions.numpy(), later.ravel())))
        cos, sin = self._rotary(reading.features[None], positions[None])
        read = self._tokens(reading, step, (cos, sin))
        shape = *later.shape, cos.shape[1]
        limits = np.array(least, np.float32)
        wanted = Wanted(
            last=np.cumsum([chunk.end - chunk.start for chunk in reading.chunks]) - 1,
            lengths=np.array(lengths),
            least=limits,
            seen=likely.seen.numpy(),
            repetition=likely.repetition.numpy(),
            turns=(cos[len(read.ids) :].reshape(shape), sin[len(read.ids) :].reshape(shape)),
            positions=ends,
            tables=block_tables(
                [chunk.request for chunk in reading.chunks],
                -(-(int(ends.max()) + len(later)) // BLOCK_SIZE) * BLOCK_SIZE,
            ),
        )
        made, chances = self._head.read(read, step.pool.bits, wanted)
        guesses: list[list[Guess]] = []
        for n, most in enumerate(lengths):
            ends_here = (place for place in range(most - 1) if not chances[place, n] > limits[n])
            count = next(ends_here, most - 1) + 1
            guesses.append([*map(Guess, made[:count, n].tolist(), chances[:count, n].tolist())])
        return guesses

    def _tokens(self, reading: Reading, step: Any, turns: tuple[Numbers, Numbers]) -> Read:
        """turns: of these tokens and perhaps others behind them."""
        ids = reading.ids.numpy()
        cos, sin = (each[: len(ids)] for each in turns)
        return Read(ids, reading.features.numpy(), (cos, sin), *step.places)
