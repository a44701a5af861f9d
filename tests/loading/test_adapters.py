"""An adapter finds its base, and answers merged as it does beside it."""

import json
import os
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.adapters import other_base
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.disk import Files
from llama2_chat.loading.load import load
from llama2_chat.loading.lora import check_adapters
from llama2_chat.loading.quantize import nf4_config
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.server.probes import PlannedStart, probe_model
from tests.support.loading import asking_for, get, logits, refusal
from tests.support.serving import ignore
from tests.support.small_model import save_model, save_tokenizer


def test_a_merged_adapter_answers_as_the_adapter_beside_its_base(adapter, tiny):
    checkpoint = fetch(choose(asking_for(adapter)), ignore)
    merged = load(replace(checkpoint, quantization="float32"), ignore).model
    beside = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32), adapter)
    torch.testing.assert_close(logits(merged), logits(beside), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(LlamaForCausalLM.from_pretrained(tiny)), atol=1e-2)


def test_an_adapter_comes_from_the_hub_with_its_base(hub, adapter, tmp_path):
    repo = shutil.copytree(adapter, tmp_path / "repo")
    config = json.loads((repo / "adapter_config.json").read_text())
    (repo / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/tiny"}))
    hub.repos["someone/adapter"] = repo
    assert get(asking_for("someone/adapter")).precision == "int8"


def test_an_adapter_of_the_embedded_model_finds_it_by_its_name_on_every_machine(settings, adapter, tmp_path):
    named = shutil.copytree(adapter, tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": EMBEDDED}))
    checkpoint = fetch(choose(replace(settings, model_id=str(named))), ignore)
    assert checkpoint.base == fetch(choose(settings, has_gpu=False), ignore).base
    assert (checkpoint.adapter.folder, checkpoint.model_id) == (named, str(named))


def test_an_adapter_stays_beside_a_base_in_nf4(adapter):
    model = get(asking_for(adapter, quantization="nf4")).model
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert type(model) is LlamaForCausalLM


def test_base_model_overrides_what_the_adapter_names_and_says_so_if_that_is_gone(adapter, tiny, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    sentence = refusal(get, asking_for(moved))
    assert "/gone/base" in sentence
    assert "BASE_MODEL" in sentence
    assert get(asking_for(moved, base_model=str(tiny))).precision == "int8"


def test_an_adapter_for_another_base_is_refused(adapter, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=128)
    sentence = refusal(get, asking_for(adapter, base_model=str(other)))
    assert "BASE_MODEL" in sentence


def test_an_adapters_own_tokenizer_comes_first_and_new_words_get_embeddings(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    save_tokenizer(own, [f"word{i}" for i in range(80)])
    checkpoint = fetch(choose(asking_for(own, quantization="none")), ignore)
    assert len(load_tokenizer(checkpoint)) == 81
    assert load(checkpoint, ignore).model.get_input_embeddings().num_embeddings == 81


def test_an_adapter_whose_vocabulary_was_padded_is_loaded(tiny, tmp_path):
    # Trainers pad to a multiple of 64; it was refused as made for another base.
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(81, pad_to_multiple_of=64)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    padded = peft.get_peft_model(model, config)
    padded.save_pretrained(tmp_path / "padded", save_embedding_layers=True)
    save_tokenizer(tmp_path / "padded", [f"word{i}" for i in range(80)])
    checkpoint = fetch(choose(asking_for(tmp_path / "padded", base_model=str(tiny))), ignore)
    loaded = load(replace(checkpoint, quantization="float32"), ignore).model
    torch.testing.assert_close(logits(loaded), logits(padded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_lora_on_an_embedding_that_was_padded_is_loaded(tiny, tmp_path, layer):
    # It was refused as made for another base.
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(81, pad_to_multiple_of=64)
    config = peft.LoraConfig(target_modules=["q_proj", layer], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "padded", save_embedding_layers=False)
    loaded = get(asking_for(tmp_path / "padded", base_model=str(tiny), quantization="none"))
    assert loaded.model.get_input_embeddings().num_embeddings == 128


def residual(tiny, folder, begins):
    """An adapter that took its beginning from the tiny model; what was left of that, and their logits together."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=begins, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn_like(parameter) * parameter.std()  # trained
    adapted.save_pretrained(folder / "adapter")
    expected = logits(adapted)
    left = shutil.copytree(tiny, folder / "left")
    adapted.unload().save_pretrained(left)
    return left, expected


@pytest.mark.parametrize("begins", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_took_its_beginning_from_the_base_is_right_on_what_was_left_of_that(tiny, tmp_path, begins):
    # PEFT takes the beginning from whatever base it finds: of what was left it took another part, in silence.
    left, expected = residual(tiny, tmp_path, begins)
    for base in (left, tiny):
        checkpoint = fetch(choose(asking_for(tmp_path / "adapter", base_model=str(base))), ignore)
        checkpoint = replace(checkpoint, quantization="float32")
        if "niter" in begins and base == tiny:  # a part that is found by chance
            assert "Set BASE_MODEL to the residual base" in refusal(load, checkpoint, ignore)
        else:
            torch.testing.assert_close(logits(load(checkpoint, ignore).model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("begins", ["pissa", "pissa_niter_4", "olora"])
def test_what_was_left_of_a_base_is_known_in_nf4_too(tiny, tmp_path, begins):
    # PiSSA was refused there with the advice to set the base that was set, and OLoRA took its part once more.
    left, expected = residual(tiny, tmp_path, begins)
    found = logits(get(asking_for(tmp_path / "adapter", base_model=str(left), quantization="nf4")).model)
    plain = logits(get(asking_for(left, quantization="nf4")).model)
    assert (found - expected).norm() < 0.5 * (plain - expected).norm()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("alora_invocation_tokens", [1, 2], "which some tokens switch on"),
        ("init_lora_weights", "corda", "changed before its training"),
        ("init_lora_weights", "loftq", "changed before its training"),
    ],
)
def test_lora_that_would_not_answer_as_it_was_made_to_is_refused_before_weights_are_read(
    adapter, tmp_path, field, value, reason
):
    # In 4 bits the first of them answered as its base; the last ended a start in an unexpected error.
    copy = shutil.copytree(adapter, tmp_path / "changed")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    settings = asking_for(copy, quantization="nf4")
    assert reason in refusal(get, settings)
    assert reason in refusal(check_adapters, fetch(choose(settings), ignore))


LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CHANGED = {
    "one is missing": (lambda tensors: tensors.pop(LORA_A), "lacks"),
    "all have other names": (lambda tensors: tensors.update(x=tensors.pop(LORA_A)), "lacks"),
    "one has no layer": (lambda tensors: tensors.update({LORA_A.replace("q", "x"): torch.ones(8, 64)}), "no layer"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_an_adapter_of_which_peft_would_leave_something_out_is_refused(adapter, tmp_path, case):
    # The base was ready, and answered as if it had no adapter.
    change, reason = CHANGED[case]
    copy = shutil.copytree(adapter, tmp_path / "changed")
    tensors = load_file(copy / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, copy / "adapter_model.safetensors", {"format": "pt"})
    assert reason in refusal(get, asking_for(copy))


def test_an_adapter_that_cannot_be_put_on_its_base_is_refused_with_the_reason(adapter, tmp_path):
    for number, (field, value, reason) in enumerate(
        [
            ("target_modules", ["c_attn"], "c_attn"),
            ("peft_type", "MAGIC", "MAGIC"),
            ("layer_replication", [[0, 2], [1, 2]], "repeats layers"),
            ("base_model_name_or_path", 7, "does not name its base"),
        ]
    ):
        copy = shutil.copytree(adapter, tmp_path / f"{number}")
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        assert reason in refusal(get, asking_for(copy))


def test_a_kind_of_adapter_that_cannot_stay_beside_quantised_weights_is_refused_there(tiny, tmp_path):
    # Every question to it was an unexpected error.
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path)
    settings = asking_for(tmp_path, base_model=str(tiny))
    assert "IA3, which cannot stay beside weights in nf4" in refusal(get, replace(settings, quantization="nf4"))
    assert get(replace(settings, quantization="none")).precision == "bfloat16"


def test_an_adapter_made_for_another_base_of_equal_shape_is_used_with_a_warning(adapter, tiny, tmp_path, caplog):
    other = shutil.copytree(tiny, tmp_path / "other")
    settings = asking_for(adapter, base_model=str(other))
    loaded = get(settings)
    assert "was made for" in caplog.text
    assert str(other) in caplog.text
    said = f"The adapter {adapter.name} was made for {tiny.name} and is used on other: it may answer wrongly."
    assert loaded.why.endswith(said)  # in the status line, where it was only in the log
    assert said in probe_model(PlannedStart(settings))


@pytest.mark.parametrize(
    ("made_for", "used_on", "fits"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", True),
        ("someone/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", False),  # by its last part it was the same
        ("/hub/models--meta-llama--Llama-2-7b-hf/snapshots/12ab", "meta-llama/Llama-2-7b-hf", True),
        ("/home/a/models/Llama-2-7b-hf/", "meta-llama/Llama-2-7b-hf", True),  # a folder's last part is all it has
        ("C:\\models\\Llama-2-13b-hf", "meta-llama/Llama-2-7b-hf", False),
        ("", "meta-llama/Llama-2-7b-hf", True),
        (None, "meta-llama/Llama-2-7b-hf", True),
    ],
)
def test_two_bases_on_the_hub_are_told_apart_by_their_whole_names(tmp_path, made_for, used_on, fits):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": made_for}))
    base = Files(tmp_path / "models--x" / "snapshots" / "1", repo=used_on)
    assert other_base(Files(tmp_path), base) == (None if fits else made_for)


def test_an_adapter_that_was_trained_here_knows_its_base_by_its_weights_and_not_by_its_name(
    adapter, tiny, tmp_path, caplog
):
    run, moved = shutil.copytree(adapter, tmp_path / "run"), shutil.copytree(tiny, tmp_path / "moved")
    (run / "run.json").write_text(json.dumps({"model_sha256": Files(tiny).fingerprint()}))
    get(asking_for(run, base_model=str(moved)))
    assert "was made for" not in caplog.text
    impostor = shutil.copytree(tiny, tmp_path / "elsewhere" / tiny.name)
    with (impostor / "model.safetensors").open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(bytes(20_000))
    get(asking_for(run, base_model=str(impostor)))
    assert "was made for" in caplog.text


ON_THE_EMBEDDING = {
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8, 9]},
    "LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    """A model whose output head has weights of its own, and one that has those of its embedding."""
    return save_model(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module", params=ON_THE_EMBEDDING)
def on_the_embedding(request, base, tmp_path_factory):
    """An adapter that changes the embedding of `base`, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(**ON_THE_EMBEDDING[request.param], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens" in name:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("int8", 0.02), ("nf4", 0.01)])
@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning", "ignore:Model with `tie_word:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers:UserWarning")
def test_an_adapter_of_the_embedding_answers_as_in_peft(base, on_the_embedding, precision, error):
    # Merged into an embedding that is the output head too, LoRA changed both, and the answers were garbage.
    options = {"quantization_config": nf4_config(torch.bfloat16), "device_map": {"": "cpu"}}
    plain = AutoModelForCausalLM.from_pretrained(
        base, **(options if precision == "nf4" else {"dtype": torch.float32})
    ).eval()
    ids = (1, 7, 8, 9, 20)
    without = logits(plain, ids)
    expected = logits(peft.PeftModel.from_pretrained(plain, on_the_embedding).eval(), ids)
    checkpoint = fetch(choose(asking_for(on_the_embedding)), ignore)
    loaded = load(replace(checkpoint, quantization=precision), ignore)
    assert loaded.precision == precision
    given = logits(loaded.model, ids)
    assert torch.linalg.norm(given - expected) <= error * torch.linalg.norm(expected)
    assert torch.linalg.norm(without - expected) > 0.1 * torch.linalg.norm(expected)
