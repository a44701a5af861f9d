"""Folders with tiny random models, whole and damaged."""

import json
import os
import shutil

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama2_chat.loading import load as loading
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.config import read_generation_config
from llama2_chat.loading.load import find_stop_ids, guesses_format, load, load_base
from llama2_chat.loading.memory import Gpu
from llama2_chat.loading.read import load_tokenizer
from tests.support.loading import asking_for, get, logits, refusal
from tests.support.serving import ignore


def test_a_local_folder_is_loaded_as_it_lies(tiny):
    loaded = get(asking_for(tiny, quantization="none"))
    torch.testing.assert_close(logits(loaded.model), logits(LlamaForCausalLM.from_pretrained(tiny)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_model_to_be_trained_is_in_the_precision_asked_for(tiny):
    checkpoint = fetch(choose(asking_for(tiny)), ignore)
    assert load_base(checkpoint, "float32", "cpu", ignore).dtype == torch.float32
    assert load_base(checkpoint, "nf4", "cpu", ignore).is_loaded_in_4bit
    assert load_base(checkpoint, "int8", "cpu", ignore).is_loaded_in_8bit


def test_int4_that_cannot_be_compiled_is_told_and_is_no_damage_of_the_model(tiny, monkeypatch):
    # evaluate_model.py --precisions int4 had the model copied anew.
    monkeypatch.setattr(loading, "visible_gpus", lambda: [Gpu(10**11)])
    monkeypatch.setattr(loading, "why_not_packed", lambda gpus: "humming-kernels does not work here (no NVRTC)")
    checkpoint = fetch(choose(asking_for(tiny)), ignore)
    assert "no NVRTC" in refusal(load_base, checkpoint, "int4", "cpu", ignore)


@pytest.mark.parametrize("divisible", [False, True])
def test_weights_that_come_in_nf4_are_trained_as_they_are_and_unpacked_to_be_merged_into(tiny, tmp_path, divisible):
    def base(folder, precision, *divisible):
        checkpoint = fetch(choose(asking_for(folder, cache_dir=tmp_path)), ignore)
        return load_base(checkpoint, precision, "cpu", ignore, *divisible)

    first = base(tiny, "nf4")
    for module in first.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float16  # which the config of the copy says
    first.save_pretrained(tmp_path / "nf4")
    again, plain = base(tmp_path / "nf4", "nf4", divisible), base(tmp_path / "nf4", "float32")
    for one, other, unpacked in zip(
        *(model.model.layers[1].mlp.children() for model in (first, again, plain)), strict=True
    ):
        if isinstance(unpacked, torch.nn.Linear):
            assert torch.equal(other.weight.view(torch.uint8).flatten(), one.weight.flatten())
            assert other.compute_dtype == other.weight.quant_state.dtype == torch.bfloat16
            assert other.weight.dtype == (torch.bfloat16 if divisible else torch.uint8)
            expected = bitsandbytes.functional.dequantize_4bit(one.weight, one.weight.quant_state)
            torch.testing.assert_close(unpacked.weight, expected.float(), atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("folder", "made_from", "chat_format", "is_guess"),
    [
        ("vicuna-7b-v1.5", "vicuna-7b-v1.5", "auto", True),
        ("someone", None, "auto", True),
        ("vicuna-7b-v1.5", "vicuna-7b-v1.5", "llama-2", False),
        ("vicuna-7b-v1.5", "vicuna-7b-v1.5", "none", False),
        ("Llama-2-7b-chat-hf", None, "auto", False),
        ("models--codellama--CodeLlama-7b-Instruct-hf/snapshots/0a1b", None, "auto", False),
        ("mine", "meta-llama/Llama-2-13b-chat-hf", "auto", False),
        ("Llama-2-7b-hf", None, "auto", False),
        ("Llama-2-7b-chat-hf/vicuna", "/models/Llama-2-7b-chat-hf/vicuna/", "auto", True),
    ],
)
def test_that_llama_2s_format_is_a_guess_is_known(
    tiny, llama2_tokenizer, tmp_path, folder, made_from, chat_format, is_guess
):
    # Vicuna 1.5 is published without a chat template: it chatted in Llama 2's format, and nothing said so.
    copy = shutil.copytree(tiny, tmp_path / folder)
    changed("config.json", {"vocab_size": 32_000, **({"_name_or_path": made_from} if made_from else {})})(copy)
    checkpoint = fetch(choose(asking_for(copy, chat_format=chat_format)), ignore)
    assert guesses_format(checkpoint, llama2_tokenizer) is is_guess


def changed(name, change):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), ["damaged", "again"]),
        (changed("config.json", {"num_hidden_layers": 3}), ["damaged", "again"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["damaged", "again"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not a JSON object", "again"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no weights"]),
        (changed("config.json", {"model_type": "martian"}), ["not a causal language model", "another model"]),
        (changed("config.json", {"model_type": "bert"}), ["damaged", "again"]),
        (changed("config.json", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}), ["Python code of its own"]),
    ],
    ids=["cut off", "layer missing", "tokenizer", "config", "no config", "no weights", "unknown", "bert", "own code"],
)
def test_a_checkpoint_that_cannot_be_used_is_a_sentence(tiny, tmp_path, damage, facts):
    folder = shutil.copytree(tiny, tmp_path / "broken")
    damage(folder)
    sentence = refusal(get, asking_for(folder))
    assert [fact for fact in facts if fact not in sentence] == []


def test_biases_that_no_layer_takes_are_refused_though_old_checkpoints_of_others_call_their_masks_so(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "with-biases")
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.bias": torch.ones(64)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "belong to no layer, such as model.layers.0.self_attn.bias" in refusal(get, asking_for(folder))


def test_a_missing_shard_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors is missing" in refusal(get, asking_for(folder))


@pytest.mark.parametrize("ends", [[7, 9], 7, None], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_ids_that_end_an_answer_are_the_same_before_and_after_the_weights_are_loaded(tiny, tmp_path, name, ends):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) if name == "config.json" else {}
    (folder / name).write_text(json.dumps(config | {"eos_token_id": ends}))
    checkpoint = fetch(choose(asking_for(folder)), ignore)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.eos_token = "a"
    stop_ids = find_stop_ids(tokenizer, read_generation_config(checkpoint.base))
    assert stop_ids == {1} | ({7} if ends else set()) | ({9} if ends == [7, 9] else set())
    assert stop_ids == find_stop_ids(tokenizer, load(checkpoint, ignore).model.generation_config)
