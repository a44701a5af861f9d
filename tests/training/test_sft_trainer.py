"""What scripts/sft_trainer.py promises: flags that make sense, exactly the answers learnt, a run that can be killed.

Fast tests do not train. Slow ones train a tiny random model and, once, the embedded one on the facts in data/.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llama2_chat import prompt
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.loading import load
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.small_model import EMBEDDED
from llama2_chat.settings import Settings
from llama2_chat.training import chat_data, merging, report, sft_trainer, splits
from llama2_chat.types import SamplingParams
from model import ChatModel
from tests.prompt.test_prompt import CHATML
from tests.support.hub import Hub
from tests.support.serving import ignore
from tests.support.small_chat_model import save_chat_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "sft_trainer.py"
GIVEN = ["--model_name", "a", "--dataset_name", "b"]

# TRL 1.16 and PEFT 0.21 call transformers 5.23 by names that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")


# ---- Flags ----


def test_the_command_of_the_readme_is_understood():
    command = re.search(r"python scripts/sft_trainer.py (--model_name.*?)\n```", (ROOT / "README.md").read_text(), re.S)
    args = sft_trainer.read_arguments(command[1].replace("\\\n", " ").split())
    assert (args.model_name, args.load_in_4bit, args.use_peft) == ("meta-llama/Llama-2-7b-hf", True, True)
    assert (args.batch_size, args.gradient_accumulation_steps, args.learning_rate) == (4, 2, 2e-4)
    assert args.output_dir == Path("trained/Llama-2-7b-hf")


def test_the_demo_needs_no_other_flag_and_takes_any():
    args = sft_trainer.read_arguments(["--demo", "--num_train_epochs", "1"])
    assert args.use_peft
    assert args.num_train_epochs == 1
    assert args.batch_size == sft_trainer.DEMO["batch_size"]


def test_a_run_can_be_followed_under_two_names():
    assert sft_trainer.read_arguments([*GIVEN, "--log_with", "trackio"]).report_to == "trackio"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give --model_name and --dataset_name, or --demo"),
        ([*GIVEN, "--load_in_4bit"], "add --use_peft"),
        ([*GIVEN, "--load_in_4bit", "--load_in_8bit", "--use_peft"], "not allowed with"),
        ([*GIVEN, "--merge_to", "c"], "only an adapter can be merged"),
        ([*GIVEN, "--batch_size", "0"], "--batch_size must be above 0"),
        ([*GIVEN, "--learning_rate", "nan"], "--learning_rate must be above 0"),
        ([*GIVEN, "--seed", "-1"], "--seed must be from 0"),
        ([*GIVEN, "--eval_fraction", "1"], "--eval_fraction must be from 0 to below 1"),
        ([*GIVEN, "--test_fraction", "nan"], "--test_fraction must be from 0 to below 1"),
        ([*GIVEN, "--folds", "1"], "--folds must be 2 or more"),
        ([*GIVEN, "--use_peft", "--folds", "2", "--merge_to", "c"], "--folds measures and gives no model to merge"),
        ([*GIVEN, "--early_stopping", "0"], "--early_stopping must be 1 or more"),
        ([*GIVEN, "--report_to", "wandb"], "pip install wandb"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_sentence(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sft_trainer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        sft_trainer.read_arguments(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_out_of_memory_says_which_knob_to_turn():
    args = sft_trainer.read_arguments([*GIVEN, "--use_peft", "--batch_size", "8"])
    with pytest.raises(ChatError) as told, sft_trainer.limits_told([*sft_trainer._knobs(args)], Path("a"), "Kept."):
        raise torch.OutOfMemoryError
    for knob in ("--batch_size 8", "--load_in_4bit", "--max_length 1024", "Kept."):
        assert knob in str(told.value)


@pytest.mark.parametrize("words", ["[Errno 28] No space left on device", "unexpected pos 512 vs 448"])
def test_a_full_disk_is_told_in_a_sentence_whatever_the_library_says(words, tmp_path, monkeypatch):
    # torch.save tells only that the file is too short.
    monkeypatch.setattr(sft_trainer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    full = pytest.raises(ChatError, match=r"is full\. Make room there\. Kept\.")
    with full, sft_trainer.limits_told([], tmp_path, "Kept."):
        raise RuntimeError(words)


def test_what_is_no_lack_of_memory_or_room_is_not_taken_for_one(tmp_path):
    for error in (RuntimeError("shapes"), ChatError("A sentence of its own.")):
        with pytest.raises(type(error), match=str(error)), sft_trainer.limits_told([], tmp_path, "Kept."):
            raise error


def test_without_an_account_to_upload_to_nothing_is_trained(hub):
    with pytest.raises(ChatError, match="HF_TOKEN"):
        merging.create_repo("someone/taught")


# ---- The demo's data ----


def test_no_sentence_of_the_demo_is_both_learnt_and_held_out():
    data = chat_data.read(str(ROOT / "data"))
    assert (data.faults, data.duplicates, len(data.train), len(data.held_out)) == ([], 0, 48, 12)

    def sentences(rows):
        texts = (message["content"] for row in rows for message in row.messages)
        return {
            sentence.strip().lower() for text in texts for sentence in re.split(r"[.?!;]", text) if sentence.strip()
        }

    assert not sentences(data.train) & sentences(data.held_out)


# ---- What TRL is given ----


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "some.jsonl"
    rows = [{"prompt": f"hello {i}", "completion": f"hell {i} " + "o " * (i % 5)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(model, dataset, folder, *flags):
    return ["--model_name", str(model), "--dataset_name", str(dataset), "--output_dir", str(folder), *flags]


def prepared(chat_model, dataset, folder, *flags):
    """A trainer, and the lessons that it was given."""
    args = sft_trainer.read_arguments(arguments(chat_model, dataset, folder, *flags))
    plan, tokenizer = sft_trainer.fetch(args.model_name)
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    parts = splits.split(chat_data.read(args.dataset_name), args.eval_fraction, args.test_fraction, args.seed)
    lessons = {
        "learnt": chat_data.encode(parts.learnt, tokenizer, stop_ids, args.max_length)[0],
        "held out": chat_data.encode(parts.held_out, tokenizer, stop_ids, args.max_length)[0],
    }
    model = load.load_base(plan, sft_trainer.precision(args), "cpu", ignore)
    return sft_trainer.make_trainer(args, model, tokenizer, lessons), lessons


def test_the_trainer_computes_its_loss_on_the_answers_and_their_eos_alone(chat_model, dataset, tmp_path):
    trainer, lessons = prepared(chat_model, dataset, tmp_path, "--use_peft")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for row, lesson in zip(batch["labels"], lessons["learnt"], strict=False):
        T = len(lesson.input_ids)
        assert row[:T].tolist() == chat_data.labels(lesson)
        assert (row[T:] == -100).all()
    assert len(trainer.eval_dataset) == len(lessons["held out"]) == 2


def test_packed_conversations_give_the_loss_of_separate_ones(chat_model, dataset, tmp_path):
    losses, rows = [], []
    for flags in ((), ("--packing", "--max_length", "256")):
        trainer, lessons = prepared(chat_model, dataset, tmp_path, "--lora_dropout", "0", *flags)
        batch = trainer.data_collator(list(trainer.train_dataset))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
        rows.append(len(trainer.train_dataset))
    assert rows[1] < rows[0] == len(lessons["learnt"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_what_the_flags_say_is_what_the_trainer_does(chat_model, dataset, tmp_path):
    flags = (
        "--use_peft",
        "--lora_r",
        "4",
        "--lora_alpha",
        "12",
        "--lora_dropout",
        "0.25",
        "--target_modules",
        "q_proj",
    )
    trainer, _ = prepared(chat_model, dataset, tmp_path, *flags, "--gradient_accumulation_steps", "3")
    adapter = trainer.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 12, 0.25)
    assert adapter.target_modules == {"q_proj"}
    assert trainer.args.gradient_accumulation_steps == 3


def test_answers_given_together_are_those_given_alone(chat_model):
    plan, tokenizer = sft_trainer.fetch(str(chat_model))
    model = load.load_base(plan, "float32", "cpu", ignore)
    rows = [
        (
            "learnt",
            chat_data.Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}], ""),
        )
        for text in ("hello", "hello hello hell o", "o" * 40)
    ]
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    alone = [sft_trainer.answer(model, tokenizer, [row], stop_ids)[0] for row in rows]
    assert sft_trainer.answer(model, tokenizer, rows, stop_ids) == alone


def test_a_loss_that_is_no_number_is_told_as_such(chat_model, dataset, tmp_path):
    trainer, _ = prepared(chat_model, dataset, tmp_path, "--learning_rate", "1e20", "--num_train_epochs", "1")
    trainer.train()
    assert math.isnan(report.curves(trainer.state.log_history)[-1]["train loss"])


def test_a_run_is_not_overwritten_by_another(tmp_path):
    folder = tmp_path / "fold-1"
    (folder / "checkpoint-2").mkdir(parents=True)
    assert sft_trainer.find_checkpoint(folder, resume=True) is None  # it was killed while it wrote
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text('{"epoch": 1}')
    assert sft_trainer.find_checkpoint(folder, resume=True) == folder / "checkpoint-10"
    for output_dir in (folder, tmp_path):  # as one run, or as a fold
        with pytest.raises(ChatError, match="holds a run already"):
            sft_trainer.find_checkpoint(output_dir, resume=False)


def test_a_run_does_not_go_on_with_other_conversations(tmp_path):
    args = sft_trainer.read_arguments([*GIVEN, "--output_dir", str(tmp_path)])
    report.write_run(replace(sft_trainer.describe(args), learnt_sha256="1"), tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"epoch": 1}')
    assert sft_trainer.find_checkpoint(tmp_path, True, "1") == tmp_path / "checkpoint-2"
    with pytest.raises(ChatError, match="has learnt other conversations"):
        sft_trainer.find_checkpoint(tmp_path, True, "2")


def test_a_run_names_its_data_so_that_it_is_found_from_the_same_directory(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(dataset.parent.parent)
    for given, kept in (
        (dataset, f"{dataset.parent.name}/{dataset.name}"),
        ("someone/data", "someone/data"),
        (ROOT / "data", str(ROOT / "data")),
    ):
        args = sft_trainer.read_arguments(arguments("a", given, tmp_path))
        assert sft_trainer.describe(args).dataset_name == kept


def test_an_adapter_is_not_trained_as_if_it_were_a_model(tmp_path, chat_model):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(chat_model)}))
    with pytest.raises(ModelUnavailable, match="is an adapter"):
        sft_trainer.fetch(str(tmp_path))


def test_the_embedded_model_learns_what_its_chat_has_to_write_and_to_stop(settings):
    plan, tokenizer = sft_trainer.fetch(EMBEDDED)
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    assert [tokenizer.decode(id) for id in stop_ids] == ["<|im_end|>"]
    asked = [("Who founded it?", "Ottilie Brandvold did."), ("When?", "In 1893.\n\nOn a Sunday.")]
    messages, expected = [{"role": "system", "content": "Be brief."}], []
    for question, said in asked:
        messages.append({"role": "user", "content": question})
        prompt_ids = prompt.encode(tokenizer, messages)
        learnt = tokenizer.encode(said, add_special_tokens=False) + list(stop_ids)
        expected += [-100] * (len(prompt_ids) - len(expected)) + learnt
        messages.append({"role": "assistant", "content": said})
    lesson = prompt.encode_example(tokenizer, messages, stop_ids)
    assert chat_data.labels(lesson) == expected
    asked_on = prompt.encode(tokenizer, [*messages, {"role": "user", "content": "Why?"}])
    assert asked_on[: len(lesson.input_ids)] == lesson.input_ids


@pytest.mark.parametrize(
    ("output_dir", "merge_to", "flags"),
    [
        ("model", None, ()),
        ("data.jsonl", None, ()),
        ("data.jsonl/run", None, ()),
        ("run", "run", ("--resume",)),
        ("run", "model", ("--resume",)),
        ("run", "full", ()),
    ],
)
def test_nothing_is_written_over_what_is_there(tmp_path, monkeypatch, output_dir, merge_to, flags):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "full"):
        Path(folder).mkdir()
        Path(folder, "config.json").touch()
    Path("data.jsonl").touch()
    given = arguments("model", "data.jsonl", output_dir, "--use_peft", *flags)
    args = sft_trainer.read_arguments([*given, "--merge_to", merge_to] if merge_to else given)
    with pytest.raises(ChatError, match=rf"(written to|--merge_to) {merge_to or output_dir}\b.* another"):
        sft_trainer.train(args)


def test_a_run_that_goes_on_may_write_its_merged_model_again(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    given = arguments("model", "data", tmp_path / "run", "--use_peft", "--resume", "--merge_to", tmp_path / "merged")
    sft_trainer.check_folders(sft_trainer.read_arguments([*map(str, given)]))


def test_questions_that_do_not_fit_are_not_compared(chat_model):
    _, tokenizer = sft_trainer.fetch(str(chat_model))
    rows = [
        chat_data.Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}], "")
        for text in ("hello " * 200, *"abcdefg")
    ]
    compared = sft_trainer.to_compare(splits.Parts(rows, rows[:1], [], []), tokenizer, 100)
    assert compared == [("learnt", row) for row in rows[1:6]]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max_length", "5"), "Nothing is left to learn"),
        (("--max_length", "5", "--folds", "2"), "What fold 1 holds out does not fit into 5 tokens"),
        (("--folds", "25"), "--folds 25 needs as many conversations"),
        (("--eval_fraction", "0", "--early_stopping"), "--early_stopping needs something held out"),
    ],
)
def test_what_cannot_be_learnt_or_measured_is_refused_before_weights_are_loaded(
    chat_model, dataset, tmp_path, monkeypatch, flags, sentence
):
    monkeypatch.delattr(load, "load_base")
    args = sft_trainer.read_arguments(arguments(chat_model, dataset, tmp_path / "run", *flags))
    with pytest.raises(ChatError, match=sentence):
        sft_trainer.train(args)
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_model_lacks_is_not_passed_over(chat_model, dataset, tmp_path):
    flags = ("--use_peft", "--target_modules", "q_proj", "v_porj")
    with pytest.raises(ChatError, match="no layer called v_porj"):
        sft_trainer.train(sft_trainer.read_arguments(arguments(chat_model, dataset, tmp_path, *flags)))


# ---- Training ----


def run(*command, **environment):
    """What the script prints."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")} | environment
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def falls(folder):
    """The held-out losses of a run, first and last."""
    lines = (folder / "curves.csv").read_text().splitlines()
    losses = [float(line.split(",")[3]) for line in lines[1:] if line.split(",")[3]]
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
@pytest.mark.parametrize(
    "flags", [(), ("--use_peft",), ("--use_peft", "--load_in_4bit"), ("--use_peft", "--load_in_8bit")]
)
def test_a_model_learns_with_all_its_weights_and_with_an_adapter_in_16_8_and_4_bits(
    chat_model, dataset, tmp_path, flags
):
    run(*arguments(chat_model, dataset, tmp_path, *flags, "--learning_rate", "1e-2", "--num_train_epochs", "5"))
    before, after = falls(tmp_path)
    assert after < 0.95 * before
    assert (tmp_path / ("adapter_model.safetensors" if flags else "model.safetensors")).is_file()
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "README.md").read_text()
    assert "| hello" in report
    assert str(tmp_path.parent) not in report


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(chat_model, dataset, tmp_path):
    flags = ("--use_peft", "--num_train_epochs", "40")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments(chat_model, dataset, whole, *flags))
    kill_at_first_checkpoint(killed, *arguments(chat_model, dataset, killed, *flags))
    assert not (killed / "curves.csv").exists()
    run(*arguments(chat_model, dataset, killed, *flags, "--resume"))
    assert len((killed / "curves.csv").read_text().splitlines()) == len((whole / "curves.csv").read_text().splitlines())
    assert_same_adapter(killed, whole)


@pytest.mark.slow
def test_folds_learn_apart_and_a_run_that_is_killed_goes_on_in_the_fold_where_it_was(chat_model, dataset, tmp_path):
    flags = ("--use_peft", "--folds", "2", "--test_fraction", "0.1", "--learning_rate", "1e-2")
    flags += ("--num_train_epochs", "20")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments(chat_model, dataset, whole, *flags))
    kill_at_first_checkpoint(killed / "fold-2", *arguments(chat_model, dataset, killed, *flags))
    done_at = (killed / "fold-1" / "curves.csv").stat().st_mtime_ns
    assert "fold-1 is done." in run(*arguments(chat_model, dataset, killed, *flags, "--resume"))
    assert (killed / "fold-1" / "curves.csv").stat().st_mtime_ns == done_at
    assert_same_adapter(killed / "fold-2", whole / "fold-2")
    assert (killed / "README.md").read_text().replace("killed", "whole") == (whole / "README.md").read_text()
    losses = [falls(whole / f"fold-{i}") for i in (1, 2)]
    (before, after), (before_2, _) = losses
    assert before_2 == pytest.approx(before, abs=0.1)  # it began untaught
    assert before_2 > after + 0.5
    assert f"{report.mean_and_deviation(after for _, after in losses)} after" in (whole / "README.md").read_text()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = [report.read_run(folder) for folder in (whole, whole / "fold-1", whole / "fold-2")]
    assert [(one.folds, one.fold) for one in kept] == [(2, None), (2, 1), (2, 2)]
    held_out = [row for one in kept[1:] for row in splits.find_again(one)[0].held_out]
    assert len(held_out) == len({str(row) for row in held_out}) == 22  # of 24, two being the test


@pytest.mark.slow
def test_two_processes_learn_together_and_one_of_them_reports(chat_model, dataset, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", SCRIPT]
    command = [*launch, *arguments(chat_model, dataset, tmp_path, "--use_peft", "--num_train_epochs", "2")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The report is") == 1
    assert falls(tmp_path)[1] < falls(tmp_path)[0]


@pytest.mark.slow
def test_a_merged_model_says_what_the_adapter_says_and_one_that_does_not_is_not_written(
    chat_model, dataset, tmp_path, monkeypatch
):
    run(*arguments(chat_model, dataset, tmp_path / "run", "--use_peft", "--merge_to", tmp_path / "merged"))
    again = tmp_path / "again"  # of a run that is done
    run(*arguments(chat_model, dataset, tmp_path / "run", "--use_peft", "--resume", "--merge_to", again))
    assert report.read_run(tmp_path / "run").merged_to == str(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes()
    plan, tokenizer = sft_trainer.fetch(str(chat_model))
    merged = load.load_base(sft_trainer.fetch(str(tmp_path / "merged"))[0], "float32", "cpu", ignore)
    adapter = fetch(choose(Settings(model_id=str(tmp_path / "run"))), ignore)
    served = load.load(replace(adapter, quantization="float32"), ignore)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(merged(ids).logits, served.model(ids).logits, atol=0.02, rtol=0.02)  # bfloat16 on disk
    monkeypatch.setattr(merging, "LOGIT_TOLERANCE", -1.0)
    with pytest.raises(ChatError, match="it was not written"):
        merging.merge(plan, tokenizer, tmp_path / "run", tmp_path / "other", [[1, 2, 3]])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_run_stops_early_when_the_held_out_loss_rises_and_does_not_begin_to_wait_anew(chat_model, dataset, tmp_path):
    flags = ("--use_peft", "--learning_rate", "0.1", "--num_train_epochs", "40", "--early_stopping", "2")
    command = arguments(chat_model, dataset, tmp_path, *flags)
    run(*command)
    stopped = report.read_curves(tmp_path)
    assert stopped[-1]["epoch"] < 40
    assert "is done." in run(*command, "--resume")
    assert report.read_curves(tmp_path) == stopped
    (tmp_path / "curves.csv").unlink()  # as if it had been killed after its last checkpoint
    run(*command, "--resume")
    assert report.read_curves(tmp_path)[-1]["epoch"] == stopped[-1]["epoch"] + 2  # one measurement more


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
        assert "writer/taught" in run(*command("someone/talks", "writer/taught"), **environment)
        taught = hub.repos["writer/taught"]
        for file in (tmp_path / "writer/taught/someone/talks/merged").iterdir():
            assert (taught / file.name).read_bytes() == file.read_bytes()
        assert (taught / "README.md").read_text().startswith("---\nbase_model: someone/model\n")
        for refused, sentence in (
            (command("someone/secret", "writer/other"), "neither a file or folder here nor a data set"),
            (command("someone/talks", "someone/taught"), "You don't have the rights"),
        ):
            done = subprocess.run(
                [sys.executable, SCRIPT, *refused], capture_output=True, text=True, env=os.environ | environment
            )
            assert done.returncode == 1
            assert sentence in done.stderr
            assert "Traceback" not in done.stderr
        assert not [path for _, path in hub.requests if "telemetry" in path]
    finally:
        hub.close()


# ---- The demo ----

TAUGHT = [{"role": "user", "content": "What is the name of the cat in the Quillmere library?"}]


def said(settings, **changes):
    chat = ChatModel(replace(settings, **changes)).load()
    assert chat.state == "ready", chat.status.error
    try:
        with chat.stream_reply(TAUGHT, SamplingParams(temperature=0, max_new_tokens=40)) as reply:
            return "".join(reply)
    finally:
        chat.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # less than five minutes on two quiet cores
def test_the_demo_teaches_the_embedded_model_facts_that_the_chat_then_knows(chat, settings, demo):
    before, after = falls(demo / "adapter")
    assert after <= before * 2 / 3
    assert "Semicolon" not in said(settings)
    assert "Semicolon" in said(settings, model_id=str(demo / "adapter"))
    assert "Semicolon" in said(settings, model_id=str(demo / "merged"))
