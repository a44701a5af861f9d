"""What scripts/report.py promises: curves that can be read back, tables that nothing breaks."""

from pathlib import Path

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import report

HISTORY = [
    {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_runtime": 1.0},
    {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-3},
    {"step": 2, "epoch": 1.0, "loss": 2.0, "learning_rate": 5e-4},
    {"step": 2, "epoch": 1.0, "eval_loss": 2.25},
    {"step": 2, "epoch": 1.0, "train_runtime": 9.0},
]


def test_curves_have_one_row_for_each_step_and_can_be_read_back(tmp_path):
    curves = report.curves(HISTORY)
    assert curves[2] == {"step": 2, "epoch": 1.0, "train loss": 2.0, "held-out loss": 2.25, "learning rate": 5e-4}
    report.write_curves(curves, tmp_path)
    assert report.read_curves(tmp_path) == curves
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.read_curves(tmp_path / "none") == []
    (tmp_path / "curves.csv").write_text("step,train loss\n1,abc\n")
    with pytest.raises(ChatError, match=r"curves\.csv cannot be read"):
        report.read_curves(tmp_path)


def test_curves_that_can_be_read_have_their_picture(tmp_path, monkeypatch):
    monkeypatch.delattr(report, "draw_curves")  # as if killed there
    with pytest.raises(NameError):
        report.write_curves(report.curves(HISTORY), tmp_path)
    assert report.read_curves(tmp_path) == []


def test_a_cell_of_a_table_holds_whatever_a_model_says():
    head, rule, row = report.table(("question", "answer"), [("a | b", "one\n\n| two |" + " a" * 400)])
    assert (head, rule) == ("| question | answer |", "|---|---|")
    assert row.startswith("| a \\| b | one \\| two \\| a a")
    assert row.endswith(" … |")
    assert len(row) < 350


def test_a_local_path_is_not_published(tmp_path):
    assert report.public(str(tmp_path)) == tmp_path.name
    assert report.public(".") == Path.cwd().name
    assert report.public("someone/data") == "someone/data"
