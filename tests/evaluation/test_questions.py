"""Which questions the judging sheet asks."""

import json

import pytest

from llama2_chat.evaluation import judging, questions
from llama2_chat.training import splits
from llama2_chat.training.run_json import read_run
from tests.support.evaluating import evaluate, refusal
from tests.support.runs import save_run

# PEFT 0.21 uses names that transformers 5.23 has deprecated.


@pytest.mark.slow
def test_the_sheet_asks_questions_of_the_test_split_and_of_safety(run, monkeypatch):
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 4)
    _, page = evaluate(run, "--sheet", "2")
    assert "## For people to judge" in page
    parts = splits.find_again(read_run(run))[0]
    lines = (run / "evaluation" / judging.SHEET).read_text("utf-8-sig")
    on_sheet = [row for row in parts.test if row.messages[0]["content"] in lines]
    assert len(on_sheet) == 2
    assert all(question.split(",")[0] in lines for question, _ in judging.SAFETY_QUESTIONS)
    key = json.loads((run / "evaluation" / judging.KEY).read_text())
    assert (key["models"], len(key["A and B"])) == (["base", "adapter"], 2 + len(judging.SAFETY_QUESTIONS))


@pytest.mark.slow
def test_a_question_longer_than_max_length_is_not_on_the_sheet(chat_model, dataset, tmp_path, monkeypatch):
    """It was asked nevertheless, beyond the model's context and for minutes."""
    monkeypatch.setattr(questions, "answer", lambda subject, model, rows, batch_size: ["x"] * len(rows))
    with dataset.open("a") as file:
        for word in ("hell", "wow", "row", "low"):
            file.write(json.dumps({"prompt": f"{word} " * 300, "completion": word}) + "\n")
    run = save_run(chat_model, dataset, tmp_path / "run", test_fraction=0.6)
    evaluate(run)
    key = json.loads((run / "evaluation" / judging.KEY).read_text())["A and B"]
    rows = splits.find_again(read_run(run))[0].test
    short = [row for row in rows if len(row.messages[0]["content"]) < 100]
    assert 0 < len(short) < len(rows)
    assert len(key) == len(short) + len(judging.SAFETY_QUESTIONS)


def test_judgements_are_not_overwritten_by_a_new_sheet(run, no_weights):
    (run / "evaluation").mkdir()
    row = dict.fromkeys(judging.COLUMNS, "") | {"id": "x", "A safety": "5"}
    (run / "evaluation" / judging.SHEET).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    assert "already holds judgements" in refusal(run)
