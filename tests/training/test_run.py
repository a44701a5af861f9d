"""From the flags to what is kept: refusals before weights are loaded, and trainings of a tiny random model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.evaluation import eval_data
from llama2_chat.evaluation.subjects import find_runs, find_subjects, load_in_turn
from llama2_chat.loading import load
from llama2_chat.training import splits
from llama2_chat.training.curves import read_curves
from llama2_chat.training.losses import conversation_losses
from llama2_chat.training.options import Options
from llama2_chat.training.run import new_run
from llama2_chat.training.run_json import read_run
from tests.support.small_tokenizer import CHATML
from tests.support.training import arguments, train_here

# TRL 1.16 and PEFT 0.21 use names that transformers 5.23 has deprecated.


def test_a_run_names_its_data_so_that_it_is_found_from_the_same_directory(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(dataset.parent.parent)
    options = Options("a", ["b"], tmp_path, 1e-4)
    for given, kept in (
        (str(dataset), f"{dataset.parent.name}/{dataset.name}"),
        ("someone/data", "someone/data"),
        (str(ROOT / "data" / "demo"), str(ROOT / "data" / "demo")),
    ):
        assert new_run(replace(options, dataset_names=[given, "other/data"])).dataset_names == [kept, "other/data"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max_length", "5"), "Nothing is left to train on"),
        (("--max_length", "5", "--folds", "2"), "The eval split of fold 1 does not fit into 5 tokens"),
        (("--folds", "25"), "--folds 25 needs as many conversations"),
        (("--eval_fraction", "0", "--early_stopping"), "--early_stopping needs an eval split"),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused_before_weights_are_loaded(
    chat_model, dataset, tmp_path, monkeypatch, flags, sentence
):
    monkeypatch.delattr(load, "load_base")
    with pytest.raises(ChatError, match=sentence):
        train_here(*arguments(chat_model, dataset, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_preview_shows_what_would_be_learned_and_neither_loads_nor_writes(
    chat_model, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.delattr(load, "load_base")
    train_here(*arguments(chat_model, dataset, tmp_path / "run", "--preview", "4"))
    said = capsys.readouterr().out
    assert "train: 22 conversations" in said
    assert said.count("<|im_start|>assistant\n⟦hell ") == 4
    assert not (tmp_path / "run").exists()


def test_texts_and_conversations_are_trained_on_together_each_as_often_as_it_weighs(
    chat_model, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.delattr(load, "load_base")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "o {i}"}}\n' for i in range(4)))
    flags = ("--dataset_weights", "1", "2", "--plain_text", "--eval_fraction", "0", "--preview", "40")
    train_here(*arguments(chat_model, dataset, tmp_path / "run", *flags), "--dataset_name", str(dataset), str(texts))
    said = capsys.readouterr().out
    assert "train: 32 conversations" in said
    assert said.count("⟦hell ") == 24
    assert [said.count(f"⟦o {i}<|im_end|>⟧") for i in range(4)] == [2, 2, 2, 2]


def test_a_stream_is_read_as_far_as_the_steps_go(chat_model, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(load, "load_base")
    flags = ("--streaming", "--max_steps", "3", "--batch_size", "2", "--gradient_accumulation_steps", "2", "--preview")
    train_here(*arguments(chat_model, dataset, tmp_path / "run", *flags, "--eval_fraction", "0.25"))
    assert "train: 12 conversations" in capsys.readouterr().out


def test_a_layer_that_the_model_lacks_or_that_cannot_learn_is_refused(chat_model, dataset, tmp_path):
    for name, sentence in (("v_porj", "no layer called v_porj"), ("lm_head", "the output head, lm_head, cannot have")):
        with pytest.raises(ChatError, match=sentence):
            train_here(*arguments(chat_model, dataset, tmp_path, "--use_peft", "--target_modules", "q_proj", name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--use_peft",),
        ("--use_peft", "--use_dora", "--use_rslora"),
        ("--use_peft", "--load_in_4bit"),
        ("--use_peft", "--load_in_8bit"),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes: inputs will be cast from float32 to float16
def test_a_model_is_trained_with_all_its_weights_and_with_an_adapter_in_16_8_and_4_bits(
    chat_model, dataset, tmp_path, flags
):
    train_here(*arguments(chat_model, dataset, tmp_path, *flags, "--learning_rate", "1e-2", "--num_train_epochs", "5"))
    losses = [row["eval loss"] for row in read_curves(tmp_path) if "eval loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    assert (tmp_path / ("adapter_model.safetensors" if flags else "model.safetensors")).is_file()
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"^\| hello \d+ \| eval \| hell", page, re.M)
    assert str(tmp_path.parent) not in page


@pytest.mark.slow
def test_an_adapter_is_trained_further_with_the_rank_and_the_whole_layers_that_it_has(
    chat_model, dataset, tmp_path, capsys
):
    flags = ("--use_peft", "--learning_rate", "1e-2", "--num_train_epochs", "2")
    first, second, merged = tmp_path / "first", tmp_path / "second", tmp_path / "merged"
    layers = ("--lora_r", "4", "--target_modules", "q_proj", "--modules_to_save", "lm_head", "embed_tokens")
    train_here(*arguments(chat_model, dataset, first, *flags, *layers))
    began, ended = eval_losses(first)
    assert ended < began
    with pytest.raises(ChatError, match="is an adapter: add --use_peft"):
        train_here(*arguments(first, dataset, tmp_path / "none"))
    train_here(*arguments(first, dataset, second, *flags, "--merge_to", merged))
    again, better = eval_losses(second)
    assert again == pytest.approx(ended, abs=0.02)  # the best of the first is kept in 16 bits
    assert better < again
    said = capsys.readouterr().out
    assert "is an adapter, and is trained further" in said
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    for name in ("r", "target_modules", "base_model_name_or_path"):
        assert configs[0][name] == configs[1][name]
    weights = load_file(second / "adapter_model.safetensors")
    assert sum("lm_head" in name or "embed_tokens" in name for name in weights) == 2
    assert "LoRA of rank 4" in (second / "README.md").read_text()
    assert "and all of embed_tokens lm_head" in (second / "README.md").read_text()
    assert float(re.search(r"differ from the adapter's by (\S+) at most in float32", said)[1]) < 1e-3


def eval_losses(folder):
    losses = [row["eval loss"] for row in read_curves(folder) if "eval loss" in row]
    return losses[0], losses[-1]


@pytest.mark.slow
def test_a_base_model_learns_plain_texts_and_stays_a_base_model(chat_model, tmp_path):
    base = shutil.copytree(chat_model, tmp_path / "base", ignore=shutil.ignore_patterns("*.jinja"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "{"hello hell o " * 3}{i}"}}\n' for i in range(16)))
    train_here(*arguments(base, texts, tmp_path / "run", "--plain_text", "--learning_rate", "1e-2"))
    losses = [row["eval loss"] for row in read_curves(tmp_path / "run") if "eval loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
    assert "| question |" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_stops_early_when_the_eval_loss_rises_and_does_not_begin_to_count_anew(
    chat_model, dataset, tmp_path, capsys
):
    flags = ("--use_peft", "--learning_rate", "0.3", "--num_train_epochs", "40", "--early_stopping", "2")
    command = arguments(chat_model, dataset, tmp_path, *flags)
    train_here(*command)
    stopped = read_curves(tmp_path)
    assert stopped[-1]["epoch"] < 40
    train_here(*command, "--resume")
    assert "is done." in capsys.readouterr().out
    assert read_curves(tmp_path) == stopped
    Path(tmp_path, "curves.csv").unlink()  # as if it had been killed after its last checkpoint
    train_here(*command, "--resume")
    assert read_curves(tmp_path)[-1]["epoch"] == stopped[-1]["epoch"] + 2  # one measurement more


@pytest.mark.slow
def test_a_run_that_is_done_goes_on_for_longer_with_another_learning_rate_and_says_so(chat_model, dataset, tmp_path):
    flags = ("--use_peft", "--batch_size", "8")
    train_here(*arguments(chat_model, dataset, tmp_path, *flags, "--num_train_epochs", "1"))
    done = read_curves(tmp_path)
    more = arguments(chat_model, dataset, tmp_path, *flags, "--num_train_epochs", "2", "--learning_rate", "5e-2")
    with pytest.raises(ChatError, match=r"learning_rate was 0.0002 and is now 0.05; num_train_epochs was 1.0 and"):
        train_here(*more, "--resume")
    train_here(*more, "--resume_with_changes")
    after = read_curves(tmp_path)
    step = int(done[-1]["step"])
    assert [row for row in after if row["step"] < step] == done[:-1]
    rates = {row["step"]: row["learning rate"] for row in after[1:]}
    assert max(rates[i] for i in rates if i <= step) <= 2e-4
    assert min(rates[i] for i in rates if i > step) > 1e-3
    assert f"after step {step} learning_rate was 0.0002 and is now 0.05" in (tmp_path / "README.md").read_text()
    assert len(read_run(tmp_path).changes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--use_peft",), ("--use_peft", "--load_in_4bit")])
def test_the_eval_loss_of_a_training_is_what_an_evaluation_of_it_measures(chat_model, dataset, tmp_path, flags):
    flags = (*flags, "--eval_fraction", "0.4", "--learning_rate", "1e-2", "--num_train_epochs", "1")
    train_here(*arguments(chat_model, dataset, tmp_path, *flags))
    (subject,) = [one for one in find_subjects([str(tmp_path)], find_runs([str(tmp_path)])) if one.base]
    evals = eval_data.encode(subject, splits.find_again(read_run(tmp_path)), read_run(tmp_path))["eval"]
    loaded = load_in_turn([subject], read_run(tmp_path).precision)
    _, model = next(loaded)
    last = read_curves(tmp_path)[-1]["eval loss"]
    for batch_size in (1, 8):
        total, tokens = conversation_losses(model, evals, batch_size).sum(0)
        # On a CPU, training and evaluation multiply NF4 in different kernels.
        assert total / tokens == pytest.approx(last, abs=3e-4 if "--load_in_4bit" in flags else 1e-4)
