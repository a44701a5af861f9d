"""A head that goes on from what a model computed last, for guesses at what comes next: one more layer of its kind.

Source of the architecture and of its weights' names: EAGLE (Li et al., 2024), as its authors publish heads for Llama 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding


class EagleHead(nn.Module):
    """Features, which are what a model hands to its output head, of a token from those of the one before it.

    config: of a Llama with as many layers as the head has, mostly one. Those that are trained here have more in it:
    embedding_scale, by which embeddings are multiplied; output_norm, whether features are normalised, as the model
    normalises them; feature_layers, behind which it takes in what the model has computed, beside features.
    bias: whether `fc` has one. input_norm: whether the first layer normalises what it gets.
    vocabulary: ids among which it guesses; None for all.
    """

    ids: Tensor | None  # int64 [v], ascending

    def __init__(
        self, config: LlamaConfig, *, bias: bool = True, input_norm: bool = False, vocabulary: Tensor | None = None
    ) -> None:
        super().__init__()
        H, heads = config.hidden_size, config.num_attention_heads
        kv_heads: Any = config.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} of keys and values")
        self.config = config
        self.embedding_scale: float = float(getattr(config, "embedding_scale", 1.0))
        if not 0 < self.embedding_scale < float("inf"):
            raise ValueError(f"embedding_scale must be above 0; it is {self.embedding_scale}")
        self.feature_layers = [int(behind) for behind in getattr(config, "feature_layers", [])]
        if self.feature_layers:
            self.fuse = nn.Linear((len(self.feature_layers) + 1) * H, H)
        self.fc = nn.Linear(2 * H, H, bias=bias)
        self.layers: Any = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        if not input_norm:
            self.layers[0].input_layernorm = nn.Identity()
        self.norm: Any = (
            LlamaRMSNorm(H, config.rms_norm_eps) if getattr(config, "output_norm", False) else nn.Identity()
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("ids", vocabulary)

    def fused(self, of_layers: Sequence[Tensor], features: Tensor) -> Tensor:
        """What a head goes on from, [..., H], of the model's features and what it computed behind feature_layers.

        Source: EAGLE-3 (Li et al., 2025), whose heads know more of a text by it than of the next token alone.
        """
        if not self.feature_layers:
            return features
        return self.fuse(torch.cat((*(self.evened(each).to(features.dtype) for each in of_layers), features), -1))

    def evened(self, states: Tensor) -> Tensor:
        """What was computed behind a layer, [..., H], in float32: there some numbers are far larger than others."""
        return F.rms_norm(states.float(), states.shape[-1:])

    def joined(self, embedded: Tensor, features: Tensor) -> Tensor:
        """What its layers get: of tokens' embeddings, and of features behind which they come; all [..., H]."""
        return self.fc(torch.cat((embedded.to(features.dtype) * self.embedding_scale, features), -1))

    def forward(self, embedded: Tensor, features: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        """Features [1, T, H] of tokens that have these embeddings [1, T, H], behind tokens of these features [1, T, H],
        which are fused() or its own.

        positions: int64 [1, T]. kwargs: for attention.
        """
        hidden = self.joined(embedded, features)
        turns = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns, **kwargs)
        return self.norm(hidden)
