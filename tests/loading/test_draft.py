"""DRAFT_MODEL: heads as their authors publish them and as training writes them, small models, and what is refused."""

import json
import pickle

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.draft import check_draft
from llama2_chat.loading.load import check_headers, divided, load, measure_checkpoint
from llama2_chat.loading.memory import GB, Gpu
from llama2_chat.types import SamplingParams
from tests.support.drafts import random_head
from tests.support.engines import answer, running
from tests.support.loading import asking_for, get, get_float32, refusal
from tests.support.serving import ignore
from tests.support.small_model import save_model, save_tokenizer


@pytest.fixture(scope="module")
def model(tiny):
    return get_float32(asking_for(tiny)).model


def published(head, folder, **config):
    """As EAGLE's authors write a head: a pickle in half precision, with a copy of the embeddings, and no tokenizer."""
    folder.mkdir()
    shape = {name: getattr(head.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 4, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(shape | config))
    tensors = head.state_dict() | {"embed_tokens.weight": torch.zeros(64, 64)}
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    return folder


def start(base, draft):
    """What a start does with DRAFT_MODEL, before the weights are fetched and after."""
    checkpoint = fetch(choose(asking_for(base, draft_model=str(draft))), ignore)
    check_draft(checkpoint)
    return load(checkpoint, ignore).draft


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"input_norm": True}], ids=["plain", "no bias", "norm"])
def test_a_published_head_is_read(tiny, model, tmp_path, options):
    head = random_head(model, **options)
    read = start(tiny, published(head, tmp_path / "head"))
    assert isinstance(read, EagleHead)
    assert isinstance(read.fc, Int8Linear)  # as the model's own layers are on a CPU
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(read.fc(x), head.fc(x), atol=0.02)
    with running(model, draft=read) as engine:
        answer(engine, [1, 2, 3], SamplingParams(max_new_tokens=8))


def test_a_small_model_of_the_same_vocabulary_is_read(tiny, tmp_path, monkeypatch):
    smaller = save_model(tmp_path / "smaller", hidden_size=32, num_hidden_layers=1)
    draft = start(tiny, smaller)
    assert draft.config.hidden_size == 32
    checkpoint = fetch(choose(asking_for(tiny, draft_model=str(smaller))), ignore)
    assert measure_checkpoint(checkpoint).adapter_bytes > 0
    monkeypatch.setattr("llama2_chat.loading.load.visible_gpus", lambda: [Gpu(22 * GB)])
    assert measure_checkpoint(checkpoint).adapter_bytes > 0  # there, too


def test_a_small_model_need_be_no_llama(tiny, tmp_path):
    # Its config.json has other names, and was called damaged.
    shape = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    draft = start(tiny, save_tokenizer(tmp_path, ("a", "b", "c")))
    with running(get_float32(asking_for(tiny)).model, draft=draft.float()) as engine:
        answer(engine, [1, 2, 3], SamplingParams(max_new_tokens=8))


def test_a_model_in_parts_has_no_guesses_and_says_so(tiny, model, tmp_path):
    head = published(random_head(model), tmp_path / "head")
    checkpoint = divided(fetch(choose(asking_for(tiny, draft_model=str(head), tensor_parallel="2")), ignore))
    assert checkpoint.why.endswith(
        "2 processes compute each layer together. DRAFT_MODEL is left out: it guesses for a model that is whole."
    )
    loaded = load(checkpoint, ignore)
    assert (loaded.draft, loaded.why.count("DRAFT_MODEL")) == (None, 1)


def test_nothing_is_read_where_nothing_is_asked_for(tiny):
    assert get(asking_for(tiny)).draft is None


# ---- What does not fit ----


def test_other_sizes_are_refused_before_any_weights_are_fetched(tiny, model, tmp_path):
    head = random_head(model)
    other = published(head, tmp_path / "other", vocab_size=65)
    assert "it knows 65 tokens, and the model 64" in refusal(start, tiny, other)
    wide = published(head, tmp_path / "wide", hidden_size=128)
    assert "it goes on from 128 numbers a token, and the model has 64" in refusal(start, tiny, wide)
    deep = published(head, tmp_path / "deep", feature_layers=[1, 99])
    assert "it goes on from layer 99, and the model has " in refusal(start, tiny, deep)


def test_a_small_model_with_other_tokens_is_refused(tiny, tmp_path):
    other = save_model(tmp_path / "other", words=("x", "y", "z"))
    assert "its tokenizer has other tokens than the model's" in refusal(start, tiny, other)


@pytest.mark.parametrize("name", ["midlayer.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"])
def test_a_head_of_another_kind_is_refused(tiny, model, tmp_path, name):
    folder = changed(published(random_head(model), tmp_path / "head"), **{name: torch.zeros(2)})
    assert f"a head of another kind than EAGLE's first ({name})" in refusal(start, tiny, folder)
    torch.save({name: torch.zeros(2)}, folder / "pytorch_model.bin")
    assert "is no head of EAGLE's first kind" in refusal(start, tiny, folder)


def changed(folder, **tensors):
    """A head in which these tensors stand for its own."""
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | tensors, file)
    return folder


def test_a_head_whose_heads_cannot_share_their_keys_is_refused(tiny, model, tmp_path):
    # Compiled code reckoned with as many as there are heads, and wrote keys over what others have.
    folder = published(random_head(model), tmp_path / "head", num_key_value_heads=3)
    keys, values = (f"layers.0.self_attn.{each}_proj.weight" for each in "kv")
    changed(folder, **{keys: torch.zeros(48, 64), values: torch.zeros(48, 64)})
    assert "(4 heads cannot share 3 of keys and values)" in refusal(start, tiny, folder)


def test_a_head_with_a_number_for_a_name_is_refused(tiny, model, tmp_path):
    # What program and --check said was that something unexpected had happened.
    folder = published(random_head(model), tmp_path / "head")
    torch.save({"fc.weight": torch.zeros(2), 3: torch.zeros(2)}, folder / "pytorch_model.bin")
    assert "3 is no name of a tensor" in refusal(start, tiny, folder)
    refusal(check_headers, fetch(choose(asking_for(tiny, draft_model=str(folder))), ignore).draft, True)


@pytest.mark.parametrize("name", ["fc.weight", "fc.weight_scale"])
def test_a_head_with_something_else_among_its_tensors_is_refused(tiny, model, tmp_path, name):
    # What the program said was that something unexpected had happened.
    folder = changed(published(random_head(model), tmp_path / "head"), **{name: 3})
    assert f"{name} is no tensor" in refusal(start, tiny, folder)


def test_a_head_with_what_are_no_numbers_is_refused(tiny, model, tmp_path):
    # It was served, and none of its guesses ever came true.
    folder = published(random_head(model), tmp_path / "head")
    name = "layers.0.mlp.up_proj.weight"
    states = torch.load(folder / "pytorch_model.bin", weights_only=True)[name]
    states[3, 5] = float("nan")
    assert f"{name} holds what are no numbers" in refusal(start, tiny, changed(folder, **{name: states}))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"vocab_size": "many"}, "is damaged or not in a format"),
        ({"num_attention_heads": 0}, "transformers makes no model of the config.json"),
        ({"num_attention_heads": 3}, "transformers makes no model of the config.json"),
        ({"num_hidden_layers": 0}, "transformers makes no model of the config.json"),
        ({"embedding_scale": "large"}, "transformers makes no model of the config.json"),
        ({"feature_layers": ["the first"]}, "is damaged or not in a format"),
        ({"intermediate_size": 7}, "layers.0.mlp.gate_proj.weight has another shape than its config.json says"),
        ({"intermediate_size": 10**12}, "layers.0.mlp.gate_proj.weight has another shape than its config.json says"),
    ],
)
def test_a_head_whose_configuration_makes_no_sense_is_refused(tiny, model, tmp_path, config, sentence):
    assert sentence in refusal(start, tiny, published(random_head(model), tmp_path / "head", **config))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num_attention_heads": 3}, "transformers makes no model of the config.json"),
        ({"num_key_value_heads": 3}, "transformers makes no model of the config.json"),
        ({"rms_norm_eps": "small"}, "transformers makes no model of the config.json"),
        ({"embedding_scale": "large"}, "transformers makes no model of the config.json"),
        ({"embedding_scale": float("inf")}, "(embedding_scale must be above 0; it is inf)"),
        ({"num_hidden_layers": 10**6}, "it has 1,000,000 layers, and the model 2"),
    ],
)
def test_what_the_configuration_of_a_head_tells_is_said_before_any_weights_are_fetched(
    tiny, model, tmp_path, config, sentence
):
    # --check called it fine; of so many layers the start took all memory.
    folder = published(random_head(model), tmp_path / "head", **config)
    checkpoint = fetch(choose(asking_for(tiny, draft_model=str(folder))), ignore)
    assert sentence in refusal(check_draft, checkpoint)


@pytest.mark.parametrize("ids", [[], [1, 64], [-1, 2]])
def test_a_head_that_guesses_among_no_tokens_of_the_model_is_refused(tiny, model, tmp_path, ids):
    folder = changed(published(random_head(model), tmp_path / "head"), ids=torch.tensor(ids))
    assert "none of the model's" in refusal(start, tiny, folder)


class Greeting:
    def __reduce__(self):
        return print, ("hello",)


def test_a_pickle_that_runs_code_is_refused(tiny, model, tmp_path, capsys):
    folder = published(random_head(model), tmp_path / "head")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Greeting()}, protocol=2))
    refusal(start, tiny, folder)
    assert "hello" not in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named_by_its_setting(tiny, tmp_path):
    assert refusal(start, tiny, tmp_path / "nowhere").startswith("DRAFT_MODEL: There is no folder")
