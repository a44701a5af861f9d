"""Models in 4 and 8 bits for a GPU: quantised while they are read, kept for the next start, and said if impossible."""

import logging
import shutil
import weakref

import pytest
import torch

from llama2_chat.kernels.packed import PackedLinear
from llama2_chat.loading import packing
from llama2_chat.loading.disk import Files
from llama2_chat.loading.memory import Gpu
from llama2_chat.loading.packing import packed_copy, why_not_packed
from llama2_chat.loading.quantize import precision_of
from tests.support.small_model import save_model


@pytest.fixture
def files(tmp_path):
    return Files(save_model(tmp_path / "model", hidden_size=128, intermediate_size=256))


@pytest.fixture
def read(files, tmp_path):
    """Reads the model in int4, as a start does on a GPU, but on the CPU."""
    return lambda: packing.read_packed(files, "int4", tmp_path / "cache", torch.bfloat16, {"": "cpu"}, None)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_model_is_quantised_while_it_is_read(files, tmp_path, precision):
    model = packing.read_packed(files, precision, tmp_path / "cache", torch.bfloat16, {"": "cpu"}, None)
    assert precision_of(model) == precision
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_next_start_reads_the_copy_that_was_kept(files, read, tmp_path, monkeypatch):
    first = read()
    monkeypatch.setattr(packing, "quantize", None)
    again = read()
    assert precision_of(again) == "int4"
    assert all(
        torch.equal(*pair) for pair in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_copy_of_weights_that_have_changed_makes_room_for_the_new_one(files, read, tmp_path):
    read()
    old = packed_copy(files, "int4", tmp_path / "cache")
    (files.folder / "model.safetensors").touch()
    assert packed_copy(files, "int4", tmp_path / "cache") is None
    read()
    assert not old.folder.exists()
    assert packed_copy(files, "int4", tmp_path / "cache").folder.is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_damaged_copy_is_made_anew(files, read, tmp_path, name):
    read()
    copy = packed_copy(files, "int4", tmp_path / "cache").folder / name
    whole = copy.stat().st_size
    copy.write_bytes(copy.read_bytes()[: whole // 2])
    assert precision_of(read()) == "int4"
    assert copy.stat().st_size == whole


def test_a_damaged_copy_that_cannot_be_removed_is_left_alone(files, read, tmp_path, monkeypatch):
    read()
    copy = packed_copy(files, "int4", tmp_path / "cache").folder / "config.json"
    copy.write_text("{")

    def refuse(path, *_, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    def refuse_lock(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    monkeypatch.setattr(packing, "FileLock", refuse_lock)
    assert precision_of(read()) == "int4"


def test_without_room_for_a_copy_the_model_answers_all_the_same(files, read, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert precision_of(read()) == "int4"
    assert packed_copy(files, "int4", tmp_path / "cache") is None
    assert "quantised at each start" in caplog.text
    assert "CACHE_DIR" in caplog.text


def test_a_gpu_that_the_kernels_do_not_know_is_told():
    assert why_not_packed([Gpu(10**10, (7, 0))]) == "a GPU here is older than compute capability 7.5"


def test_kernels_that_cannot_be_compiled_are_told_and_logged(caplog):
    caplog.set_level(logging.WARNING)
    if torch.cuda.is_available():
        pytest.skip("they can be, here")
    assert why_not_packed([Gpu(10**10)]).startswith("humming-kernels does not work here (")
    assert "humming-kernels, which int4 and int8 need, does not work here" in caplog.text


def test_layers_that_become_one_product_are_gone_before_the_next_are_joined(read, monkeypatch):
    # A 13B in int8 ran out of 22 GB: what it was joined from stayed to the end.
    model = read()
    attention = [weakref.ref(layer.self_attn.q_proj.weight) for layer in model.model.layers]
    alive = []
    monkeypatch.setattr(
        PackedLinear, "prepare", lambda layer: alive.append(sum(each() is not None for each in attention))
    )
    packing.finish_packed(model)
    assert alive[0] == len(attention) - 1
    assert alive[-1] == 0
