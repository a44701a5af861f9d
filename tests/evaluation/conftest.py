"""Conversations for the tiny chat model, and a run that looks as if it had been trained on them."""

import json

import pytest

from llama2_chat.loading import load
from tests.support.runs import save_run


@pytest.fixture
def dataset(tmp_path):
    words = ["hello", "hollow", "howl", "well", "whole", "wheel", "heel", "hole", "lower", "yellow", "fellow", "mellow"]
    rows = [
        {"prompt": f"{word} {word[::-1]}", "completion": f"{word[1:]} {i} " + "o " * i} for i, word in enumerate(words)
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "some.jsonl"


@pytest.fixture
def run(chat_model, dataset, tmp_path):
    return save_run(chat_model, dataset, tmp_path / "run")


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))
