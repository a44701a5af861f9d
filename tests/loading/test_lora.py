"""Adapters that requests choose from: what can be served so, what is refused by name, and when."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load, measure_checkpoint
from llama2_chat.loading.lora import check_adapters
from llama2_chat.server.preflight import run_probe
from llama2_chat.server.probes import PlannedStart
from tests.support.adapters import in_settings, save_adapter
from tests.support.loading import asking_for, refusal
from tests.support.serving import ignore
from tests.support.small_model import save_model, save_tokenizer


def fetched(base, **adapters):
    return fetch(choose(asking_for(base, adapters=in_settings(adapters))), ignore)


def changed(adapter, folder, **fields):
    """A copy with other fields in its configuration."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_is_more_than_lora_is_refused_by_what_it_is(tiny, adapter, tmp_path, fields, what):
    sentence = refusal(check_adapters, fetched(tiny, poems=changed(adapter, tmp_path / "changed", **fields)))
    assert what in sentence
    assert "The adapter poems" in sentence
    assert f"MODEL_ID={tmp_path}" in sentence


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT saves whole embeddings then, and says so
def test_an_adapter_of_the_embedding_or_the_output_head_is_refused_by_name(tiny, tmp_path, layer):
    folder = save_adapter(tiny, tmp_path / "adapter", target_modules=["q_proj", layer])
    assert layer in refusal(check_adapters, fetched(tiny, poems=folder))


def test_an_adapter_for_a_base_of_another_shape_is_refused_with_its_own_bases_name(tiny, adapter, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=128)
    sentence = refusal(check_adapters, fetched(other, poems=adapter))
    assert f"it was made for {tiny}" in sentence
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    torch.save(peft.utils.load_peft_weights(str(adapter)), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert "it was made for" in refusal(load, fetched(other, poems=pickled), ignore)


def test_an_adapter_for_another_base_of_equal_shape_is_used_with_a_warning(tiny, adapter, tmp_path, caplog):
    other = shutil.copytree(tiny, tmp_path / "other")
    assert [each.name for each in load(fetched(other, poems=adapter), ignore).adapters] == ["poems"]
    assert "was made for" in caplog.text


def test_an_adapter_that_is_asked_in_other_words_than_its_base_is_refused(tiny, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    save_tokenizer(own, ["a", "b", "c", "d"])
    assert "tokenizer" in refusal(check_adapters, fetched(tiny, poems=own))
    save_tokenizer(own, ["a", "b", "c"])
    check_adapters(fetched(tiny, poems=own))


def test_what_cannot_be_adapters_beside_a_base_is_refused_before_anything_is_loaded(tiny, adapter, tmp_path):
    def refused(base, **adapters):
        return refusal(lambda: fetched(base, **adapters))

    assert "adapter_config.json" in refused(tiny, poems=tiny)
    assert "The adapter poems: There is no folder" in refused(tiny, poems=tmp_path / "nowhere")
    assert "Set MODEL_ID to the base" in refused(adapter, poems=adapter)
    assert "Choose another name" in refused(tiny, **{tiny.name: adapter})


def test_adapters_stay_beside_a_base_in_any_precision(tiny, adapter):
    for precision in ("float32", "int8", "nf4"):
        loaded = load(replace(fetched(tiny, a=adapter, b=adapter), quantization=precision), ignore)
        assert (loaded.precision, len(loaded.adapters)) == (precision, 2)


def test_a_check_names_the_adapters_and_counts_their_memory(tiny, adapter, tmp_path):
    dora = changed(adapter, tmp_path / "dora", use_dora=True)

    def found(**adapters):
        return run_probe("model", PlannedStart(asking_for(tiny, adapters=in_settings(adapters))))

    assert found(law=adapter, poems=adapter).detail.startswith(f"{tiny} with the adapters law, poems.")
    assert "DoRA" in found(law=adapter, poems=dora).detail
    bytes_ = measure_checkpoint(fetched(tiny, law=adapter, poems=adapter)).adapter_bytes
    assert bytes_ == 2 * (adapter / "adapter_model.safetensors").stat().st_size


def test_an_adapter_from_the_hub_is_fetched_with_its_weights(hub, tiny, adapter):
    hub.repos["someone/lora"] = adapter
    checkpoint = fetched(tiny, poems="someone/lora")
    assert checkpoint.adapters[0].files.missing()
    assert len(load(checkpoint, ignore).adapters) == 1


def test_scales_and_ranks_are_read_as_peft_reads_them(tiny, tmp_path):
    folder = save_adapter(
        tiny,
        tmp_path / "adapter",
        r=4,
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 9},
        alpha_pattern={"v_proj": 3},
        target_modules=["q_proj", "v_proj"],
    )
    (read,) = load(fetched(tiny, poems=folder), ignore).adapters
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    for name, (a, b) in read.layers.items():
        expected = adapted.get_base_model().get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(b @ a, expected.float(), rtol=1e-5, atol=1e-5)
    assert (len(read.layers), read.rank) == (4, 9)
