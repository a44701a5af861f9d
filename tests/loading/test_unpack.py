"""There is one plain copy of a checkpoint that comes quantised, and it is said what it takes."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llama2_chat.loading import load as loading
from llama2_chat.loading import unpack
from llama2_chat.loading.memory import Gpu
from llama2_chat.server.probes import PlannedStart, probe_disk
from tests.support import packers
from tests.support.loading import asking_for, get, logits, refusal
from tests.support.packers import change_config, packed

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def model(tiny, tmp_path):
    packed(tmp_path / "model", tiny, packers.gptq, GPTQ)
    return asking_for(tmp_path / "model", cache_dir=tmp_path / "cache", quantization="none")


def copies(settings):
    return sorted(path for path in (settings.cache_dir / "unpacked").iterdir() if path.is_dir())


def test_a_copy_is_made_once_and_then_loaded_in_any_precision(model, tmp_path):
    get(model)
    (copy,) = copies(model)
    made = (copy / "model.safetensors.index.json").stat().st_mtime_ns
    again = get(asking_for(model.model_id, cache_dir=model.cache_dir))
    assert again.precision == "int8"
    assert "came quantised by gptq" in again.why
    assert (copy / "model.safetensors.index.json").stat().st_mtime_ns == made


def touch_weights(settings, monkeypatch):
    Path(settings.model_id, "model.safetensors").touch()


def change_settings(settings, monkeypatch):
    change_config(Path(settings.model_id), rms_norm_eps=0.5)


def write_otherwise(settings, monkeypatch):
    monkeypatch.setattr(unpack, "VERSION", unpack.VERSION + 1)


@pytest.mark.parametrize("change", [touch_weights, change_settings, write_otherwise], ids=lambda each: each.__name__)
def test_a_copy_that_is_outdated_makes_room_for_the_new_one(model, tiny, monkeypatch, caplog, change):
    # Each lay there for good: 26 GB for a 13B.
    caplog.set_level(logging.INFO)
    other = asking_for(model.model_id + "2", cache_dir=model.cache_dir)
    packed(Path(other.model_id), tiny, packers.gptq, GPTQ)
    get(other)
    (others,) = copies(other)
    before = logits(get(model).model)
    (old,) = set(copies(model)) - {others}
    old.with_name(f"{old.name[:16]}-cut-off.staging").mkdir()
    change(model, monkeypatch)
    after = logits(get(model).model)
    (new,) = set(copies(model)) - {others}
    assert old != new
    assert (before == after).all() == (change is not change_settings)
    assert f"Removing an outdated copy of {model.model_id}, {old}" in caplog.text
    assert f"is unpacked and takes 0 MB more on disk: {new}" in caplog.text


@pytest.mark.parametrize(
    ("name", "kept_bytes"),
    [
        *((name, 60) for name in ("model-00001.safetensors", "model.safetensors.index.json", "config.json")),
        *((name, 5) for name in ("generation_config.json", "config.json")),
        ("model-00001.safetensors", None),
    ],
)
def test_a_copy_that_is_damaged_is_made_anew(model, caplog, name, kept_bytes):
    # Each start ended with the advice to copy the model there again, and no word of which folder to remove.
    before = logits(get(model).model)
    (copy,) = copies(model)
    content = (copy / name).read_bytes()
    if kept_bytes is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content[:kept_bytes])
    assert torch.equal(logits(get(model).model), before)
    assert f"{copy} is damaged and made anew" in caplog.text
    assert copies(model) == [copy]


def test_a_copy_is_found_where_nothing_can_be_written_any_more_and_none_is_made_there(model, monkeypatch):
    # The model was said to be damaged.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    get(model)
    monkeypatch.setattr(unpack, "FileLock", refuse)
    get(model)
    Path(model.model_id, "model.safetensors").touch()
    sentence = refusal(get, model)
    assert "cannot be written" in sentence
    assert "CACHE_DIR" in sentence


def test_what_is_packed_for_a_gpu_goes_with_the_copy_that_it_was_made_from(model, monkeypatch):
    # Its name was that of the outdated copy, so nobody knew whose it was: 7 GB for a 13B.
    packs_in = []

    def read(files, precision, cache_dir, *_):
        packs_in.append(cache_dir)
        return loading.read_model(files, torch.bfloat16, None, None)

    monkeypatch.setattr(loading, "visible_gpus", lambda: [Gpu(10**11)])
    monkeypatch.setattr(loading, "why_not_packed", lambda gpus: None)
    monkeypatch.setattr(loading, "keep_compiled", lambda cache_dir: None)
    monkeypatch.setattr(loading, "read_packed", read)
    get(replace(model, quantization="int4"))
    assert packs_in == copies(model)


def test_a_disk_without_room_for_a_copy_is_told_before_anything_is_written(model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 200_000))
    sentence = refusal(get, model)
    assert "more on disk" in sentence
    assert "CACHE_DIR" in sentence
    assert copies(model) == []
    assert refusal(probe_disk, PlannedStart(model)) == sentence


def test_the_check_before_a_start_counts_a_copy_until_it_is_there(model):
    assert "still to be written" in probe_disk(PlannedStart(model))
    get(model)
    assert "nothing to download" in probe_disk(PlannedStart(model))


def test_a_disk_that_fills_up_meanwhile_is_a_sentence_and_leaves_nothing_behind(model, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(unpack, "save_file", full)
    sentence = refusal(get, model)
    assert "No space left on device" in sentence
    assert "CACHE_DIR" in sentence
    assert copies(model) == []


def test_a_cache_folder_that_cannot_be_written_is_told(model):
    file = Path(model.model_id, "config.json")
    assert "CACHE_DIR" in refusal(get, asking_for(model.model_id, cache_dir=file))
