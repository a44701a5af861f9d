"""Several processes: they train together, share a model, and one of them says so."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.training import base_model, processes, whole_split
from llama2_chat.training.curves import EVAL_LOSS, read_curves, values
from llama2_chat.training.options import Options
from llama2_chat.training.run_json import read_run
from tests.support.training import SCRIPT, arguments, train_here

FLAGS = ["--use_peft", "--lora_dropout", "0", "--num_train_epochs", "2", "--save_steps", "2", "--learning_rate", "2e-3"]


@pytest.fixture
def divided(monkeypatch):
    """As in one of two processes that FSDP divides a model among."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"folds": 2}, "--folds trains one model after another"),
        ({"use_peft": True, "load_in_8bit": True}, "--load_in_4bit"),
        ({"use_peft": True, "load_in_4bit": True, "use_dora": True}, "leave out --use_dora"),
        ({"method": "dpo"}, "--method dpo needs --use_peft"),
    ],
)
def test_what_a_divided_model_cannot_do_is_refused_before_anything_is_loaded(divided, tmp_path, flags, sentence):
    options = Options("a", ["b"], tmp_path, 1e-4, **flags)
    with pytest.raises(ChatError, match=sentence):
        processes.check_divided(options)
    divided.delenv("ACCELERATE_USE_FSDP")
    processes.check_divided(options)


def test_a_model_is_divided_by_the_second_fsdp_only(divided, tmp_path):
    options = Options("a", ["b"], tmp_path, 1e-4, use_peft=True, load_in_4bit=True)
    processes.check_divided(options)
    divided.setenv("FSDP_VERSION", "1")
    with pytest.raises(ChatError, match=r"deploy/fsdp\.yaml"):
        processes.check_divided(options)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_all_processes_compute_equally_often_and_count_each_example_once(monkeypatch, count):
    examples = list(range(count))
    asked, shares = [], []

    def losses(model, own, batch_size):
        asked.append(len(own))
        return whole_split.np.array([[10.0 * each, 1.0] for each in own]).reshape(-1, 2)

    def gather(share):
        shares.extend(share)
        return shares

    monkeypatch.setattr(whole_split, "conversation_losses", losses)
    monkeypatch.setattr(whole_split, "gather_object", gather)
    for index in range(3):
        state = SimpleNamespace(num_processes=3, process_index=index)
        monkeypatch.setattr(whole_split, "processes", lambda state=state: state)
        found = whole_split.losses_by_all(None, examples, 2)
    assert found.tolist() == [[10 * each, 1] for each in examples]
    assert len({*asked}) == 1


def launch(model, data, folder, *flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "deploy" / "fsdp.yaml"]
    command += ["--main_process_port", "0", ROOT / "tests" / "support" / "launched.py", SCRIPT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += arguments(model, data, folder, *FLAGS, "--batch_size", "2", *flags)
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)


def launch_well(*args):
    done = launch(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_several_processes_that_refuse_the_same_say_it_once(tmp_path):
    done = launch("a", tmp_path, tmp_path / "out", "--folds", "2")
    assert done.returncode == 1
    assert done.stderr.count("sft_trainer.py: --folds trains one model after another") == 1


@pytest.mark.slow
def test_two_processes_that_share_a_model_train_what_one_trains_and_go_on_after_a_kill(
    chat_model, tmp_path, monkeypatch
):
    data, one, two = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    data.mkdir()
    for name, numbers in (("train", range(24)), ("eval", range(100, 105))):  # five: one process has one more
        rows = [{"prompt": f"hello {i}", "completion": f"hell {i} " + "o " * (i % 5)} for i in numbers]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = launch_well(chat_model, data, two, "--merge_to", tmp_path / "merged")
    for sentence in ("Conversations: 24 train, 5 eval", "The report is", "The merged model is in"):
        assert said.count(sentence) == 1
    monkeypatch.setattr(base_model, "full_precision", lambda: "float32")
    train_here(*arguments(chat_model, data, one, *FLAGS, "--batch_size", "4"))
    found, right = (values(read_curves(folder), EVAL_LOSS) for folder in (two, one))
    assert found == pytest.approx(right, abs=1e-4)
    assert found[-1] < found[0] - 0.2
    trained, expected = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert_close(trained, expected, atol=1e-3, rtol=1e-3)
    names = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (one, two)]
    assert names[0] == names[1]
    assert (read_run(two).settings["processes"], read_run(one).settings["processes"]) == (2, 1)
    # Killed after its checkpoint in the middle.
    steps = sorted((int(path.name.rpartition("-")[2]) for path in two.glob("checkpoint-*")), reverse=True)
    shutil.rmtree(two / f"checkpoint-{steps[0]}")
    for name in ("curves.csv", "adapter_model.safetensors"):
        (two / name).unlink()
    launch_well(chat_model, data, two, "--resume")
    again = load_file(two / "adapter_model.safetensors")
    assert_close(again, trained, atol=0, rtol=0)
