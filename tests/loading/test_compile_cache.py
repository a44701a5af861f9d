"""A disk that is full where compiled kernels are kept stops no start on a GPU, and costs one line in the log."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from llama2_chat.loading import compile_cache

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HUMMING_CACHE_DIR")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """One for each library, and one that is a disk in memory."""
    for name in NAMES:
        monkeypatch.setenv(name, str(tmp_path / name))
    (memory := tmp_path / "memory").mkdir()
    monkeypatch.setattr(compile_cache, "MEMORY", memory)
    return {name: tmp_path / name for name in NAMES}


def fill(monkeypatch, *full):
    real = shutil.disk_usage

    def usage(folder):
        return real(folder)._replace(free=1000 if Path(folder) in full else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def now():
    return {name: Path(os.environ[name]) for name in NAMES}


def test_folders_with_room_stay_where_they_are(folders, tmp_path, monkeypatch, caplog):
    fill(monkeypatch)
    compile_cache.keep_compiled(tmp_path)
    assert now() == folders
    assert not caplog.records


@pytest.mark.parametrize("trouble", ["full", "a file is in the way"])
def test_what_is_compiled_goes_elsewhere_for_once_where_a_folder_cannot_hold_it(
    folders, tmp_path, monkeypatch, caplog, trouble
):
    # Kernels failed to compile, and with them the start or every answer.
    blocked = folders["TRITON_CACHE_DIR"]
    if trouble == "full":
        fill(monkeypatch, blocked)
    else:
        blocked.write_text("")
    compile_cache.keep_compiled(tmp_path)
    found = now()
    assert found.pop("TRITON_CACHE_DIR").is_relative_to(compile_cache.MEMORY)
    assert found == {name: folder for name, folder in folders.items() if name != "TRITON_CACHE_DIR"}
    (line,) = caplog.messages
    assert str(blocked) in line
    assert "compiles again" in line


def test_a_start_goes_on_where_no_disk_has_room(folders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    compile_cache.keep_compiled(tmp_path)
    assert now() == folders
    assert "free some space" in caplog.text


def test_what_pytorch_compiles_is_kept_in_cache_dir(folders, tmp_path, monkeypatch):
    fill(monkeypatch)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_cache.keep_compiled(tmp_path)
    assert now()["TORCHINDUCTOR_CACHE_DIR"] == tmp_path / "compiled"


def test_what_was_compiled_around_other_kernels_is_not_found_again(folders, tmp_path, monkeypatch):
    # After an update an operator gave another shape than the one in the compiled code, and every step failed.
    fill(monkeypatch)
    (kernels := tmp_path / "kernels").mkdir()
    monkeypatch.setattr(compile_cache, "KERNELS", kernels)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    tags = []
    for version in ("one", "another", "one"):
        (kernels / "lora.py").write_text(version)
        compile_cache.keep_compiled(tmp_path)
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] == tags[2] != tags[1]
