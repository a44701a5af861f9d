"""A Llama in 8 bits on a CPU: what lies between the products is compiled (kernels/int8_rows.py), for in PyTorch's many
small calls one token spends more time than in the products; where its weights are panels, all of it (llama_layers.py).

What is computed is what LlamaDecoderLayer computes, in float32 between the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from llama2_chat.engine.architecture import STATIC_ROPE
from llama2_chat.engine.cpu_attention import CpuStep
from llama2_chat.engine.kv_pool import CpuPool
from llama2_chat.engine.paged_attention import AttentionStep, attend
from llama2_chat.kernels.block_attention import attend_in_blocks
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.int8 import Int8Linear, JoinedInt8Linear
from llama2_chat.kernels.int8_rows import Codes

if TYPE_CHECKING:
    from llama2_chat.kernels.llama_layers import Layers, WholeLlama

Numbers = NDArray[np.float32]


def speed_up_llama(model: PreTrainedModel) -> None:
    """Let a Llama on the CPU whose products are all in 8 bits compute its layers with fewer calls; in one with the norm
    and the output head behind them, where its weights are panels."""
    if type(model) is LlamaForCausalLM and isinstance(model.lm_head, Int8Linear):
        body: Any = model.model
        speed_up_layers(body)
        body.norm.__class__ = CpuNorm
        whole = _whole(body, model.lm_head) if type(body) is LlamaModel else None
        if whole is not None:
            body.__class__, body.whole = CpuLlamaModel, whole
            model.__class__ = CpuLlama


def speed_up_head(head: EagleHead) -> None:
    """The same for the layers of a head, and for its norms."""
    speed_up_layers(head)
    head.__class__ = CpuHead
    if type(head.norm) is LlamaRMSNorm:
        head.norm.__class__ = CpuNorm


def speed_up_layers(body: Any) -> None:
    """The same for `layers` and the `rotary_emb` that they share, if all of these layers suit."""
    if all(map(_suits, body.layers)):
        body.rotary_emb.__class__ = CpuRotaryEmbedding
        for layer in body.layers:
            layer.shape = Shape.of(layer)
            layer.__class__ = CpuLlamaLayer


def _suits(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        type(layer) is LlamaDecoderLayer
        and all(isinstance(linear, JoinedInt8Linear) for linear in (attention.q_proj, mlp.gate_proj))
        and all(isinstance(linear, Int8Linear) for linear in (attention.o_proj, mlp.down_proj))
        and mlp.config.hidden_act == "silu"
    )


class CpuRotaryEmbedding(LlamaRotaryEmbedding):
    turns = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)  # of places from 0 on

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """Cosines and sines of N x T tokens, each a float32 array [N * T, head_dim]."""
        places = position_ids.expand(x.shape[0], -1)
        if self.rope_type not in STATIC_ROPE:
            return self._turns(places)
        at = places.numpy().ravel()
        if (length := int(at.max(initial=0)) + 1) > len(self.turns[0]):
            longest = max(length, min(2 * length, self.config.max_position_embeddings))
            self.turns = self._turns(torch.arange(longest)[None])
        return self.turns[0].take(at, 0), self.turns[1].take(at, 0)

    def _turns(self, places: Tensor) -> tuple[Numbers, Numbers]:
        cos, sin = super().forward(torch.empty(0), places)
        return cos.flatten(0, 1).numpy(), sin.flatten(0, 1).numpy()


class CpuNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.detach().float().numpy()
        return _norm(hidden_states, weight, self.variance_epsilon).to(hidden_states.dtype)


class CpuHead(EagleHead):
    def evened(self, states: Tensor) -> Tensor:
        return _norm(states, np.ones(states.shape[-1], np.float32), torch.finfo(torch.float32).eps)


def _norm(states: Tensor, weight: Numbers, epsilon: float) -> Tensor:
    """RMSNorm of states [..., width], in float32."""
    rows = states.detach().float().reshape(-1, states.shape[-1]).contiguous().numpy()
    return torch.from_numpy(Codes.normed(rows, weight, epsilon).rows).view(states.shape)


class Norm(NamedTuple):
    """An RMSNorm, as Codes.normed() takes it."""

    weight: Numbers  # [width]
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm | None:
        """None of one that changes nothing."""
        return (
            None if isinstance(norm, nn.Identity) else cls(norm.weight.detach().float().numpy(), norm.variance_epsilon)
        )


class Shape(NamedTuple):
    """What is known of a layer before it computes."""

    number: int  # of the layer
    heads: int
    kv_heads: int
    scale: float
    norms: tuple[Norm | None, Norm | None]  # before attention, and before what follows it

    @classmethod
    def of(cls, layer: Any) -> Shape:
        attention = layer.self_attn
        heads = attention.o_proj.in_features // attention.head_dim
        norms = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        return cls(attention.layer_idx, heads, heads // attention.num_key_value_groups, attention.scaling, norms)


def _whole(body: Any, head: Int8Linear) -> WholeLlama | None:
    """Of the body of a model and its output head, for one call, if all layers are such as it takes."""
    layers, norm = compiled_layers(body.layers), Norm.of(body.norm)
    if layers is None or norm is None or norm.epsilon != layers.sizes.epsilon:
        return None
    from llama2_chat.kernels.llama_layers import WholeLlama  # compiled for processors with VNNI

    return WholeLlama(layers, norm.weight, head.panels if head.bias is None else None)


def compiled_layers(all_layers: Any) -> Layers | None:
    """The layers of a model or of a head for one call, if they are all such as it takes."""
    if not all(isinstance(layer, CpuLlamaLayer) and _are_panels(layer) for layer in all_layers):
        return None
    from llama2_chat.kernels.llama_layers import LayerArrays, Layers, LayerSizes

    arrays, sizes = [], set()
    for layer in all_layers:
        _, heads, kv_heads, scale, norms = layer.shape
        products: list[Any] = [each.panels for each in _products(layer)]
        arrays.append(LayerArrays(*(norm and norm.weight for norm in norms), *products))
        (epsilon,) = {norm.epsilon for norm in norms if norm}
        inner = layer.mlp.down_proj.in_features
        sizes.add(LayerSizes(heads, kv_heads, layer.self_attn.head_dim, inner, epsilon, scale))
    return Layers(arrays, *sizes) if len(sizes) == 1 else None


def _are_panels(layer: Any) -> bool:
    return all(each.panels is not None and each.bias is None for each in _products(layer))


def _products(layer: Any) -> list[Int8Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj.whole, attention.o_proj, mlp.gate_proj.whole, mlp.down_proj]


class Output(NamedTuple):
    """Of a step."""

    last_hidden_state: Tensor  # [1, T, width]
    logits: Tensor | None  # [1, n, V]


class CpuLlama(LlamaForCausalLM):
    """Whose body has computed the output head, too."""

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast | Output:
        if not isinstance(kwargs.get("step"), CpuStep) or not isinstance(logits_to_keep, Tensor):
            return super().forward(input_ids, *args, logits_to_keep=logits_to_keep, **kwargs)
        output = self.model(input_ids, *args, last=logits_to_keep, **kwargs)
        if isinstance(output, Output) and output.logits is not None:
            return output
        hidden = output.last_hidden_state
        return Output(hidden, self.lm_head(hidden[:, logits_to_keep]))


class CpuLlamaModel(LlamaModel):
    """Whose layers, norm and output head one call computes, unless an adapter adds to them."""

    whole: Any  # WholeLlama, whose module is imported for processors with VNNI only

    def forward(self, *args: Any, last: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast | Output:
        """last: int64 [n], the tokens behind which there shall be logits."""
        step: Any = kwargs.get("step")
        in_blocks = isinstance(step, CpuStep) and isinstance(step.pool, CpuPool)
        if not in_blocks or any(chunk.request.adapter for chunk in step.chunks):
            return super().forward(*args, **kwargs)
        states = self.embed_tokens(args[0] if args else kwargs["input_ids"]).float()
        turns = self.rotary_emb(states, kwargs["position_ids"])
        listened = [number for number, layer in enumerate(self.layers) if layer._forward_hooks]
        computed = self.whole.run(
            len(self.layers),
            states.detach()[0].numpy(),
            turns,
            *step.places,
            step.pool.bits,
            listened,
            np.empty(0, np.int64) if last is None else last.numpy(),
        )
        for number, states_there in zip(listened, computed.heard, strict=True):
            layer, told = self.layers[number], torch.from_numpy(states_there)[None]
            for hook in layer._forward_hooks.values():  # who listens changes nothing here
                hook(layer, (), told)
        logits = torch.from_numpy(computed.logits)[None] if last is not None and self.whole.has_output else None
        return Output(torch.from_numpy(computed.hidden)[None], logits)


class CpuLlamaLayer(LlamaDecoderLayer):
    """Of a model that attends by paged_attention.ATTENTION."""

    shape: Shape

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Where Python finds them at once: looking for modules of a module takes as long as what is compiled.
        parts: Any = self._modules
        of_attention, of_mlp = parts["self_attn"]._modules, parts["mlp"]._modules
        output = hidden_states.to(torch.float32, copy=True)
        hidden = output.detach().view(-1, output.shape[2]).numpy()

        codes = _normed(hidden, self.shape.norms[0])
        cos, sin = kwargs.pop("position_embeddings")  # from CpuRotaryEmbedding
        turned = self.shape.heads + self.shape.kv_heads
        states = codes.turned(of_attention["q_proj"].products(codes), cos, sin, turned)
        attended = Codes.of(self._attend(states, output.shape[:2], **kwargs))
        attended.add_to(hidden, of_attention["o_proj"].products(attended))

        codes = _normed(hidden, self.shape.norms[1])
        gated = codes.gated(of_mlp["gate_proj"].products(codes))
        gated.add_to(hidden, of_mlp["down_proj"].products(gated))
        return output

    def _attend(
        self,
        states: Numbers,
        shape: torch.Size,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        step: AttentionStep | None = None,
        **kwargs: Any,
    ) -> Numbers:
        """[N * T, heads * head_dim], of query, key and value [N * T, heads + 2 * kv_heads, head_dim]. shape: N, T."""
        number, heads, kv_heads, scale, _ = self.shape
        count, _, head_dim = states.shape
        if isinstance(step, CpuStep) and isinstance(step.pool, CpuPool):
            return attend_in_blocks(states, *step.places, *step.pool.bits[number], scale).reshape(count, -1)
        split = torch.from_numpy(states).view(*shape, -1, head_dim).transpose(1, 2)
        query, key, value = split.split([heads, kv_heads, kv_heads], 1)
        key, value = key.bfloat16(), value.bfloat16()
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, number)
        if step is None:
            key, value = key.float(), value.float()
        attended, _ = attend(self.self_attn, query, key, value, attention_mask, scale, step=step, **kwargs)
        return attended.float().reshape(count, -1).numpy()


def _normed(hidden: Numbers, norm: Norm | None) -> Codes:
    return Codes.of(hidden) if norm is None else Codes.normed(hidden, *norm)
