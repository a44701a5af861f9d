"""Llamas of few random parameters: one on disk with a tokenizer of a few words, as people publish them; one here."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama2_chat.loading.load import Loaded


def save_model(folder, words=("a", "b", "c"), **config):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64} | shape | config)).to(torch.bfloat16).save_pretrained(folder)
    return save_tokenizer(folder, words)


def save_tokenizer(folder, words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<unk>", *words))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def untrained(tokenizer, context_length):
    """Few random weights behind a real tokenizer: fast, talkative and of no sense."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context_length, **shape)
    return Loaded(LlamaForCausalLM(config).eval(), "")
