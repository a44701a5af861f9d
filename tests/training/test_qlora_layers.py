"""QLoRA's layers with fewer kernels compute what PEFT's and bitsandbytes' compute."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama2_chat.training.qlora_layers import LoraLinear, speed_up_qlora

IN, OUT, RANK = 128, 192, 8


class OneLayer(nn.Module):
    is_loaded_in_4bit = True

    def __init__(self, bias, dtype):
        super().__init__()
        self.layer = Linear4bit(IN, OUT, bias=bias, quant_type="nf4", compute_dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def adapted(bias=False, dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    model = OneLayer(bias, dtype).to(dtype).to("cpu")  # which packs its weights
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=["layer"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape).to(dtype) / 8
    return model


def computed(model, x):
    """What comes out, and all gradients, with the same dropout each time."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output.float() ** 2).sum().backward()
    return [output.detach(), x.grad, *(each.grad for each in model.parameters() if each.requires_grad)]


@pytest.fixture
def taken(monkeypatch):
    """Counts the layers that are computed with fewer kernels."""
    calls, apply = [], LoraLinear.apply
    monkeypatch.setattr(LoraLinear, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_a_layer_and_its_gradients_are_those_of_peft(taken, dropout):
    model, x = adapted(lora_dropout=dropout), torch.randn(2, 40, IN).to(torch.bfloat16)
    expected = computed(model, x)
    speed_up_qlora(model)
    found = computed(model, x)
    assert len(taken) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()  # bfloat16 has 8 bits


def test_what_is_no_plain_adapter_or_not_trained_stays_pefts(taken):
    x = torch.randn(64, IN).to(torch.bfloat16)
    for model in (adapted(use_dora=True), adapted(bias=True), adapted(bias=True, lora_bias=True)):
        speed_up_qlora(model)
        model(x)
    for dtype in (torch.float16, torch.float32):  # as on a T4, where adapters are in float32
        model = adapted(dtype=dtype)
        speed_up_qlora(model)
        model(x.to(dtype))
    model = adapted()
    speed_up_qlora(model)
    model.eval()(x)  # as it is measured, and answers
    model.train()
    with model.disable_adapter():
        assert_close(model(x), model.get_base_model().layer.base_layer(x))
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert (model(x) - model.get_base_model().layer.base_layer(x)).abs().max() == 0  # a new adapter changes nothing
    assert taken == []


def test_a_norm_is_that_of_transformers_and_the_very_same_where_it_is_measured():
    norm = LlamaRMSNorm(IN).to(torch.bfloat16)
    norm.weight.data = torch.randn(IN).to(torch.bfloat16)
    x = torch.randn(40, IN).to(torch.bfloat16)
    expected = norm(x)
    speed_up_qlora(norm)
    assert_close(norm.train()(x), expected, atol=0, rtol=0.01)
    assert torch.equal(norm.eval()(x), expected)
