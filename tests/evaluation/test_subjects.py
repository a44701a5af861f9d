"""Which models are measured, under which names, and how they share weights."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama2_chat.evaluation.evaluation import find_finetuned
from llama2_chat.evaluation.subjects import fetch_checkpoint, find_runs, find_subjects, load_in_turn
from llama2_chat.loading import load
from llama2_chat.loading.adapters import load_adapter
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.training.curves import write_curves
from llama2_chat.training.run_json import read_run, write_run
from tests.support.evaluating import evaluate, loss_of, refusal
from tests.support.runs import save_adapter, save_run
from tests.support.serving import ignore
from tests.support.small_chat_model import save_chat_model

# PEFT 0.21 uses names that transformers 5.23 has deprecated.


def test_a_base_is_itself_again_after_its_adapter_was_measured(run):
    subjects = find_subjects([str(run)], find_runs([str(run)]))
    again = [*subjects, replace(subjects[0], name="base again")]
    ids, logits = torch.arange(20)[None], {}
    for subject, model in load_in_turn(again, "float32"):
        logits[subject.name] = model(ids).logits
    assert torch.equal(logits["base"], logits["base again"])
    assert not torch.allclose(logits["base"], logits["adapter"], atol=1e-3)


def test_nobody_claims_to_know_what_a_run_was_trained_on_whose_data_changed_in_the_middle(run):
    assert find_runs([str(run)])[str(run)].train_sha256
    write_run(replace(read_run(run), mixed_data=True), run)
    runs = find_runs([str(run)])
    assert runs[str(run)].train_sha256 is None
    write_curves([{"step": step, "epoch": step, "eval loss": 2.0 - step} for step in range(3)], run)
    (finetuned,) = find_finetuned(find_subjects([str(run)], runs), runs[str(run)])
    assert (finetuned.curves, finetuned.knows_splits) == ([], False)


@pytest.mark.slow
def test_a_merged_model_measures_as_its_adapter(run, tmp_path):
    checkpoint = fetch_checkpoint(str(run))
    base = load.load_base(checkpoint, "float32", "cpu", ignore)
    load_adapter(base, checkpoint).merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "merged")
    write_run(replace(read_run(run), merged_to=str(tmp_path / "merged")), run)
    found, _ = evaluate(run, "--sheet", "0")
    for split in ("train", "eval", "test"):
        assert loss_of(found, "merged", split) == pytest.approx(loss_of(found, "adapter", split), rel=1e-4)


@pytest.mark.slow
def test_only_one_base_is_in_memory_at_a_time(chat_model, dataset, tmp_path, monkeypatch):
    """The one measured last stayed in memory while the next one was loaded."""
    loaded, load_base = [], load.load_base

    def watched(*arguments):
        assert not any(reference() for reference in loaded)
        model = load_base(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(load, "load_base", watched)
    other = save_chat_model(tmp_path / "other")
    evaluate(chat_model, other, "--dataset_name", dataset, "--sheet", "0", "--output_dir", tmp_path / "both")
    assert len(loaded) == 2


@pytest.mark.slow
def test_models_whose_folders_are_called_alike_stay_apart(chat_model, dataset, tmp_path):
    """Their figures were mixed, and shown as mean ± standard deviation as if they were folds."""
    one, two = (save_run(chat_model, dataset, tmp_path / name / "demo") for name in ("one", "two"))
    save_adapter(chat_model, two, seed=1)
    found, page = evaluate(one, two, "--sheet", "0")
    assert loss_of(found, "one/demo: adapter", "test") != loss_of(found, "two/demo: adapter", "test")
    assert "one/demo and two/demo, evaluated" in page
    assert "±" not in page
    assert "given twice" in refusal(one, one)


@pytest.mark.slow
def test_each_fold_is_measured_on_what_it_left_out(chat_model, dataset, tmp_path):
    run = save_run(chat_model, dataset, tmp_path / "folds", folds=3, test_fraction=0.0)
    found, page = evaluate(run)
    losses = [loss_of(found, "adapter", "eval", fold) for fold in (1, 2, 3)]
    assert len(set(losses)) == 3
    counts = [row["conversations"] for row in found["perplexity"] if (row["model"], row["split"]) == ("base", "eval")]
    assert sum(counts) == 12
    mean, deviation = np.mean(np.exp(losses)), np.std(np.exp(losses), ddof=1)
    assert f"{mean:.3g} ± {deviation:.2g}" in page
    assert "- eval: 4 conversations, " in page
    assert "in each fold" in page
    assert "- fold 3: " in page
    alone, _ = evaluate(run / "fold-2", "--sheet", "0")
    assert loss_of(alone, "adapter", "eval") == pytest.approx(losses[1])
    assert "measured by itself" in refusal(run, "--tasks", "hellaswag")
