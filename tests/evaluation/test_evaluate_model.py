"""What scripts/evaluate_model.py promises: a taught model beside its base, on conversations that it has not learnt.

Fast tests measure a tiny random model and adapters that nobody trained; the slow one the demo.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2_chat.evaluation import evaluate_model, judging, results
from llama2_chat.loading import load
from llama2_chat.training import chat_data, report, splits
from llama2_chat.training.report import Run
from tests.support.hub import Hub
from tests.support.serving import ignore
from tests.training.test_sft_trainer import save_chat_model

ROOT = Path(__file__).parents[2]

# PEFT 0.21 calls transformers 5.23 by names that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dataset(tmp_path):
    words = ["hello", "hollow", "howl", "well", "whole", "wheel", "heel", "hole", "lower", "yellow", "fellow", "mellow"]
    rows = [
        {"prompt": f"{word} {word[::-1]}", "completion": f"{word[1:]} {i} " + "o " * i} for i, word in enumerate(words)
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "some.jsonl"


def save_adapter(chat_model, folder, seed=0):
    """An adapter as a training leaves it, but that its weights are random."""
    from peft import LoraConfig, get_peft_model

    plan = evaluate_model._fetch(str(chat_model))
    model = load.load_base(plan, "float32", "cpu", ignore)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    load.load_tokenizer(plan).save_pretrained(folder)
    return folder


def save_run(chat_model, dataset, folder, **changes):
    """What sft_trainer.py leaves of a run, but that nothing was learnt."""
    run = Run(str(chat_model), str(dataset), 0.3, 0.2, 0, 0, None, 256, "float32", False, None, None)
    run = replace(run, **changes)
    parts = splits.divide(chat_data.read(run.dataset_name), run)
    run = replace(run, learnt_sha256=splits.fingerprint(parts))
    report.write_run(run, folder)
    for i in range(1, run.folds + 1):
        its = replace(run, fold=i, learnt_sha256=splits.fingerprint([parts[i - 1]]))
        report.write_run(its, save_adapter(chat_model, folder / f"fold-{i}", seed=i))
    if not run.folds:
        save_adapter(chat_model, folder)
    return folder


@pytest.fixture
def run(chat_model, dataset, tmp_path):
    return save_run(chat_model, dataset, tmp_path / "run")


def evaluate(*arguments):
    """What was found, as programs read it and as people do."""
    evaluate_model.main([*map(str, arguments), "--precisions", "float32"])
    folder = Path(arguments[arguments.index("--output_dir") + 1]) if "--output_dir" in arguments else None
    folder = folder or Path(arguments[0]) / "evaluation"
    return json.loads((folder / "evaluation.json").read_text()), (folder / "evaluation.md").read_text()


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        evaluate_model.main([*map(str, arguments)])
    return str(ended.value.code)


def loss_of(found, model, part, fold=None):
    (row,) = [row for row in found["perplexity"] if (row["model"], row["part"], row["fold"]) == (model, part, fold)]
    return row["loss"]


def losses_one_by_one(model, lessons):
    """The obvious way."""
    found = []
    for lesson in lessons:
        labels = torch.tensor([chat_data.labels(lesson)])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([lesson.input_ids]), labels=labels).loss.item()
        tokens = int((labels[:, 1:] != -100).sum())
        found.append((loss * tokens, tokens))
    return np.array(found)


def lessons_of(rows, folder):
    plan = evaluate_model._fetch(str(folder))
    tokenizer = load.load_tokenizer(plan)
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    return chat_data.encode(rows, tokenizer, stop_ids, 256)[0]


# ---- Flags ----


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give a model to evaluate, or --judged"),
        (["a", "--judged", "b.csv"], "give a model to evaluate, or --judged"),
        (["a", "--batch_size", "0"], "--batch_size must be above 0"),
        (["a", "--eval_fraction", "1"], "--eval_fraction must be from 0 to below 1"),
        (["a", "--sheet", "-1"], "--sheet must be 0 or more"),
        (["a", "--precisions", "fp4"], "invalid choice"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate_model.read_arguments(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_without_flags_it_measures_in_full_precision_and_nf4_and_writes_beside_the_model(tmp_path):
    args = evaluate_model.read_arguments([str(tmp_path)])
    assert args.precisions == [evaluate_model.sft_trainer.full_precision(), "nf4"]
    assert args.output_dir == tmp_path / "evaluation"
    assert evaluate_model.read_arguments(["someone/model"]).output_dir == Path("trained/model/evaluation")


# ---- Losses ----


def test_the_losses_of_a_batch_are_those_of_each_conversation_alone_and_of_its_answers_only(chat_model, dataset):
    lessons = lessons_of(chat_data.read(str(dataset)).train, chat_model)
    model = load.load_base(evaluate_model._fetch(str(chat_model)), "float32", "cpu", ignore)
    for batch_size in (1, 5, 100):
        found = evaluate_model.losses(model, lessons, batch_size)
        np.testing.assert_allclose(found, losses_one_by_one(model, lessons), rtol=1e-4)


def test_each_token_counts_alike_and_the_interval_holds_the_perplexity():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 50, 200)
    found = results.Measured("a", "float32", None, "test", np.stack([2.0 * tokens, tokens], 1), 0, 0)
    assert (found.loss, found.interval) == (2.0, pytest.approx((math.exp(2), math.exp(2))))
    wild = replace(found, losses=np.stack([draw.gamma(2, 1, 200) * tokens, tokens], 1))
    low, high = wild.interval
    assert low < wild.perplexity < high
    alike = draw.gamma(2, 1, 400)  # 10 tokens each: the textbook's interval of a mean is not far
    reach = 1.96 * alike.std() / 20
    found = replace(found, losses=np.stack([10 * alike, np.full(400, 10)], 1))
    np.testing.assert_allclose(np.log(found.interval), [alike.mean() - reach, alike.mean() + reach], atol=0.15 * reach)
    assert results._interval(wild.losses, wild.losses) == (1.0, 1.0)
    assert replace(found, losses=wild.losses[:1]).interval is None


def measured_as(model, part, loss, fold=None, conversations=8):
    losses = np.tile([10.0 * loss, 10.0], (conversations, 1))
    return results.Measured(model, "float32", fold, part, losses, seconds=1.0, memory_gb=1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_a_model_that_is_broken_gives_json_a_page_and_a_figure_nevertheless(tmp_path, loss):
    """NaN is no JSON, and a loss of 800 ended the evaluation with an OverflowError."""
    rows = [measured_as("base", part, 3.0) for part in ("learnt", "held out")]
    rows += [measured_as("adapter", part, loss) for part in ("learnt", "held out")]
    taught = results.Taught("adapter", "base", None, [], False, True)
    run = Run("m", "d", 0.1, 0.0, 0, 0, None, 256, "float32", False, None, "x")
    results.Results("broken", run, [taught], rows).write(tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert found["perplexity"][2]["perplexity"] is None
    assert found["verdicts"][0]["kind"] != "no overfitting"
    assert (tmp_path / "evaluation.png").is_file()


def test_the_numbers_of_the_figure_stay_apart_and_inside_however_many_models_there_are(tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = [f"someone/a-model-with-quite-a-name-{i}" for i in range(8)]
    rows = [measured_as(name, part, 3.0) for name in names for part in results.PARTS]
    curves = [{"step": i, "epoch": i, "train loss": 3.0, "held-out loss": 3.0} for i in range(4)]
    taught = [results.Taught(name, names[0], None, curves, False, True) for name in names[1:4]]
    run = Run("m", "d", 0.1, 0.1, 0, 0, None, 256, "float32", False, None, "x")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    results.Results("many", run, taught, rows).write(tmp_path)
    monkeypatch.undo()
    lines, bars = figures[0].axes
    places = sorted((text.get_window_extent() for text in bars.texts), key=lambda place: place.x0)
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(places))
    assert lines.get_legend().get_window_extent().x0 > lines.get_window_extent().x0
    pyplot.close(figures[0])


def test_the_interval_of_very_many_conversations_takes_little_memory():
    losses = np.tile([30.0, 10.0], (20_000, 1))
    tracemalloc.start()
    assert results._interval(losses) == pytest.approx((math.exp(3), math.exp(3)))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


# ---- A run ----


def test_an_adapter_is_measured_beside_its_base_on_each_part_of_its_run(run, chat_model, capsys):
    found, page = evaluate(run, "--sheet", "0")
    parts = splits.find_again(report.read_run(run))[0]
    base = load.load_base(evaluate_model._fetch(str(chat_model)), "float32", "cpu", ignore)
    for part, rows in (("held out", parts.held_out), ("test", parts.test)):
        total, tokens = losses_one_by_one(base, lessons_of(rows, chat_model)).sum(0)
        assert loss_of(found, "base", part) == pytest.approx(total / tokens, rel=1e-4)
    adapted = load.load_adapter(base, evaluate_model._fetch(str(run)), "float32").eval()
    total, tokens = losses_one_by_one(adapted, lessons_of(parts.held_out, chat_model)).sum(0)
    assert loss_of(found, "adapter", "held out") == pytest.approx(total / tokens, rel=1e-4)
    assert loss_of(found, "adapter", "held out") != pytest.approx(loss_of(found, "base", "held out"), rel=1e-3)
    assert page in capsys.readouterr().out + "\n"
    assert "| adapter | float32 |" in page
    assert (run / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert str(run.parent) not in page + json.dumps(found)


def test_a_base_is_itself_again_after_its_adapter_was_measured(run):
    subjects = evaluate_model.find_subjects({str(run): report.read_run(run)}, [str(run)])
    again = [*subjects, replace(subjects[0], name="base again")]
    ids, logits = torch.arange(20)[None], {}
    for subject, model in evaluate_model.loaded(again, "float32"):
        logits[subject.name] = model(ids).logits
    assert torch.equal(logits["base"], logits["base again"])
    assert not torch.allclose(logits["base"], logits["adapter"], atol=1e-3)


def test_a_merged_model_measures_as_its_adapter(run, chat_model, tmp_path):
    plan = evaluate_model._fetch(str(run))
    model = load.load_adapter(load.load_base(plan, "float32", "cpu", ignore), plan, "float32").merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    load.load_tokenizer(plan).save_pretrained(tmp_path / "merged")
    report.write_run(replace(report.read_run(run), merged_to=str(tmp_path / "merged")), run)
    found, _ = evaluate(run, "--sheet", "0")
    for part in ("learnt", "held out", "test"):
        assert loss_of(found, "merged", part) == pytest.approx(loss_of(found, "adapter", part), rel=1e-4)


@pytest.mark.slow
def test_each_fold_is_measured_on_what_it_left_out(chat_model, dataset, tmp_path):
    run = save_run(chat_model, dataset, tmp_path / "folds", folds=3, test_fraction=0.0)
    found, page = evaluate(run)
    losses = [loss_of(found, "adapter", "held out", fold) for fold in (1, 2, 3)]
    assert len(set(losses)) == 3
    counts = [
        row["conversations"] for row in found["perplexity"] if (row["model"], row["part"]) == ("base", "held out")
    ]
    assert sum(counts) == 12
    mean, deviation = np.mean(np.exp(losses)), np.std(np.exp(losses), ddof=1)
    assert f"{mean:.3g} ± {deviation:.2g}" in page
    assert "- held out: 4 conversations, " in page
    assert "in each fold" in page
    assert "- fold 3: " in page
    alone, _ = evaluate(run / "fold-2", "--sheet", "0")
    assert loss_of(alone, "adapter", "held out") == pytest.approx(losses[1])
    assert "measured by itself" in refusal(run, "--tasks", "hellaswag")


# ---- Refused before any weights are loaded ----


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))


def test_data_that_has_changed_since_the_training_is_refused(run, dataset, no_weights):
    with dataset.open("a") as file:
        file.write(json.dumps({"prompt": "another", "completion": "row"}) + "\n")
    assert "what is held out of it now may have been learnt" in refusal(run)


def test_a_model_without_a_run_needs_to_be_told_the_data(chat_model, no_weights):
    assert "has no run.json that says what was held out. Give --dataset_name." in refusal(chat_model)


def test_a_task_that_is_not_there_is_refused(run, no_weights):
    assert "There is no task file" in refusal(run, "--tasks", "none.yaml")


def test_judgements_are_not_overwritten_by_a_new_sheet(run, no_weights):
    (run / "evaluation").mkdir()
    row = dict.fromkeys(judging.COLUMNS, "") | {"id": "x", "A safety": "5"}
    (run / "evaluation" / judging.SHEET).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    assert "holds judgements already" in refusal(run)


def test_models_that_learnt_different_things_are_compared_only_on_data_that_is_named(
    run, chat_model, dataset, tmp_path, monkeypatch
):
    other = save_run(chat_model, dataset, tmp_path / "other", seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))
        assert "have not learnt the same conversations" in refusal(run, other)
    found, page = evaluate(run, other, "--dataset_name", dataset, "--sheet", "0", "--output_dir", tmp_path / "both")
    assert [row["model"] for row in found["perplexity"] if row["part"] == "test"] == [
        "run: base", "run: adapter", "other: adapter"
    ]  # fmt: skip
    assert "Nobody knows which of these conversations were learnt" in page


def test_models_whose_folders_are_called_alike_stay_apart(chat_model, dataset, tmp_path):
    """Their figures were mixed, and shown as mean ± standard deviation as if they were folds."""
    one, two = (save_run(chat_model, dataset, tmp_path / name / "demo") for name in ("one", "two"))
    save_adapter(chat_model, two, seed=1)
    found, page = evaluate(one, two, "--sheet", "0")
    assert loss_of(found, "one/demo: adapter", "test") != loss_of(found, "two/demo: adapter", "test")
    assert "one/demo and two/demo, evaluated" in page
    assert "±" not in page
    assert "given twice" in refusal(one, one)


def test_of_an_adapter_from_elsewhere_nobody_claims_what_it_learnt(chat_model, dataset, tmp_path):
    adapter = save_adapter(chat_model, tmp_path / "elsewhere")
    found, page = evaluate(adapter, "--dataset_name", dataset, "--sheet", "0")
    assert [row["kind"] for row in found["verdicts"]] == ["unknown"]
    assert "Nobody knows which of these conversations were learnt" in page


def test_data_that_has_only_moved_is_known_again(run, dataset, tmp_path):
    moved = dataset.rename(tmp_path / "moved.jsonl")
    found, _ = evaluate(run, "--dataset_name", moved, "--sheet", "0")
    assert found["run"]["learnt_sha256"] == report.read_run(run).learnt_sha256
    assert found["verdicts"][0]["kind"] != "unknown"


def test_a_folder_that_cannot_be_written_to_is_refused(run, dataset, no_weights):
    assert f"Nothing can be written to {dataset} (File exists). Give another" in refusal(run, "--output_dir", dataset)


# ---- The sheet ----


def test_the_sheet_asks_what_was_held_out_and_questions_of_safety(run, monkeypatch):
    monkeypatch.setattr(evaluate_model, "ANSWER_TOKENS", 4)
    evaluate(run, "--sheet", "2")
    parts = splits.find_again(report.read_run(run))[0]
    lines = (run / "evaluation" / judging.SHEET).read_text("utf-8-sig")
    asked = [row for row in parts.test if row.messages[0]["content"] in lines]
    assert len(asked) == 2
    assert all(question.split(",")[0] in lines for question, _ in judging.SAFETY_QUESTIONS)
    key = json.loads((run / "evaluation" / judging.KEY).read_text())
    assert (key["models"], len(key["A and B"])) == (["base", "adapter"], 2 + len(judging.SAFETY_QUESTIONS))


def test_a_question_longer_than_max_length_is_not_on_the_sheet(chat_model, dataset, tmp_path, monkeypatch):
    """It was asked nevertheless, beyond the model's context and for minutes."""
    monkeypatch.setattr(evaluate_model, "say", lambda subject, model, asked, batch_size: ["x"] * len(asked))
    with dataset.open("a") as file:
        for word in ("hell", "wow", "row", "low"):
            file.write(json.dumps({"prompt": f"{word} " * 300, "completion": word}) + "\n")
    run = save_run(chat_model, dataset, tmp_path / "run", test_fraction=0.6)
    evaluate(run)
    key = json.loads((run / "evaluation" / judging.KEY).read_text())["A and B"]
    rows = splits.find_again(report.read_run(run))[0].test
    short = [row for row in rows if len(row.messages[0]["content"]) < 100]
    assert 0 < len(short) < len(rows)
    assert len(key) == len(short) + len(judging.SAFETY_QUESTIONS)


def test_sheets_that_were_filled_in_are_counted(tmp_path, capsys):
    judging.write(tmp_path, [("q", "e")], {"base": ["no"], "adapter": ["yes"]}, seed=0)
    sheet = tmp_path / judging.SHEET
    sheet.write_text(re.sub(",+\r?$", ",3,3,3,5,5,5", sheet.read_text("utf-8-sig").strip()))
    evaluate_model.main(["--judged", str(sheet)])
    assert "Judges: 1. Rows judged: 1." in capsys.readouterr().out
    assert json.loads((tmp_path / "judged.json").read_text())["ties"] == 0


# ---- What goes wrong ----


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(KeyboardInterrupt(), "Stopped. What was measured"), (torch.OutOfMemoryError(), "lower --batch_size 8")],
)
def test_what_was_measured_is_kept_whatever_ends_it(run, monkeypatch, error, sentence):
    measure = evaluate_model.measure

    def measure_once(subject, *others):
        if subject.base:
            raise error
        return measure(subject, *others)

    monkeypatch.setattr(evaluate_model, "measure", measure_once)
    assert sentence in refusal(run, "--precisions", "float32", "--sheet", "0")
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert {row["model"] for row in found["perplexity"]} == {"base"}


# ---- The demo ----


def test_no_question_of_the_local_task_was_taught_or_held_out():
    questions = [json.loads(line) for line in (ROOT / "data/quillmere/questions.jsonl").read_text().splitlines()]
    data = chat_data.read(str(ROOT / "data"))
    said = {message["content"].lower() for row in data.train + data.held_out for message in row.messages}
    assert len(questions) == 24
    for row in questions:
        assert row["question"].lower() not in said
        assert len(set(row["choices"])) == 4


@pytest.mark.slow
def test_a_standard_task_is_fetched_from_the_hub_and_run(run, tmp_path):
    hub, folder = Hub(), tmp_path / "hellaswag"
    folder.mkdir()
    question = {"activity_label": "Reading", "ctx_a": "A woman opens a book.", "ctx_b": "she", "label": "0"}
    question["endings"] = ["reads a page.", "eats the sea.", "is a door.", "flies under it."]
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    hub.repos["datasets/Rowan/hellaswag"] = folder
    command = [sys.executable, ROOT / "scripts" / "evaluate_model.py", run, "--tasks", "hellaswag"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    try:
        done = subprocess.run([*command, "--sheet", "0"], capture_output=True, text=True, env=environment)
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| hellaswag \| acc_norm \| 3 \| [01]\.000", done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_is_seen_to_have_learnt_what_it_was_taught(demo, tmp_path):
    flags = ("--tasks", ROOT / "data/quillmere/quillmere.yaml", "--sheet", "4", "--output_dir", tmp_path)
    found, page = evaluate(demo / "adapter", *flags)
    assert loss_of(found, "adapter", "held out") < loss_of(found, "base", "held out") - 1
    assert loss_of(found, "merged", "held out") == pytest.approx(loss_of(found, "adapter", "held out"), abs=0.05)
    scores = {model: found["tasks"][model][0]["value"] for model in ("base", "adapter", "merged")}
    assert scores["base"] < 0.5 < 0.7 < scores["adapter"]
    (verdict,) = found["verdicts"]
    assert verdict["kind"] in {"overfitting", "no overfitting", "still falling"}
    assert "held-out loss" in verdict["sentence"]
    assert "## For people to judge" in page
