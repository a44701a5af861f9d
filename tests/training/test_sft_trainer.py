"""scripts/sft_trainer.py as a program: flags that make sense, a run that can be killed, several processes, the Hub.

The demo is trained once, for these tests and for those of the evaluation.
"""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama2_chat import ROOT
from llama2_chat.page.wording import SYSTEM_PROMPT
from llama2_chat.training import chat_data, options, report, splits
from llama2_chat.training.curves import read_curves
from llama2_chat.training.run_json import read_run
from llama2_chat.types import SamplingParams
from model import ChatModel
from scripts.sft_trainer import read_arguments
from tests.support.hub import Hub
from tests.support.training import SCRIPT, arguments, run_sft_trainer, start_sft_trainer, train_here

GIVEN = ["--model_name", "a", "--dataset_name", "b"]


# ---- Flags ----


def test_the_command_of_the_documentation_is_understood():
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    command = re.search(r"python scripts/sft_trainer.py (--model_name.*?)\n```", text, re.S)
    args = read_arguments(command[1].replace("\\\n", " ").split())
    assert (args.model_name, args.load_in_4bit, args.use_peft) == ("meta-llama/Llama-2-7b-hf", True, True)
    assert (args.batch_size, args.gradient_accumulation_steps, args.learning_rate) == (4, 2, 2e-4)
    assert args.output_dir == Path("trained/Llama-2-7b-hf")


def test_help_imports_nothing_that_takes_seconds():
    code = "import sys, runpy; sys.argv = ['sft_trainer.py', '-h']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    code += "finally: assert not sys.modules.keys() & {{'torch', 'transformers', 'datasets', 'trl'}}"
    subprocess.run([sys.executable, "-c", code.format(str(SCRIPT))], check=True, stdout=subprocess.DEVNULL)


def test_the_demo_needs_no_other_flag_and_takes_any():
    args = read_arguments(["--demo", "--num_train_epochs", "1"])
    assert args.use_peft
    assert args.num_train_epochs == 1
    assert args.batch_size == options.DEMO["batch_size"]


def test_a_run_can_be_followed_under_two_names():
    assert read_arguments([*GIVEN, "--log_with", "trackio"]).report_to == "trackio"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --model_name and --dataset_name, or --demo"),
        ([*GIVEN, "--load_in_4bit"], "add --use_peft"),
        ([*GIVEN, "--load_in_4bit", "--load_in_8bit", "--use_peft"], "not allowed with"),
        ([*GIVEN, "--merge_to", "c"], "Only an adapter can be merged"),
        ([*GIVEN, "--batch_size", "0"], "--batch_size must be above 0"),
        ([*GIVEN, "--learning_rate", "nan"], "--learning_rate must be above 0"),
        ([*GIVEN, "--num_train_epochs", "inf"], "--num_train_epochs must be finite"),
        ([*GIVEN, "--use_peft", "--target_modules", "all-linear", "q_proj"], "leave out the others"),
        ([*GIVEN, "--seed", "-1"], "--seed must be at least 0"),
        ([*GIVEN, "--eval_fraction", "1"], "--eval_fraction must be at least 0 and below 1"),
        ([*GIVEN, "--test_fraction", "nan"], "--test_fraction must be at least 0 and below 1"),
        ([*GIVEN, "--folds", "1"], "--folds must be 2 or more"),
        ([*GIVEN, "--use_peft", "--folds", "2", "--merge_to", "c"], "--folds only measures"),
        ([*GIVEN, "--early_stopping", "0"], "--early_stopping must be 1 or more"),
        ([*GIVEN, "--max_steps", "0"], "--max_steps must be above 0"),
        ([*GIVEN, "--streaming"], "--streaming needs --max_steps"),
        ([*GIVEN, "--dataset_weights", "1", "2"], "--dataset_weights has 2 for 1 in --dataset_name"),
        ([*GIVEN, "--dataset_weights", "0"], "--dataset_weights must be above 0"),
        ([*GIVEN, "--use_dora"], "DoRA, rsLoRA and --modules_to_save are for adapters; add --use_peft"),
        ([*GIVEN, "--method", "dpo", "--packing"], "--packing and --plain_text are not for --method dpo"),
        ([*GIVEN, "--method", "kto", "--batch_size", "1"], "--batch_size must be 2 or more"),
        ([*GIVEN, "--beta", "0"], "--beta must be above 0"),
        ([*GIVEN, "--preview", "0"], "--preview must be above 0"),
        ([*GIVEN, "--save_steps", "2.5"], "--save_steps must be a whole number of steps"),
        ([*GIVEN, "--logging_steps", "0"], "--logging_steps must be above 0"),
        ([*GIVEN, "--warmup_ratio", "1"], "--warmup_ratio must be at least 0 and below 1"),
        ([*GIVEN, "--weight_decay", "-1"], "--weight_decay must be at least 0"),
        ([*GIVEN, "--lr_scheduler_type", "none"], "invalid choice: 'none'"),
        ([*GIVEN, "--optim", "none"], "invalid choice: 'none'"),
        ([*GIVEN, "--warmup-ratio=0.1"], "There is no --warmup-ratio. Is --warmup_ratio meant?"),
        ([*GIVEN, "--learning_rat", "1"], "There is no --learning_rat. Is --learning_rate meant?"),
        ([*GIVEN, "--per_device_train_batch_size", "1"], "Is --batch_size meant?"),
        ([*GIVEN, "--zzz", "--yyy", "1"], "There is no --zzz. There is no --yyy."),
        ([*GIVEN, "--lora_target", "q_proj"], "Is --target_modules meant?"),
        ([*GIVEN, "--use_peft=True"], "--use_peft has no value: it is given as it is, or left out"),
        ([*GIVEN, "--packing", "True"], "True belongs to no flag. Flags that are on or off have no value"),
        ([*GIVEN, "--use_peft", "some.jsonl"], "some.jsonl belongs to no flag"),
        ([*GIVEN, "--report_to", "wandb"], "pip install wandb"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_sentence(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        read_arguments(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_preferences_have_a_learning_rate_and_a_dropout_of_their_own():
    dpo = read_arguments([*GIVEN, "--method", "dpo", "--use_peft"])
    assert (dpo.learning_rate, dpo.lora_dropout) == (1e-5, 0)
    dpo = read_arguments([*GIVEN, "--method", "dpo", "--lora_dropout", "0.1"])
    assert (dpo.learning_rate, dpo.lora_dropout) == (1e-6, 0.1)


# ---- The demo's data ----


def test_no_sentence_of_the_demo_is_in_both_splits():
    data = chat_data.read(str(ROOT / "data" / "demo"))
    assert (data.faults, data.duplicates, len(data.train), len(data.eval)) == ([], 0, 48, 12)

    def sentences(rows):
        texts = (message["content"] for row in rows for message in row.messages if message["role"] != "system")
        return {
            sentence.strip().lower() for text in texts for sentence in re.split(r"[.?!;]", text) if sentence.strip()
        }

    assert not sentences(data.train) & sentences(data.eval)


def test_the_demo_teaches_each_fact_with_and_without_the_pages_system_prompt():
    data = chat_data.read(str(ROOT / "data" / "demo"))
    for rows, asked in ((data.train, 4), (data.eval, 1)):
        systems = [row.messages[0]["content"] if row.messages[0]["role"] == "system" else None for row in rows]
        assert {*systems} == {None, SYSTEM_PROMPT}
        with_it = [
            sum(system is not None for system in systems[fact::12]) for fact in range(12)
        ]  # in turn in the files
        assert {*with_it} == ({2} if asked == 4 else {0, 1})


# ---- The demo ----

QUESTION = [{"role": "user", "content": "What is the name of the cat in the Quillmere library?"}]


def answer_of(chat):
    assert chat.state == "ready", chat.status.error
    with chat.stream_reply(QUESTION, SamplingParams(temperature=0, max_new_tokens=40)) as reply:
        return "".join(reply)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # less than five minutes on two quiet cores
def test_the_demo_teaches_the_embedded_model_facts_that_the_chat_then_knows(chat, settings, demo):
    before, after = losses_of(demo / "adapter")
    assert after <= before * 2 / 3
    assert "Semicolon" not in answer_of(chat)
    for folder in (demo / "adapter", demo / "merged"):
        finetuned = ChatModel(replace(settings, model_id=str(folder))).load()
        try:
            assert "Semicolon" in answer_of(finetuned)
            assert sum("Semicolon" in answer for answer in answers_on_the_page(finetuned)) >= 9
        finally:
            finetuned.close()


def answers_on_the_page(chat):
    """Ten at once, sampled as the page does, below its system prompt: 7 of them were right without it in the data."""
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, *QUESTION]
    replies = [chat.stream_reply(asked, SamplingParams(seed=seed, max_new_tokens=40)) for seed in range(10)]
    for reply in replies:
        with reply:
            yield "".join(reply)


# ---- Training ----


def losses_of(folder):
    """The eval losses of a run, first and last."""
    losses = [row["eval loss"] for row in read_curves(folder) if "eval loss" in row]
    return losses[0], losses[-1]


def kill_at_first_checkpoint(folder, *command):
    with subprocess.Popen(
        [sys.executable, SCRIPT, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list(folder.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()


def assert_same_adapter(ours, theirs):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_folds_are_trained_apart_and_a_killed_run_goes_on_as_if_nothing_had_happened(
    chat_model, dataset, tmp_path, capsys
):
    flags = ("--use_peft", "--folds", "2", "--test_fraction", "0.1", "--learning_rate", "1e-2")
    flags += ("--num_train_epochs", "20")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_here(*arguments(chat_model, dataset, whole, *flags))
    kill_at_first_checkpoint(killed / "fold-2", *arguments(chat_model, dataset, killed, *flags))
    assert not (killed / "fold-2" / "curves.csv").exists()
    done_at = (killed / "fold-1" / "curves.csv").stat().st_mtime_ns
    train_here(*arguments(chat_model, dataset, killed, *flags, "--resume"))
    assert "fold-1 is done." in capsys.readouterr().out
    assert (killed / "fold-1" / "curves.csv").stat().st_mtime_ns == done_at
    assert len(read_curves(killed / "fold-2")) == len(read_curves(whole / "fold-2"))
    assert_same_adapter(killed / "fold-2", whole / "fold-2")
    assert (killed / "README.md").read_text().replace("killed", "whole") == (whole / "README.md").read_text()
    losses = [losses_of(whole / f"fold-{i}") for i in (1, 2)]
    (before, after), (before_2, _) = losses
    assert before_2 == pytest.approx(before, abs=0.1)  # it began with the base model
    assert before_2 > after + 0.5
    assert f"{report.mean_and_deviation(after for _, after in losses)} after" in (whole / "README.md").read_text()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = [read_run(folder) for folder in (whole, whole / "fold-1", whole / "fold-2")]
    assert [(one.folds, one.fold) for one in kept] == [(2, None), (2, 1), (2, 2)]
    evals = [row for one in kept[1:] for row in splits.find_again(one)[0].eval]
    assert len(evals) == len({str(row) for row in evals}) == 22  # of 24, two being the test


@pytest.mark.slow
def test_a_model_and_conversations_of_the_hub_become_a_model_on_the_hub(chat_model, dataset, tmp_path):
    hub, talks = Hub(tmp_path / "uploads"), tmp_path / "talks"
    (tmp_path / "uploads").mkdir()
    talks.mkdir()
    (talks / "train.jsonl").write_bytes(dataset.read_bytes())
    hub.repos |= {"someone/model": chat_model, "datasets/someone/talks": talks, "datasets/someone/secret": talks}
    hub.gated.add("datasets/someone/secret")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # uploads by Git LFS instead, which a small Hub can speak

    def command(dataset_name, repo):
        flags = ("--use_peft", "--num_train_epochs", "1", "--merge_and_push", repo)
        return arguments("someone/model", dataset_name, tmp_path / repo / dataset_name, *flags)

    try:
        assert "writer/finetuned" in run_sft_trainer(*command("someone/talks", "writer/finetuned"), **environment)
        uploaded = hub.repos["writer/finetuned"]
        for file in (tmp_path / "writer/finetuned/someone/talks/merged").iterdir():
            assert (uploaded / file.name).read_bytes() == file.read_bytes()
        assert (uploaded / "README.md").read_text().startswith("---\nbase_model: someone/model\n")
        for refused, sentence in (
            (command("someone/secret", "writer/other"), "neither a file or folder here nor a data set"),
            (command("someone/talks", "someone/finetuned"), "You don't have the rights"),
        ):
            done = start_sft_trainer(*refused, **environment)
            assert done.returncode == 1
            assert sentence in done.stderr
            assert "Traceback" not in done.stderr
        assert not [path for _, path in hub.requests if "telemetry" in path]
    finally:
        hub.close()
