"""Repositories of a Hub that a stand-in serves, and a sentence for every way that fails."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, choose, fetch
from llama2_chat.loading.disk import Files
from llama2_chat.loading.hub import fetch_small_files, fetch_weights
from llama2_chat.loading.load import load
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.settings import Settings
from tests.support.hub import COMMIT
from tests.support.loading import asking_for, get, refusal
from tests.support.serving import ignore

# peft 0.21 asks transformers 5.23 by a name that it has given up.


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
    checkpoint = fetch(choose(asking_for("someone/tiny")), ignore)
    assert load_tokenizer(checkpoint)("a b").input_ids == [1, 2]
    assert not any("safetensors" in path for _, path in hub.requests)


def test_pickles_and_subfolders_stay_on_the_hub_when_there_are_safetensors(hub, tiny, tmp_path):
    repo = shutil.copytree(tiny, tmp_path / "repo")
    (repo / "pytorch_model.bin").write_bytes(b"never asked for")
    (repo / "original").mkdir()
    (repo / "original" / "params.json").write_text("{}")
    hub.repos["someone/both"] = repo
    get(asking_for("someone/both"))
    assert not [path for _, path in hub.requests if "pytorch_model" in path or "original" in path]


def test_licence_and_use_policy_come_along_in_whatever_kind_of_file(hub, tiny, tmp_path):
    repo = shutil.copytree(tiny, tmp_path / "repo")
    for name in ("LICENSE", "USE_POLICY.md", "README.md", "curves.png"):
        (repo / name).write_text("a")
    hub.repos["someone/licensed"] = repo
    folder = fetch_small_files("someone/licensed", ignore).folder
    assert {"LICENSE", "USE_POLICY.md", "README.md"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "curves.png").exists()


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
        (no_such_model, ["no public model someone/tiny", "spelling", "needs HF_TOKEN"]),
        (no_such_model_for_this_token, ["no model someone/tiny", "this HF_TOKEN can see", "spelling"]),
        (no_network, ["someone/tiny is not complete in the cache", "cannot be reached", "network"]),
        (hub_is_ill, ["error 503", "someone/tiny", "later"]),
        (too_many_requests, ["too many requests", "Wait"]),
        (offline_mode, ["someone/tiny is not in the cache", "HF_HUB_OFFLINE"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trouble_with_the_hub_is_a_sentence_with_the_next_step(hub, monkeypatch, trouble, facts):
    trouble(hub, monkeypatch)
    sentence = refusal(get, asking_for("someone/tiny"))
    assert [fact for fact in facts if fact not in sentence] == []


def test_a_hub_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "hub", Path("/proc/hub")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        assert "set HF_HOME to a folder" in refusal(get, asking_for("someone/tiny"))


def test_a_token_that_no_header_can_hold_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ré")
    assert "HF_TOKEN contains a character" in refusal(get, asking_for("someone/tiny"))


def test_a_full_disk_is_refused_with_both_numbers_before_the_weights_are_asked_for(hub, tiny, monkeypatch):
    checkpoint = fetch(choose(asking_for("someone/tiny")), ignore)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 12_000_000))
    monkeypatch.setattr(Files, "sizes", lambda self: {"model.safetensors": 26_000_000_000})
    sentence = refusal(load, checkpoint, ignore)
    assert "26.0 GB" in sentence
    assert "12 MB free" in sentence
    assert "HF_HOME" in sentence
    assert not any("safetensors" in path for _, path in hub.requests)


def test_a_name_that_is_no_id_and_no_folder_is_refused(hub):
    assert "spelling" in refusal(get, asking_for("not/a/model id"))
    assert "no folder ./models/nowhere" in refusal(get, asking_for("./models/nowhere"))


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
        "    checkpoint = fetch(choose(Settings.read([])), print)\n"
        "    print(load(checkpoint, print).precision)\n"
        "except ModelUnavailable as error:\n"
        "    print('refused:', error)"
    )
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_reader", "MODEL_ID": "someone/tiny"}
    root = Path(__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ | mine, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1].startswith("refused: The account of this HF_TOKEN" if trouble else "int8")


def test_a_revision_is_asked_for_behind_an_at_sign(hub):
    hub.revisions = {"v1", COMMIT}
    assert get(asking_for("someone/tiny@v1")).device == "cpu"
    assert any(path.endswith("/revision/v1") for _, path in hub.requests)
    assert "no branch, tag or commit main" in refusal(get, asking_for("someone/tiny"))
    assert "no branch, tag or commit v2" in refusal(get, asking_for("someone/tiny@v2"))
    hub.close()
    assert get(asking_for("someone/tiny@v1")).device == "cpu"


def test_an_at_sign_without_a_revision_is_refused(hub):
    assert "no revision after the @" in refusal(get, asking_for("someone/tiny@"))
