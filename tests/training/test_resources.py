"""Full memory and a full disk, told in sentences that say what to do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama2_chat.errors import ChatError
from llama2_chat.training import resources
from llama2_chat.training.options import Options
from llama2_chat.training.resources import let_others_read, translate_resource_errors


def test_out_of_memory_says_which_flag_to_change():
    options = Options("a", "b", Path("c"), 1e-4, use_peft=True, batch_size=8)
    translating = translate_resource_errors(options.memory_remedies(), Path("a"), "Kept.")
    with pytest.raises(ChatError) as raised, translating:
        raise torch.OutOfMemoryError
    for words in ("--batch_size 8", "--load_in_4bit", "--max_length 1024", "Kept."):
        assert words in str(raised.value)


def test_weights_have_the_mode_of_what_lies_beside_them(tmp_path):
    for name, mode in (("tokenizer_config.json", 0o640), ("adapter_model.safetensors", 0o600), ("run.json", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    let_others_read(tmp_path)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "tokenizer_config.json": 0o640,
        "adapter_model.safetensors": 0o640,
        "run.json": 0o644,
    }


@pytest.mark.parametrize("words", ["[Errno 28] No space left on device", "unexpected pos 512 vs 448"])
def test_a_full_disk_is_recognised_whatever_the_library_says(words, tmp_path, monkeypatch):
    # torch.save says only that the file is too short.
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    full = pytest.raises(ChatError, match=r"is full\. Make room there\. Kept\.")
    with full, translate_resource_errors([], tmp_path, "Kept."):
        raise RuntimeError(words)


def test_other_errors_are_not_taken_for_full_memory_or_a_full_disk(tmp_path):
    for error in (RuntimeError("shapes"), ChatError("A sentence of its own.")):
        with pytest.raises(type(error), match=str(error)), translate_resource_errors([], tmp_path, "Kept."):
            raise error
