"""A Llama's layers in 8 bits on a CPU, with few calls of PyTorch: for one token these take longer than the products.

What is computed is what LlamaDecoderLayer computes, in float32 between the products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from llama2_chat.engine.cpu_attention import CpuStep
from llama2_chat.engine.paged_attention import AttentionStep, Scoring, attend
from llama2_chat.kernels.int8 import Int8Linear, JoinedInt8Linear


def speed_up_llama(model: PreTrainedModel) -> None:
    """Let a Llama on the CPU whose products are all in 8 bits compute its layers with fewer calls."""
    if type(model) is LlamaForCausalLM and isinstance(model.lm_head, Int8Linear):
        speed_up_layers(model.model)


def speed_up_layers(body: Any) -> None:
    """The same for `layers` and the `rotary_emb` that they share, if all of these layers suit."""
    if all(map(_suits, body.layers)):
        body.rotary_emb.__class__ = CpuRotaryEmbedding
        for layer in body.layers:
            layer.input_layernorm.float()
            layer.post_attention_layernorm.float()
            layer.scoring = Scoring(layer.self_attn.scaling)
            layer.__class__ = CpuLlamaLayer


def _suits(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        type(layer) is LlamaDecoderLayer
        and all(isinstance(linear, JoinedInt8Linear) for linear in (attention.q_proj, mlp.gate_proj))
        and all(isinstance(linear, Int8Linear) for linear in (attention.o_proj, mlp.down_proj))
    )


class CpuRotaryEmbedding(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As _turn() takes them: cosines, and sines that are negative in the first half; [N, T, 1, head_dim]."""
        cos, sin = super().forward(x.float(), position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos[:, :, None], sin[:, :, None]


class CpuLlamaLayer(LlamaDecoderLayer):
    """Of a model that attends by paged_attention.ATTENTION, with its norms in float32."""

    scoring: Scoring

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        N, T, width = hidden_states.shape
        attention: Any = self.self_attn  # whose layers are Int8Linear
        mlp: Any = self.mlp
        hidden = hidden_states.float().view(-1, width)
        projected = attention.q_proj.together(_normed(hidden, self.input_layernorm))
        attended = self._attend(projected.view(N, T, -1, attention.head_dim), **kwargs)
        hidden = attention.o_proj.of_rows(attended.reshape(N * T, -1), hidden)
        gate, up = mlp.gate_proj.together(_normed(hidden, self.post_attention_layernorm)).chunk(2, -1)
        return mlp.down_proj.of_rows(mlp.act_fn(gate).mul_(up), hidden).view(N, T, width)

    def _attend(
        self,
        projected: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        step: AttentionStep | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """projected: [N, T, heads + 2 * kv_heads, head_dim], float32, of query, key and value, which change."""
        attention = self.self_attn
        kv_heads = projected.shape[2] // (attention.num_key_value_groups + 2)
        _turn(projected[:, :, :-kv_heads], *position_embeddings)
        heads = projected.shape[2] - 2 * kv_heads
        if isinstance(step, CpuStep):
            return step.attend_joined(attention.layer_idx, projected, heads, self.scoring)
        states = projected.transpose(1, 2)
        query, key, value = states.split([heads, kv_heads, kv_heads], 1)
        key, value = key.bfloat16(), value.bfloat16()
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        key, value = key.float(), value.float()
        output, _ = attend(attention, query, key, value, attention_mask, attention.scaling, step=step, **kwargs)
        return output


def _normed(hidden: Tensor, norm: LlamaRMSNorm | nn.Identity) -> Tensor:
    if isinstance(norm, nn.Identity):
        return hidden
    squares = hidden.square().mean(1, keepdim=True)
    return hidden.mul(norm.weight).mul_(squares.add_(norm.variance_epsilon).rsqrt_())


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Give states [N, T, heads, head_dim] the rotary positions that CpuRotaryEmbedding tells."""
    rolled = states.roll(states.shape[-1] // 2, -1)
    states.mul_(cos).addcmul_(rolled, sin)
