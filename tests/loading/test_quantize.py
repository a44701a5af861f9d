"""Fewer bits, nearly the same answers."""

import weakref
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from llama2_chat.loading import quantize
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load
from llama2_chat.loading.quantize import precision_of, quantize_int8
from llama2_chat.loading.read import load_tokenizer
from tests.support.loading import asking_for, get, logits
from tests.support.serving import ignore
from tests.support.small_model import save_model


def test_layers_of_a_width_that_the_int8_kernel_cannot_read_stay_as_they_are(tmp_path):
    # torch._weight_int8pack_mm read past the end of such rows: wrong text or a crash of the whole program.
    model = get(asking_for(save_model(tmp_path / "narrow", hidden_size=40, intermediate_size=64))).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.mlp.gate_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "Int8Linear"
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("asked", "told"), [("none", "bfloat16"), ("int8", "int8"), ("nf4", "nf4")])
def test_the_precision_that_is_told_is_the_one_of_the_layers(tiny, asked, told):
    assert get(asking_for(tiny, quantization=asked)).precision == told


def test_layers_that_stayed_as_they_were_are_told(tmp_path):
    # "int8", said the page, which was only the plan.
    loaded = get(asking_for(save_model(tmp_path / "narrow", hidden_size=40, intermediate_size=64)))
    assert loaded.precision == "bfloat16 and int8"
    assert "Not all of its layers can be in int8." in loaded.why


@pytest.mark.parametrize(
    ("planted", "told"), [("float16", "bfloat16 and float16"), ("int8", "int8 and bfloat16"), ("adapter", "bfloat16")]
)
def test_a_layer_that_is_not_as_planned_shows_in_what_is_told(tiny, planted, told):
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    if planted == "float16":
        model.model.layers[0].mlp.half()
    elif planted == "int8":
        quantize_int8(model.model.layers)
        model.model.layers[1].self_attn.q_proj = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    else:  # in float32, beside a layer that stays as it is
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    assert precision_of(model) == told


def test_weights_are_gone_once_they_are_in_8_bits(tiny, monkeypatch):
    # They stayed to the end, so a 7B took 20 GB of a computer for a moment where 14 are enough.
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    weights = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    alive, join = [], quantize.join_int8

    def counting(linears):
        alive.append(sum(weight() is not None for weight in weights))
        return join(linears)

    monkeypatch.setattr(quantize, "join_int8", counting)
    quantize_int8(model)
    assert (alive[0], alive[-1]) == (len(weights), 1)


@pytest.mark.slow
def test_int8_keeps_the_perplexity_of_bfloat16_within_one_percent(settings):
    """On 750 to 1,500 tokens of one text or another it lies from 0.5 % below to 0.05 % above."""
    checkpoint = fetch(choose(settings, has_gpu=False), ignore)
    text = (Path(__file__).parent / "prose.txt").read_text("utf-8")
    ids = load_tokenizer(checkpoint)(text, return_tensors="pt").input_ids

    def perplexity(precision):
        model = load(replace(checkpoint, quantization=precision), ignore).model
        with torch.inference_mode():
            return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).exp().item()

    assert perplexity("int8") == pytest.approx(perplexity("none"), rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["auto", "none", "int8", "int4", "nf4"])
def test_on_a_gpu_each_precision_answers_like_bfloat16_on_the_cpu(settings, precision):
    checkpoint = fetch(choose(settings, has_gpu=False), ignore)
    ids = load_tokenizer(checkpoint)("The capital of France is", return_tensors="pt").input_ids
    loaded = load(replace(checkpoint, quantization=precision), ignore)
    right = LlamaForCausalLM.from_pretrained(checkpoint.base.folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        likeliest = right(ids).logits[0, -1].argmax()
        assert likeliest in loaded.model(ids.cuda()).logits[0, -1].topk(5).indices.cpu()
    assert loaded.device == "cuda:0"
