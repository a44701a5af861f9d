"""What scripts/evaluate_model.py promises: flags, refusals before hours are spent, and keeping what was measured.

Fast tests measure a tiny random model and an adapter that nobody trained; the slow ones run the program itself, and
evaluate the demo.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama2_chat import ROOT
from llama2_chat.evaluation import eval_data, evaluation, judging
from llama2_chat.evaluation.options import Options
from llama2_chat.training import chat_data, splits
from scripts import evaluate_model
from tests.support.evaluating import evaluate, loss_of, refusal
from tests.support.hub import Hub

# PEFT 0.21 uses names that transformers 5.23 has deprecated.


# ---- Flags ----


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give a model to evaluate, or --judged"),
        (["a", "--judged", "b.csv"], "give models to evaluate or --judged, not both"),
        (["a", "--batch_size", "0"], "--batch_size must be above 0"),
        (["a", "--eval_fraction", "1"], "--eval_fraction must be at least 0 and below 1"),
        (["a", "--sheet", "-1"], "--sheet must be 0 or more"),
        (["a", "--precisions", "fp4"], "invalid choice"),
        (["a", "--precision", "nf4"], "There is no --precision. Is --precisions meant?"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate_model.read_arguments(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_without_flags_it_measures_in_full_precision_and_nf4_and_writes_beside_the_model(tmp_path):
    args = evaluate_model.read_arguments([str(tmp_path)])
    assert args.precisions == [evaluate_model.full_precision(), "nf4"]
    assert args.output_dir == tmp_path / "evaluation"
    assert evaluate_model.read_arguments(["someone/model"]).output_dir == Path("trained/model/evaluation")
    # A home folder that nobody knows ended it in a traceback; that there is no such model is said later.
    assert evaluate_model.read_arguments(["~nobody-here/model"]).output_dir == Path("trained/model/evaluation")


def test_data_of_other_columns_is_read_as_in_training(chat_model, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"ask": f"hello {i}", "say": f"o {i}"}) + "\n" for i in range(9)))
    flags = (chat_model, "--dataset_name", file, "--columns", "ask=user", "say=assistant")
    args = evaluate_model.read_arguments([*map(str, flags)])
    run, (parts,) = eval_data.find_splits({}, Options(**{k: v for k, v in vars(args).items() if k != "judged"}))
    assert len(parts.train) + len(parts.eval) == 9
    assert splits.find_again(run) == [parts]


# ---- What goes wrong ----


def test_a_precision_that_is_not_to_be_had_here_is_refused_before_the_others_are_measured(run, no_weights, monkeypatch):
    # It was refused behind those named before it, and those after it were not measured.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "int4 needs a CUDA GPU" in refusal(run, "--precisions", "float32", "int4", "nf4")


def test_a_task_that_is_not_there_is_refused(run, no_weights):
    assert "There is no task file" in refusal(run, "--tasks", "none.yaml")


def test_a_folder_that_cannot_be_written_to_is_refused(run, dataset, no_weights):
    assert f"Nothing can be written to {dataset} (File exists). Give another" in refusal(run, "--output_dir", dataset)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(KeyboardInterrupt(), "Stopped. What was measured"), (torch.OutOfMemoryError(), "lower --batch_size 8")],
)
def test_what_was_measured_is_kept_whatever_ends_it(run, monkeypatch, error, sentence):
    measure = evaluation.measure

    def measure_base_only(subject, *others):
        if subject.base:
            raise error
        return measure(subject, *others)

    monkeypatch.setattr(evaluation, "measure", measure_base_only)
    assert sentence in refusal(run, "--precisions", "float32", "--sheet", "0")
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert {row["model"] for row in found["perplexity"]} == {"base"}


# ---- Judged sheets ----


def test_sheets_that_were_filled_in_are_counted(tmp_path, capsys):
    judging.write(tmp_path, [("q", "e")], {"base": ["no"], "adapter": ["yes"]}, seed=0)
    sheet = tmp_path / judging.SHEET
    sheet.write_text(re.sub(",+\r?$", ",3,3,3,5,5,5", sheet.read_text("utf-8-sig").strip()))
    evaluate_model.main(["--judged", str(sheet)])
    assert "Judges: 1. Rows judged: 1." in capsys.readouterr().out
    assert json.loads((tmp_path / "judged.json").read_text())["ties"] == 0
    assert "Judges: 1." in (tmp_path / "judged.md").read_text()


# ---- The program, and the demo ----


def test_no_question_of_the_local_task_is_in_the_data():
    questions = [json.loads(line) for line in (ROOT / "data/quillmere/questions.jsonl").read_text().splitlines()]
    data = chat_data.read(str(ROOT / "data" / "demo"))
    contents = {message["content"].lower() for row in data.train + data.eval for message in row.messages}
    assert len(questions) == 24
    for row in questions:
        assert row["question"].lower() not in contents
        assert len(set(row["choices"])) == 4


@pytest.mark.slow
def test_the_program_fetches_a_standard_task_from_the_hub_and_runs_it(run, tmp_path):
    hub, folder = Hub(), tmp_path / "hellaswag"
    folder.mkdir()
    question = {"activity_label": "Reading", "ctx_a": "A woman opens a book.", "ctx_b": "she", "label": "0"}
    question["endings"] = ["reads a page.", "eats the sea.", "is a door.", "flies under it."]
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    hub.repos["datasets/Rowan/hellaswag"] = folder
    command = [sys.executable, ROOT / "scripts" / "evaluate_model.py", run, "--tasks", "hellaswag", "--sheet", "0"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| hellaswag \| acc_norm \| 3 \| [01]\.000", done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # after the demo's own test, which has more: another worker is training it until then
def test_the_demo_is_seen_to_have_learned_what_it_was_taught(demo, tmp_path):
    flags = ("--tasks", ROOT / "data/quillmere/quillmere.yaml", "--sheet", "0", "--output_dir", tmp_path)
    found, _ = evaluate(demo / "adapter", *flags)
    assert loss_of(found, "adapter", "eval") < loss_of(found, "base", "eval") - 1
    assert loss_of(found, "merged", "eval") == pytest.approx(loss_of(found, "adapter", "eval"), abs=0.05)
    scores = {model: found["tasks"][model][0]["value"] for model in ("base", "adapter", "merged")}
    assert scores["base"] < 0.5 < 0.7 < scores["adapter"]
    (assessment,) = found["overfitting"]
    assert assessment["kind"] in {"overfitting", "no overfitting", "still falling"}
    assert "eval loss" in assessment["sentence"]
