"""Curves of a Trainer's log, which can be read back."""

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import curves

HISTORY = [
    {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_runtime": 1.0},
    {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-3},
    {"step": 2, "epoch": 1.0, "loss": 2.0, "learning_rate": 5e-4},
    {"step": 2, "epoch": 1.0, "eval_loss": 2.25},
    {"step": 2, "epoch": 1.0, "train_runtime": 9.0},
]


def test_curves_have_one_row_for_each_step_and_can_be_read_back(tmp_path):
    rows = curves.from_log(HISTORY)
    assert rows[2] == {"step": 2, "epoch": 1.0, "train loss": 2.0, "eval loss": 2.25, "learning rate": 5e-4}
    curves.write_curves(rows, tmp_path)
    assert curves.read_curves(tmp_path) == rows
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curves.read_curves(tmp_path / "none") == []
    (tmp_path / "curves.csv").write_text("step,train loss\n1,abc\n")
    with pytest.raises(ChatError, match=r"curves\.csv cannot be read"):
        curves.read_curves(tmp_path)


def test_curves_that_can_be_read_have_their_picture(tmp_path, monkeypatch):
    monkeypatch.delattr(curves, "draw_curves")  # as if killed there
    with pytest.raises(NameError):
        curves.write_curves(curves.from_log(HISTORY), tmp_path)
    assert curves.read_curves(tmp_path) == []
