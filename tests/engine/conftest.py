"""A model small enough for hundreds of engines."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.engines import running


@pytest.fixture(scope="session")
def tiny_llama():
    """A Llama of a millisecond a step, which knows nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def endless(tiny_llama):
    """An engine whose answers end at their limit only."""
    with running(tiny_llama) as engine:
        yield engine
