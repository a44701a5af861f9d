"""DPO and KTO: TRL is given the chat's own ids, and the eval split is measured whole by TRL's own formulas."""

import json
import re

import pytest
import torch

from llama2_chat import prompt
from llama2_chat.training import chat_data, splits
from llama2_chat.training.base_model import base_precision, fetch_base, load_for_training
from llama2_chat.training.curves import read_curves
from llama2_chat.training.preferences import mark_compared
from llama2_chat.training.row_sources import Reading
from llama2_chat.training.train_one import tokenize_splits
from llama2_chat.training.trainer import Progress, make_trainer
from scripts.sft_trainer import read_arguments
from tests.support.training import arguments, train_here


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "some.jsonl"
    rows = [
        {"prompt": f"hello {i}", "chosen": f"hell {i} " + "o " * (i % 5), "rejected": f"you {i}" + " no" * (i % 3)}
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def prepare(chat_model, pairs, tmp_path):
    """A trainer with these flags, and the examples that it was given."""

    def prepare(*flags):
        options = read_arguments(arguments(chat_model, pairs, tmp_path, "--eval_fraction", "0.3", *flags))
        base = fetch_base(options.model_name)
        data = chat_data.read(options.dataset_names, Reading(method=options.method))
        examples = tokenize_splits(options, splits.split(data, options.eval_fraction, 0, options.seed), base)
        model = load_for_training(base.checkpoint, base_precision(options), "cpu")
        trainer = make_trainer(options, model, base.tokenizer, examples)
        trainer.remove_callback(Progress)
        return trainer, examples, base

    return prepare


def shift(trainer):
    """As if something had been learned."""
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_answers_are_compared_in_the_ids_that_the_chat_has(prepare):
    trainer, examples, base = prepare("--method", "dpo")
    row, compared = (
        trainer.train_dataset[0],
        next(
            one
            for one in examples["train"]
            if one.input_ids[: len(trainer.train_dataset[0]["prompt_ids"])] == trainer.train_dataset[0]["prompt_ids"]
        ),
    )
    number = re.search(r"\d+", base.tokenizer.decode(row["prompt_ids"]))[0]
    assert row["prompt_ids"] == prompt.encode(base.tokenizer, [{"role": "user", "content": f"hello {number}"}])
    for name, example in (("chosen_ids", compared.good), ("rejected_ids", compared.bad)):
        assert row["prompt_ids"] + row[name] == example.input_ids
        assert row[name][-1] in base.stop_ids
    marked = mark_compared(compared, base.tokenizer)
    assert re.search(
        rf"hello {number}<\|im_end\|>.*⟦hell {number}.*<\|im_end\|>⟧\n✗ ⟦you {number}.*<\|im_end\|>⟧$", marked, re.S
    )


@pytest.mark.parametrize(
    "flags", [("--method", "dpo"), ("--method", "dpo", "--use_peft"), ("--method", "kto", "--batch_size", "20")]
)
def test_the_eval_loss_is_that_of_trl_over_the_whole_split_whatever_the_batch_size(prepare, flags):
    trainer, _, _ = prepare(*flags)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931 if "dpo" in flags else 0.5, abs=1e-3)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-3)
    shift(trainer)
    trainer.model.eval()
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, batch).item()
    assert abs(expected - before["eval_loss"]) > 2e-3
    trainer._metrics["eval"].clear()
    for trainer.args.per_device_eval_batch_size in (1, 3, 8):
        after = trainer.evaluate()
        assert after["eval_loss"] == pytest.approx(
            expected, abs=1e-3 if "--use_peft" in flags else 1e-4
        )  # the base in 16 bits
    assert 0 <= after["eval_rewards/accuracies"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_model_learns_to_prefer_the_good_answers_and_reports_it(chat_model, pairs, tmp_path, method):
    flags = (
        "--method",
        method,
        "--use_peft",
        "--learning_rate",
        "1e-2",
        "--num_train_epochs",
        "5",
        "--batch_size",
        "6",
    )
    train_here(*arguments(chat_model, pairs, tmp_path, *flags, "--eval_fraction", "0.3"))
    rows = [row for row in read_curves(tmp_path) if "eval loss" in row]
    assert rows[-1]["eval loss"] < 0.9 * rows[0]["eval loss"]
    assert rows[-1]["eval preferred"] > 0.6
    assert rows[-1]["eval margin"] > 0.1
    page = (tmp_path / "README.md").read_text()
    assert f"| method | {method.upper()}, beta 0.1 |" in page
    assert re.search(r"\| eval margin \| 0.000 → \d", page)
    assert (tmp_path / "adapter_model.safetensors").is_file()
