"""A real Llama that says what it was told to: after each token always the same next one."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.loading.load import Loaded


def rote_model(tokenizer, said, after, **generation):
    """A loaded model that goes on with the ids of `said` after the id `after`, and then from the beginning.

    One layer that adds nothing, a dimension for each token of the vocabulary, and an output head that leads from one
    token to the next.
    """
    size = -(-len(tokenizer) // 8) * 8
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()[said[0]] = 0.5  # after anything else: from the beginning
        for token, following in zip([after, *said], [*said, said[0]], strict=True):
            model.lm_head.weight[following, token] = 1
    model.generation_config.update(**generation)
    return Loaded(model.eval(), "A test wrote it.")
