"""A Llama of 100,000 random parameters and a tokenizer of a few words, as people publish them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
