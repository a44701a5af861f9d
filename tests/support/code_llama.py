"""Code Llama made small: the marks around a text to fill in, and a model that says one word and is done."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.loading.load import Loaded
from llama2_chat.loading.tokenizer_model import convert_tokenizer
from llama2_chat.prompt import INFILLING_PIECES
from tests.support.metas import tokenizer_model

# Code Llama's tokenizer.model has these after Llama 2's 32,000 pieces, and a few that nothing uses.
MARKS = ("▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", *INFILLING_PIECES)


def code_llama_tokenizer(tmp_path, data=None):
    """data: a tokenizer.model; a small one without it."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data or tokenizer_model(more=MARKS))
    return convert_tokenizer(path)


def one_word_model(tokenizer, word="▁x", rows=None, ends=True):
    """It says the word, and after it that it is done; or the word for ever."""
    rows = rows or len(tokenizer)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    word, done = tokenizer.convert_tokens_to_ids([word, "▁<EOT>"])
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()[:, 0] = 1
        head.zero_()[word, 0] = 9
        if ends and done < rows:
            embedding[word] = torch.eye(16)[1]
            head[done, 1] = 9
    return Loaded(model.eval(), "A test wrote it.")
