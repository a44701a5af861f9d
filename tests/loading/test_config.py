"""Checkpoints that say odd things about themselves: they answer as meant, or are refused by a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MambaConfig

from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.config import read_config, read_generation_config
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.server.probes import PlannedStart, probe_tokenizer
from llama2_chat.types import SamplingParams
from model import ChatModel
from tests.support.loading import asking_for, get, logits, refusal
from tests.support.serving import ignore
from tests.support.small_tokenizer import llama_shaped


def write(folder, name, **change):
    path = folder / name
    written = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(written | change))


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


HARMLESS = {
    "dtype auto": ("config.json", {"torch_dtype": "auto", "dtype": "auto"}),
    "dtype bf16": ("config.json", {"torch_dtype": "bf16", "dtype": None}),
    "dtype with torch before it": ("config.json", {"dtype": "torch.bfloat16"}),
    "dtype of nowhere": ("config.json", {"dtype": "float17"}),
    "dtype a number": ("config.json", {"dtype": 16}),
    "padding outside the vocabulary": ("config.json", {"pad_token_id": 32000}),
    "sampling that contradicts itself": ("generation_config.json", {"do_sample": False, "temperature": 0.6}),
    "sampling that makes no sense": ("generation_config.json", {"max_new_tokens": -1, "eos_token_id": [2, 7]}),
    "sampling of another type": ("generation_config.json", {"cache_implementation": 3, "temperature": "hot"}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_no_answer_depends_on_may_hold_anything(folder, tiny, case):
    name, change = HARMLESS[case]
    write(folder, name, **change)
    loaded = get(asking_for(folder, quantization="none"))
    torch.testing.assert_close(logits(loaded.model), logits(get(asking_for(tiny, quantization="none")).model))


def test_a_precision_by_its_short_name_is_known(folder):
    write(folder, "config.json", dtype="bf16")
    assert read_config(fetch(choose(asking_for(folder)), ignore).base).dtype == torch.bfloat16


def test_where_answers_end_is_kept_of_a_generation_config_that_makes_no_sense(folder):
    write(folder, "generation_config.json", max_new_tokens=-1, eos_token_id=[2, 7])
    assert read_generation_config(fetch(choose(asking_for(folder)), ignore).base).eos_token_id == [2, 7]


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'])
def test_a_generation_config_that_does_not_say_where_answers_end_is_refused_by_name(folder, text):
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in refusal(get, asking_for(folder))


@pytest.mark.parametrize("kept", [["tokenizer.model"], []])
def test_a_folder_without_a_tokenizer_json_is_told_where_to_get_one(folder, kept):
    (folder / "tokenizer.json").unlink()
    for name in kept:
        (folder / name).write_bytes(b"\x0a")
    sentence = refusal(get, asking_for(folder))
    assert "needs a tokenizer.json" in sentence
    assert ("only a tokenizer.model" in sentence) == bool(kept)


def test_empty_special_tokens_are_none(folder):
    """Looking up the id of a token "" that is unknown led to itself, a thousand times."""
    llama_shaped().save_pretrained(folder)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    (folder / "special_tokens_map.json").write_text(json.dumps(dict.fromkeys(names, "")))
    write(folder, "tokenizer_config.json", **dict.fromkeys(names, ""))
    tokenizer = load_tokenizer(fetch(choose(asking_for(folder)), ignore))
    assert [getattr(tokenizer, name) for name in names] == [None] * 4
    assert tokenizer.eos_token_id is None


def test_a_missing_output_head_is_named_with_what_may_be_wrong(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    sentence = refusal(get, asking_for(folder))
    assert "lm_head.weight" in sentence
    assert "tie_word_embeddings" in sentence
    write(folder, "config.json", tie_word_embeddings=True)
    assert get(asking_for(folder)).device == "cpu"


SENSELESS = {  # each was "an unexpected error" or "a file is damaged"
    "not JSON": ("config.json", None, "config.json of model is not a JSON object"),
    "a size in words": ("config.json", {"vocab_size": "64"}, "expected int, got str"),
    "heads that do not divide it": ("config.json", {"num_attention_heads": 5}, "not a multiple"),
    "an activation of nowhere": ("config.json", {"hidden_act": "swoosh"}, "config.json of model ('swoosh')"),
    "rope of nowhere": ("config.json", {"rope_parameters": {"rope_type": "spiral"}}, "config.json of model"),
    "rope in a word": ("config.json", {"rope_parameters": "linear"}, "config.json of model"),
    "another shape": ("config.json", {"intermediate_size": 96}, "other shapes than its config.json says"),
    "quantised by a list": ("config.json", {"quantization_config": ["gptq"]}, "config.json of model"),
    "bits in words": ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": "four"}}, "'four'"),
    "a template that is a number": ("tokenizer_config.json", {"chat_template": 7}, "chat template of model is no text"),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_checkpoint_of_which_no_model_can_be_made_is_refused_with_the_reason(folder, case):
    name, change, reason = SENSELESS[case]
    if change is None:
        (folder / name).write_text("")
    else:
        write(folder, name, **change)
    assert reason in refusal(get, asking_for(folder)).replace(str(folder), "model")


def test_an_empty_quantization_config_is_none(folder):
    write(folder, "config.json", quantization_config={})
    assert "came quantised" not in get(asking_for(folder)).why


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_whole_numbers_that_nothing_explains_are_refused_and_not_taken_for_weights(folder, file):
    # The model was ready, and answered garbage.
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    changed = weights | {name: (100 * weights[name]).to(torch.int8)}
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(changed, folder / file)
    else:
        save_file(changed, folder / file, {"format": "pt"})
    assert f"{name} as whole numbers" in refusal(get, asking_for(folder))


def test_weights_that_are_no_numbers_are_said_to_be_damaged(chat_model, tmp_path):
    # It "did not attend to its past".
    shutil.copytree(chat_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    broken = {name: weight * float("nan") if "q_proj" in name else weight for name, weight in weights.items()}
    save_file(broken, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    chat = ChatModel(asking_for(tmp_path / "model")).load()
    chat.close()
    assert "no numbers" in chat.status.error


def test_a_template_that_writes_tokens_without_an_embedding_is_refused(chat_model, tmp_path):
    # The model was ready and --check content, and every message was refused.
    folder = shutil.copytree(chat_model, tmp_path / "model")
    LlamaForCausalLM(AutoConfig.from_pretrained(folder, vocab_size=256)).save_pretrained(folder)
    settings, reason = asking_for(folder), "<|im_start|>, and the model has no embedding"
    assert reason in ChatModel(settings).load().status.error
    assert reason in refusal(probe_tokenizer, PlannedStart(settings))


def test_a_model_that_keeps_no_keys_and_values_is_refused_with_the_reason_and_the_next_step(chat_model, tmp_path):
    """Its status said "unexpected error"."""
    config = MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for path in chat_model.glob("*token*"):
        shutil.copy(path, tmp_path)
    sentence = refusal(get, asking_for(tmp_path))
    assert "mamba" in sentence
    assert "state instead of keys and values" in sentence
    assert "Choose a Llama 2" in sentence


def test_the_page_and_programs_see_a_name_and_no_path(chat_model):
    for name, expected in ((None, chat_model.name), ("mine", "mine")):
        chat = ChatModel(asking_for(chat_model, model_name=name)).load()
        assert chat.state == "ready", chat.status.error
        assert chat.status.model == expected
        with chat.stream_reply([{"role": "user", "content": "hello"}], SamplingParams(max_new_tokens=2)) as reply:
            list(reply)
        chat.close()
