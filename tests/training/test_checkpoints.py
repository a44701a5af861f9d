"""A run is neither overwritten by another nor continued with other data, and nothing is written over what is there."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training.checkpoints import check_folders, find_checkpoint
from llama2_chat.training.options import Options
from llama2_chat.training.run_json import write_run
from tests.support.runs import new_run


def save_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text('{"epoch": 1}')


def test_a_run_is_not_overwritten_by_another(tmp_path):
    folder = tmp_path / "fold-1"
    (folder / "checkpoint-2").mkdir(parents=True)
    assert find_checkpoint(folder, resume=True) is None  # it was killed while it wrote
    for step in (2, 10):
        save_state(folder / f"checkpoint-{step}")
    assert find_checkpoint(folder, resume=True) == folder / "checkpoint-10"
    for output_dir in (folder, tmp_path):  # as one run, or as a fold
        with pytest.raises(ChatError, match="has a run already"):
            find_checkpoint(output_dir, resume=False)


def test_a_run_does_not_go_on_with_other_conversations(tmp_path):
    write_run(new_run(train_sha256="1"), tmp_path)
    save_state(tmp_path / "checkpoint-2")
    assert find_checkpoint(tmp_path, True, "1") == tmp_path / "checkpoint-2"
    with pytest.raises(ChatError, match="was trained on other conversations"):
        find_checkpoint(tmp_path, True, "2")


@pytest.mark.parametrize(
    ("output_dir", "merge_to", "resume"),
    [
        ("model", None, False),
        ("data.jsonl", None, False),
        ("data.jsonl/run", None, False),
        ("run", "run", True),
        ("run", "model", True),
        ("run", "full", False),
    ],
)
def test_nothing_is_written_over_what_is_there(tmp_path, monkeypatch, output_dir, merge_to, resume):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "full"):
        Path(folder).mkdir()
        Path(folder, "config.json").touch()
    Path("data.jsonl").touch()
    options = Options("model", "data.jsonl", Path(output_dir), 1e-4, use_peft=True, resume=resume)
    options = replace(options, merge_to=merge_to and Path(merge_to))
    with pytest.raises(ChatError, match=rf"(written to|--merge_to) {merge_to or output_dir}\b.* another"):
        check_folders(options)


def test_a_resumed_run_may_write_its_merged_model_again(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    options = Options("model", "data", tmp_path / "run", 1e-4, use_peft=True, resume=True)
    check_folders(replace(options, merge_to=tmp_path / "merged"))
