"""A run is neither overwritten by another nor goes on otherwise unasked, and nothing is written over what is there."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training.checkpoints import check_folders, find_checkpoint, take_up
from llama2_chat.training.options import Options
from llama2_chat.training.run_json import write_run
from tests.support.runs import new_run


def save_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text('{"epoch": 1}')


def test_a_run_is_not_overwritten_by_another(tmp_path):
    folder = tmp_path / "fold-1"
    (folder / "checkpoint-2").mkdir(parents=True)
    assert find_checkpoint(folder, goes_on=True) is None  # it was killed while it wrote
    for step in (2, 10):
        save_state(folder / f"checkpoint-{step}")
    assert find_checkpoint(folder, goes_on=True) == folder / "checkpoint-10"
    for output_dir in (folder, tmp_path):  # as one run, or as a fold
        with pytest.raises(ChatError, match="has a run already"):
            find_checkpoint(output_dir, goes_on=False)


@pytest.mark.parametrize("of_fold", [False, True])
def test_a_run_that_is_done_is_kept_though_its_checkpoints_were_deleted(tmp_path, of_fold):
    """The same command trained anew and wrote over it, with --resume too."""
    folder = tmp_path / "fold-1" if of_fold else tmp_path
    folder.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "curves.csv"):
        (folder / name).touch()
    with pytest.raises(ChatError, match="has a run already"):
        find_checkpoint(tmp_path, goes_on=False)
    assert find_checkpoint(tmp_path, goes_on=True) is None


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_model_that_came_from_elsewhere_is_not_written_over(tmp_path, goes_on):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ChatError, match="holds a model that no run there has left"):
        find_checkpoint(tmp_path, goes_on)


def began_with(folder, **changes):
    """A run that has a checkpoint, and was begun with these changes."""
    options = Options("model", "data", folder, 1e-4, use_peft=True)
    settings = options.deciding() | {"processes": 1}
    run = new_run(train_sha256="1" * 64, eval_sha256="2" * 64, model_sha256="3" * 64, settings=settings)
    changes = {"settings": settings | changes.pop("settings", {}), **changes}
    write_run(replace(run, **changes), folder)
    save_state(folder / "checkpoint-7")
    return run


# Everything that decides a run, as it was at the first start, and what is said of it.
CHANGES = {
    "the model": ({"model_sha256": "4" * 64}, "model was 444444444444 and is now 333333333333"),
    "the data": ({"train_sha256": "4" * 64}, "train data was 444444444444 and is now 111111111111"),
    "the eval split": ({"eval_sha256": "4" * 64}, "eval data was 444444444444 and is now 222222222222"),
    "the seed": ({"seed": 3}, "seed was 3 and is now 0"),
    "the precision": ({"precision": "nf4"}, "precision was nf4 and is now float32"),
    "the length": ({"max_length": 99}, "max_length was 99 and is now 256"),
    "the eval fraction": ({"eval_fraction": 0.5}, "eval_fraction was 0.5 and is now 0.1"),
    "the test fraction": ({"test_fraction": 0.5}, "test_fraction was 0.5 and is now 0.1"),
    **{
        f"--{name}": ({"settings": {name: before}}, f"{name} was {before} and is now {after}")
        for name, before, after in (
            ("learning_rate", 0.5, 0.0001),
            ("num_train_epochs", 9.0, 3.0),
            ("batch_size", 8, 4),
            ("gradient_accumulation_steps", 2, 1),
            ("processes", 2, 1),
            ("max_steps", 5, None),
            ("lr_scheduler_type", "linear", "cosine"),
            ("warmup_ratio", 0.5, 0.03),
            ("packing", True, False),
            ("early_stopping", 3, None),
            ("lora_alpha", 8, 32),
            ("lora_dropout", 0.5, 0.05),
            ("use_rslora", True, False),
        )
    },
}
FIXED = {
    "--folds": ({"folds": 3}, "folds was 3 and is now 0"),
    "--use_peft": ({"settings": {"use_peft": False}}, "use_peft was False and is now True"),
    "--lora_r": ({"settings": {"lora_r": 4}}, "lora_r was 4 and is now 16"),
    **{
        f"--{name}": ({"settings": {name: before}}, f"{name} was {before} and is now {after}")
        for name, before, after in (
            ("optim", "sgd", "adamw_torch_fused"),
            ("use_dora", True, False),
            ("weight_decay", 0.5, 0.0),
            ("save_steps", 5.0, 0.05),
            ("logging_steps", 5, 1),
        )
    },
    "among GPUs": ({"settings": {"divided": True}}, "divided was True and is now False"),
    "--target_modules": ({"settings": {"target_modules": ["q_proj"]}}, r"target_modules was \['q_proj'\] and is now"),
}


@pytest.mark.parametrize("name", CHANGES | FIXED)
def test_a_run_that_began_otherwise_does_not_go_on_and_says_both_values(tmp_path, name):
    changes, sentence = (CHANGES | FIXED)[name]
    run = began_with(tmp_path, **changes)
    with pytest.raises(ChatError, match=f"{sentence}.*--resume_with_changes"):
        take_up(run, tmp_path, with_changes=False)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_taken_up_knowingly_and_kept(tmp_path, name):
    changes, sentence = CHANGES[name]
    run = take_up(began_with(tmp_path, **changes), tmp_path, with_changes=True)
    assert run.changes == [f"after step 7 {sentence}"]
    assert run.mixed_data == ("data" in sentence)
    write_run(run, tmp_path)
    assert take_up(began_with(tmp_path / "other"), tmp_path, with_changes=False) == run  # no change any more


@pytest.mark.parametrize("name", FIXED)
def test_what_a_checkpoint_cannot_take_up_is_refused_however_it_is_asked(tmp_path, name):
    changes, sentence = FIXED[name]
    with pytest.raises(ChatError, match=f"{sentence}.*a run cannot go on with that"):
        take_up(began_with(tmp_path, **changes), tmp_path, with_changes=True)


def test_a_run_that_is_done_takes_up_nothing_but_more_epochs(tmp_path):
    (tmp_path / "curves.csv").touch()
    with pytest.raises(ChatError, match="is done, and seed was 3 and is now 0"):
        take_up(began_with(tmp_path, seed=3), tmp_path, with_changes=True)
    assert take_up(began_with(tmp_path, settings={"num_train_epochs": 1.0}), tmp_path, with_changes=True).changes
    run = began_with(tmp_path, settings={"num_train_epochs": 1.0})
    (tmp_path / "checkpoint-7").rename(tmp_path / "moved")
    with pytest.raises(ChatError, match=r"is done and its checkpoints are gone, and num_train_epochs was 1.0"):
        take_up(run, tmp_path, with_changes=True)


def test_the_same_run_goes_on_unasked_and_one_without_a_checkpoint_begins_anew(tmp_path):
    run = began_with(tmp_path)
    assert take_up(run, tmp_path, with_changes=False) == run
    assert take_up(run, tmp_path / "none", with_changes=False) == run


def test_the_folds_of_a_run_are_compared_too(tmp_path):
    run = began_with(tmp_path, seed=3)
    (tmp_path / "checkpoint-7").rename(tmp_path / "moved")
    save_state(tmp_path / "fold-1" / "checkpoint-7")
    with pytest.raises(ChatError, match="seed was 3"):
        take_up(run, tmp_path, with_changes=False)


@pytest.mark.parametrize(
    ("output_dir", "merge_to", "resume"),
    [
        ("model", None, False),
        ("data.jsonl", None, False),
        ("data.jsonl/run", None, False),
        ("run", "run", True),
        ("run", "model", True),
        ("run", "full", False),
        ("run", "full", True),
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
    write_run(new_run(merged_to=str(tmp_path / "merged")), tmp_path / "run")
    options = Options("model", "data", tmp_path / "run", 1e-4, use_peft=True, resume=True)
    check_folders(replace(options, merge_to=tmp_path / "merged"))
