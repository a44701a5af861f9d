"""lm-eval's tasks and your own, refused early where they make no sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.evaluation import harness

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.fixture
def task(tmp_path):
    """A task file, whose questions lie beside it."""
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps({"question": f"hell {i}?", "choices": ["o", "lo w"], "answer": i % 2}) + "\n" for i in range(6)
        )
    )
    (tmp_path / "letters.yaml").write_text(TASK.format(file="questions.jsonl"))
    return str(tmp_path / "letters.yaml")


@pytest.fixture(scope="module")
def model_and_tokenizer(chat_model):
    return AutoModelForCausalLM.from_pretrained(chat_model).eval(), AutoTokenizer.from_pretrained(chat_model)


def test_a_task_of_ones_own_is_answered_as_the_models_likelihoods_say(task, model_and_tokenizer):
    tasks, faults = harness.find_tasks([task])
    assert faults == []
    model, tokenizer = model_and_tokenizer
    by_metric = {score.metric: score for score in harness.run(tasks, model, tokenizer, 4, None)[0]}
    right = 0
    for i in range(6):
        likelihoods = []
        for choice in ("o", "lo w"):
            asked = tokenizer(f"Question: hell {i}?\nAnswer:")["input_ids"]
            ids = torch.tensor([tokenizer(f"Question: hell {i}?\nAnswer: {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            each = logs.gather(1, ids[0, 1:, None])[len(asked) - 1 :]
            likelihoods.append(each.sum().item())
        right += likelihoods.index(max(likelihoods)) == i % 2
    assert by_metric["acc"].value == pytest.approx(right / 6)
    assert by_metric["acc"].questions == 6
    assert by_metric["acc"].stderr >= 0
    assert harness.run(tasks, model, tokenizer, 4, limit=2)[0][0].questions == 2


def test_a_task_whose_questions_cannot_be_had_does_not_stop_the_others(task, tmp_path):
    (tmp_path / "lost.yaml").write_text(TASK.format(file="lost.jsonl").replace("letters", "lost"))
    tasks, (fault,) = harness.find_tasks([str(tmp_path / "lost.yaml"), task, task])
    assert [list(loaded["tasks"]) for loaded in tasks] == [["letters"]]
    assert fault.startswith(f"{tmp_path / 'lost.yaml'} was not run: its questions cannot be read or fetched")


def test_each_model_sees_the_same_examples_before_a_question(task, tmp_path, model_and_tokenizer, monkeypatch):
    """Base and adapter were asked after different examples, so that their scores could not be compared."""
    from lm_eval.models.huggingface import HFLM

    (tmp_path / "few.yaml").write_text(Path(task).read_text() + "num_fewshot: 2\nfewshot_split: test\n")
    tasks, _ = harness.find_tasks([str(tmp_path / "few.yaml")])
    asked = []
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, rows, **_: asked.append([row.args for row in rows]) or [(-1.0, False)] * 12
    )
    model, tokenizer = model_and_tokenizer
    for _ in range(2):
        harness.run(tasks, model, tokenizer, 4, None)
    assert asked[0][0][0].count("Question: ") == 3
    assert asked[0] == asked[1]


def test_a_task_that_fails_does_not_stop_the_others(task, tmp_path, model_and_tokenizer):
    """The whole evaluation ended with a traceback, and what was not yet measured was lost."""
    (tmp_path / "broken.py").write_text("def process(doc, results):\n    raise KeyError('score')\n")
    broken = Path(task).read_text().replace("letters", "broken") + "process_results: !function broken.process\n"
    (tmp_path / "broken.yaml").write_text(broken)
    tasks, _ = harness.find_tasks([str(tmp_path / "broken.yaml"), task])
    model, tokenizer = model_and_tokenizer
    scores, faults = harness.run(tasks, model, tokenizer, 4, None)
    assert {score.task for score in scores} == {"letters"}
    assert faults == ["broken failed (KeyError: 'score')."]


@pytest.mark.slow
def test_a_task_of_ones_own_asks_nobody_on_the_network(task):
    """datasets told a server of Amazon's that a local file was read."""
    program = """
import socket
import sys
from llama2_chat.evaluation import harness
asked = []
socket.getaddrinfo = lambda host, *_, **__: asked.append(host) or exec("raise OSError")
harness.find_tasks(sys.argv[1:])
print("asked:", asked)
"""
    done = subprocess.run([sys.executable, "-c", program, task], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "asked: []" in done.stdout


def test_a_task_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ChatError, match=r"There is no task file .*none\.yaml"):
        harness.find_tasks([str(tmp_path / "none.yaml")])


@pytest.mark.slow  # lm-eval lists all its tasks, which takes ten seconds
def test_a_task_that_nobody_knows_is_refused_with_those_that_are_called_alike():
    with pytest.raises(ChatError, match=r"knows no task helaswag\. Did you mean hellaswag"):
        harness.find_tasks(["helaswag"])
