"""Models that guess for the small models of other tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.engine.drafts import Confidence
from llama2_chat.kernels.eagle import EagleHead


def guess_always(monkeypatch, least=0.0):
    """Let a model make three guesses at a time, however wrong they are: those of random weights are. least: as draft()
    takes it."""
    monkeypatch.setattr(Confidence, "length", lambda self, most, cost: min(most, 3))
    monkeypatch.setattr(Confidence, "may_guess", lambda self, most, cost: most > 0)
    monkeypatch.setattr(Confidence, "least", lambda self, cost: least)
    for name in ("GPU_ROW_COST", "INT8_ROW_COST", "FIXED_ROW_COST"):
        monkeypatch.setattr(f"llama2_chat.engine.model_runner.{name}", 0.0)


def random_head(model, seed=0, config=None, num_hidden_layers=1, **kinds):
    """A head of random weights for a model. kinds: as EagleHead takes them."""
    torch.manual_seed(seed)
    config = config or LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": num_hidden_layers})
    return EagleHead(config, **kinds).to(model.dtype).eval().requires_grad_(False)


def random_model(vocab_size, seed=1, **shape):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | shape
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).eval().requires_grad_(False)
