"""A head that goes on from what a model computed last, for guesses at what comes next: one more layer of its kind.

Source of the architecture and of its weights' names: EAGLE (Li et al., 2024), as its authors publish heads for Llama 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding


class EagleHead(nn.Module):
    """Features, which are what a model hands to its output head, of a token from those of the one before it.

    config: of a Llama with as many layers as the head has, mostly one.
    bias: whether `fc` has one. input_norm: whether the first layer normalises what it gets.
    vocabulary: ids among which it guesses; None for all.
    """

    ids: Tensor | None  # int64 [v], ascending

    def __init__(
        self, config: LlamaConfig, *, bias: bool = True, input_norm: bool = False, vocabulary: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bias)
        self.layers: Any = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        if not input_norm:
            self.layers[0].input_layernorm = nn.Identity()
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("ids", vocabulary)

    def forward(self, embedded: Tensor, features: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        """Features [1, T, H] of tokens that have these embeddings [1, T, H], behind tokens of these features [1, T, H].

        positions: int64 [1, T]. kwargs: for attention.
        """
        hidden = self.fc(torch.cat((embedded.to(features.dtype), features), -1))
        turns = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns, **kwargs)
        return hidden
