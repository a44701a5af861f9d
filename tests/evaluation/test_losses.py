"""Losses of a tiny random model, computed in batches, beside the obvious way, one by one."""

import numpy as np
import pytest
import torch

from llama2_chat.loading import load
from llama2_chat.loading.adapters import load_adapter
from llama2_chat.loading.config import read_generation_config
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.training import chat_data, losses, splits
from llama2_chat.training.base_model import fetch_checkpoint
from llama2_chat.training.examples import labels, tokenize
from llama2_chat.training.losses import conversation_losses
from llama2_chat.training.run_json import read_run
from tests.support.evaluating import evaluate, loss_of
from tests.support.serving import ignore

# PEFT 0.21 uses names that transformers 5.23 has deprecated.


def losses_one_by_one(model, examples):
    found = []
    for example in examples:
        targets = torch.tensor([labels(example)])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([example.input_ids]), labels=targets).loss.item()
        tokens = int((targets[:, 1:] != -100).sum())
        found.append((loss * tokens, tokens))
    return np.array(found)


def mean_loss(model, examples):
    total, tokens = losses_one_by_one(model, examples).sum(0)
    return total / tokens


def examples_of(rows, folder):
    checkpoint = fetch_checkpoint(str(folder))
    tokenizer = load_tokenizer(checkpoint)
    stop_ids = load.find_stop_ids(tokenizer, read_generation_config(checkpoint.base))
    return tokenize(rows, tokenizer, stop_ids, 256)[0]


def test_the_losses_of_a_batch_are_those_of_each_conversation_alone_and_of_its_answers_only(
    chat_model, dataset, monkeypatch
):
    examples = examples_of(chat_data.read(str(dataset)).train, chat_model)
    model = load.load_base(fetch_checkpoint(str(chat_model)), "float32", "cpu", ignore)
    expected = losses_one_by_one(model, examples)
    for batch_size, piece in ((1, losses.PIECE), (5, losses.PIECE), (100, 7)):
        monkeypatch.setattr(losses, "PIECE", piece)
        np.testing.assert_allclose(conversation_losses(model, examples, batch_size), expected, rtol=1e-4)


@pytest.mark.slow
def test_an_adapter_is_measured_beside_its_base_on_each_split_of_its_run(run, chat_model, capsys):
    found, page = evaluate(run, "--sheet", "0")
    parts = splits.find_again(read_run(run))[0]
    base = load.load_base(fetch_checkpoint(str(chat_model)), "float32", "cpu", ignore)
    for split, rows in (("eval", parts.eval), ("test", parts.test)):
        expected = mean_loss(base, examples_of(rows, chat_model))
        assert loss_of(found, "base", split) == pytest.approx(expected, rel=1e-4)
    adapted = load_adapter(base, fetch_checkpoint(str(run))).eval()
    expected = mean_loss(adapted, examples_of(parts.eval, chat_model))
    assert loss_of(found, "adapter", "eval") == pytest.approx(expected, rel=1e-4)
    assert loss_of(found, "adapter", "eval") != pytest.approx(loss_of(found, "base", "eval"), rel=1e-3)
    assert page in capsys.readouterr().out + "\n"
    assert "| adapter | float32 |" in page
    assert (run / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert str(run.parent) not in page + found["run"]["dataset_names"][0]
