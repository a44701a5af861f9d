"""Which conversations models are measured on; what would not be fair is refused before any weights are loaded."""

import json

import pytest

from llama2_chat.evaluation import eval_data
from llama2_chat.evaluation.options import Options
from llama2_chat.loading import load
from llama2_chat.training.row_sources import AS_IT_IS
from llama2_chat.training.run_json import read_run
from tests.support.conversations import conversation, write_rows
from tests.support.evaluating import evaluate, refusal
from tests.support.runs import new_run, save_adapter, save_run

# PEFT 0.21 uses names that transformers 5.23 has deprecated.


def test_data_that_has_changed_since_the_training_is_refused(run, dataset, no_weights):
    with dataset.open("a") as file:
        file.write(json.dumps({"prompt": "another", "completion": "row"}) + "\n")
    assert f"{dataset} has changed since the training" in refusal(run)


def test_a_model_without_a_run_needs_to_be_told_the_data(chat_model, no_weights):
    assert "has no run.json that names its eval split. Give --dataset_name." in refusal(chat_model)
    assert "There is no folder trained/typo here" in refusal("trained/typo")


def test_other_data_than_a_runs_need_not_be_of_its_kind(tmp_path):
    """After DPO, and after --columns, no other data could be named: "the data has no column ask"."""
    file = write_rows(tmp_path / "some.jsonl", *(conversation(f"What is {i}?", f"It is {i}.") for i in range(9)))
    trained = new_run(reading=dict(AS_IT_IS._asdict(), columns={"ask": "prompt"}, method="dpo", split="train_sft"))
    run, (parts,) = eval_data.find_splits({"m": trained}, Options(["m"], tmp_path, ["float32"], dataset_names=[file]))
    assert len(parts.train) + len(parts.eval) + len(parts.test) == 9
    assert run.reading == {}


@pytest.mark.slow
def test_models_trained_on_different_things_are_compared_only_on_data_that_is_named(
    run, chat_model, dataset, tmp_path, monkeypatch
):
    other = save_run(chat_model, dataset, tmp_path / "other", seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))
        assert "were trained on different conversations" in refusal(run, other)
    found, page = evaluate(run, other, "--dataset_name", dataset, "--sheet", "0", "--output_dir", tmp_path / "both")
    assert [row["model"] for row in found["perplexity"] if row["split"] == "test"] == [
        "run: base", "run: adapter", "other: adapter"
    ]  # fmt: skip
    assert "It is not known which of these conversations the models were trained on" in page


@pytest.mark.slow
def test_nothing_is_claimed_about_what_an_adapter_from_elsewhere_was_trained_on(chat_model, dataset, tmp_path):
    adapter = save_adapter(chat_model, tmp_path / "elsewhere")
    found, page = evaluate(adapter, "--dataset_name", dataset, "--sheet", "0")
    assert [row["kind"] for row in found["overfitting"]] == ["unknown"]
    assert "It is not known which of these conversations the models were trained on" in page


@pytest.mark.slow
def test_data_that_has_only_moved_is_recognised(run, dataset, tmp_path):
    moved = dataset.rename(tmp_path / "moved.jsonl")
    found, _ = evaluate(run, "--dataset_name", moved, "--sheet", "0")
    assert found["run"]["train_sha256"] == read_run(run).train_sha256
    assert found["overfitting"][0]["kind"] != "unknown"
