"""Encoders: one of few random parameters on disk, as people publish them; one here that knows what a few words mean."""

import json
import re

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from llama2_chat.errors import ModelUnavailable
from llama2_chat.types import Embedded

WORDS = ("query", "passage", ":", "a", "lighthouse", "stands", "by", "the", "sea")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_encoder(folder, positions=16, pooling=None, parts=()):
    """pooling, parts: as sentence-transformers writes them."""
    vocabulary = {word: n for n, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=positions, **SHAPE)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    if parts:
        (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{p}"} for p in parts]))
    return folder


class WordMeanings:
    """Keeps the promise of Embedder. Words of one line mean the same, all others nothing."""

    LINES = ("lighthouse leuchtturm beacon", "keeper wärter", "seabirds möwen gulls", "insurance versicherung")

    def __init__(self, identity="words 1"):
        self.name, self.identity, self.state, self.error = "word-meanings", identity, "ready", ""
        self.dimensions = len(self.LINES)
        self.asked = []  # purpose and texts

    def start(self):
        pass

    def close(self):
        pass

    def fail(self, sentence):
        self.state, self.error = "failed", sentence

    def embed(self, texts, purpose):
        if self.state != "ready":
            raise ModelUnavailable(self.error)
        self.asked.append((purpose, list(texts)))
        words = [re.findall(r"\w+", text.lower()) for text in texts]
        counts = [[sum(word in line.split() for word in each) for line in self.LINES] for each in words]
        vectors = np.array(counts, np.float32)
        return Embedded(
            vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6), sum(map(len, words))
        )
