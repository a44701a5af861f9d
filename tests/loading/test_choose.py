"""Which model a start takes, and what is refused by name."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, ZERO_GPU, choose, fetch
from llama2_chat.loading.hub import fetch_small_files, fetch_weights
from llama2_chat.prompt import NO_FORMAT
from tests.support.loading import asking_for, refusal
from tests.support.serving import ignore


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
    ("metas", "other"),
    [
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-13b-chat@main", "meta-llama/Llama-2-13b-chat-hf"),
        ("codellama/CodeLlama-7b-Instruct", "codellama/CodeLlama-7b-Instruct-hf"),
    ],
)
def test_a_repository_in_metas_own_format_is_refused_by_naming_the_other(metas, other):
    assert f"MODEL_ID={other}," in refusal(choose, asking_for(metas))


@pytest.mark.parametrize(
    "model_id", [LLAMA_2_MODEL_ID, "codellama/CodeLlama-7b-Instruct-hf", "meta-llama/Llama-3.1-8B"]
)
def test_other_models_are_not_refused_by_name(model_id):
    assert choose(asking_for(model_id)).model_id == model_id


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("someone/tiny", "someone/tiny"),
        ("someone/tiny@v1", "someone/tiny"),
        ("{folder}", "mine@home"),
        ("{folder}/", "mine@home"),
        ("{folder}/../mine@home", "mine@home"),
        ("/nowhere/at/all", "all"),
        ("./all", "all"),
        ("/cache/models--someone--tiny/snapshots/0a1b", "someone/tiny"),
    ],
)
def test_in_public_a_model_has_a_name_and_no_path(tmp_path, model_id, name):
    folder = tmp_path / "mine@home"
    folder.mkdir()
    assert choose(asking_for(model_id.format(folder=folder))).name == name


@pytest.mark.parametrize(
    ("folder", "chat_format"),
    [
        ("Llama-2-7b-hf", NO_FORMAT),
        ("models--meta-llama--Llama-2-7b-hf/snapshots/0a1b", NO_FORMAT),
        ("Llama-2-7b-chat-hf", None),
        ("models--someone--Llama-2-7b-hf/snapshots/0a1b", None),
    ],
)
def test_a_base_model_in_a_folder_is_known_by_the_name_that_it_has_on_the_hub(tmp_path, tiny, folder, chat_format):
    # It chatted in Llama 2's format, in which it was never trained.
    shutil.copytree(tiny, tmp_path / folder)
    assert fetch(choose(asking_for(tmp_path / folder)), ignore).chat_format == chat_format


def test_a_model_that_was_trained_to_chat_may_lie_in_a_folder_of_its_bases_name(tmp_path, chat_model):
    shutil.copytree(chat_model, tmp_path / "Llama-2-7b-hf")
    assert fetch(choose(asking_for(tmp_path / "Llama-2-7b-hf")), ignore).chat_format is None


def test_a_model_in_the_home_of_nobody_is_not_there():
    # "The model could not be loaded because of an unexpected error."
    sentence = refusal(fetch, choose(asking_for("~nobody-here/llama")), ignore)
    assert sentence.startswith("There is no folder '~nobody-here/llama'")


def test_in_the_folder_of_a_model_a_dot_is_enough_and_its_name_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose(asking_for(".")).name == tmp_path.name


@pytest.mark.parametrize("optimize", [0, 1, 2])
def test_python_without_docstrings_is_refused(monkeypatch, tiny, optimize):
    """With PYTHONOPTIMIZE=2 transformers raised on its own missing docstrings, and a whole model was called damaged."""
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=optimize))
    if optimize == 2:
        assert "PYTHONOPTIMIZE=1" in refusal(fetch, choose(asking_for(tiny)), ignore)
    else:
        fetch(choose(asking_for(tiny)), ignore)
