"""What can be trained, and that it can be trained after it has been asked."""

import json
import os
import shutil

import pytest
import torch

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.disk import Files
from llama2_chat.training.base_model import (
    fetch_base,
    go_on_with_adapter,
    load_for_training,
    mend_generation_config,
)
from llama2_chat.training.options import Options


def test_only_a_lora_adapter_is_trained_further_and_only_as_one(tmp_path, chat_model):
    config = {"base_model_name_or_path": str(chat_model), "peft_type": "IA3"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = fetch_base(str(tmp_path))
    for use_peft, sentence in ((True, "is not LoRA but IA3"), (False, "is an adapter: add --use_peft")):
        with pytest.raises(ModelUnavailable, match=sentence):
            go_on_with_adapter(base, Options(str(tmp_path), ["data"], tmp_path, 1e-4, use_peft=use_peft))


def test_another_chat_template_makes_another_format(tmp_path, chat_model):
    """A run went on in the format of a template that had been edited since."""
    shutil.copytree(chat_model, tmp_path / "edited")
    template = tmp_path / "edited" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    same, other = fetch_base(str(chat_model)), fetch_base(str(tmp_path / "edited"))
    assert same.format_fingerprint() == fetch_base(str(chat_model)).format_fingerprint() != other.format_fingerprint()


def test_a_base_model_is_trained_on_texts_and_stays_one(tiny, chat_model, llama2_tokenizer, tmp_path):
    with pytest.raises(ModelUnavailable, match="has no chat template"):
        fetch_base(str(tiny))
    assert fetch_base(str(tiny), chats=False).tokenizer.chat_template is None
    shutil.copytree(chat_model, tmp_path / "llama", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    llama2_tokenizer.save_pretrained(tmp_path / "llama")
    assert fetch_base(str(tmp_path / "llama"), chats=False).tokenizer.chat_template is None


def test_in_nf4_the_answers_before_training_do_not_cut_the_gradients_off(chat_model):
    """On a CPU that has bfloat16, QLoRA was trained with gradients that ended at the first layer of NF4."""
    from peft import LoraConfig, get_peft_model

    gradients, ids = [], torch.arange(3, 20)[None]
    for asks_first in (False, True):
        base = load_for_training(fetch_base(str(chat_model)).checkpoint, "nf4", "cpu")
        if asks_first:
            with torch.no_grad():
                base.eval()(input_ids=ids)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_weights_in_4_bits_are_divided_as_bytes_and_compute_as_before(chat_model):
    """As numbers of one dtype they came together through float32 on GPUs, and codes that read as NaN were lost."""
    checkpoint = fetch_base(str(chat_model)).checkpoint
    whole, divisible = (load_for_training(checkpoint, "nf4", "cpu", divisible) for divisible in (False, True))
    for layer in divisible.model.layers:
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16, torch.float32}
        assert not any(parameter.requires_grad for parameter in layer.parameters() if parameter.dtype == torch.float32)
    ids = torch.arange(40)[None]
    assert torch.equal(divisible(ids).logits, whole(ids).logits)


def test_a_model_is_told_from_another_of_its_shape_by_configuration_and_weights(chat_model, tmp_path):
    files = [Files(copy) for copy in (chat_model, tmp_path / "same", tmp_path / "config", tmp_path / "weights")]
    for other in files[1:]:
        shutil.copytree(chat_model, other.folder)
    config = tmp_path / "config" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"other"'))
    with (tmp_path / "weights" / "model.safetensors").open("r+b") as file:
        file.seek(-200_000, os.SEEK_END)
        file.write(bytes(100_000))
    first, same, *others = (file.fingerprint() for file in files)
    assert first == same
    assert len({first, *others}) == 3


@pytest.mark.parametrize(
    ("written", "kept", "said"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
            "do_sample was set",
        ),
        ({"temperature": 0.9, "do_sample": False, "num_beams": 1, "length_penalty": 2.0}, {}, "only its token ids"),
        ({"do_sample": True, "top_p": 0.6}, {"do_sample": True, "top_p": 0.6}, ""),
    ],
)
def test_a_generation_config_that_is_invalid_today_is_mended_so_that_the_model_can_be_saved(
    chat_model, tmp_path, written, kept, said
):
    """Copies of Llama 2 have one: with all weights, training ended at the first checkpoint."""
    shutil.copytree(chat_model, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": 267, **written}))
    model = load_for_training(fetch_base(str(tmp_path / "copy")).checkpoint, "float32", "cpu")
    assert said in mend_generation_config(model)
    model.generation_config.max_length = 30  # modified, as the trainer does: then all must be valid
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {"eos_token_id": 267, **kept}.items() <= saved.items()
    assert bool(mend_generation_config(model)) is False
