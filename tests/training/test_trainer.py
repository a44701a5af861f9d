"""What TRL is given: exactly the answers as labels, and what the flags say."""

import math

import pytest
import torch

from llama2_chat.loading import load
from llama2_chat.training import chat_data, curves, splits
from llama2_chat.training.base_model import base_precision, fetch_base
from llama2_chat.training.examples import IGNORED, labels, tokenize
from llama2_chat.training.trainer import Progress, make_trainer
from scripts.sft_trainer import read_arguments
from tests.support.serving import ignore
from tests.support.training import arguments

# TRL 1.16 and PEFT 0.21 use names that transformers 5.23 has deprecated.


@pytest.fixture
def prepare(chat_model, dataset, tmp_path):
    """A trainer with these flags, and the examples that it was given."""

    def prepare(*flags):
        options = read_arguments(arguments(chat_model, dataset, tmp_path, *flags))
        base = fetch_base(options.model_name)
        of_run = splits.split(chat_data.read(options.dataset_names), options.eval_fraction, 0, options.seed)
        examples = {
            name: tokenize(rows, base.tokenizer, base.stop_ids, options.max_length)[0]
            for name, rows in (("train", of_run.train), ("eval", of_run.eval))
        }
        model = load.load_base(base.checkpoint, base_precision(options), "cpu", ignore)
        return make_trainer(options, model, base.tokenizer, examples), examples

    return prepare


def test_the_trainer_computes_its_loss_on_the_answers_and_their_eos_alone(prepare):
    trainer, examples = prepare("--use_peft")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for row, example in zip(batch["labels"], examples["train"], strict=False):
        T = len(example.input_ids)
        assert row[:T].tolist() == labels(example)
        assert (row[T:] == IGNORED).all()
    assert len(trainer.eval_dataset) == len(examples["eval"]) == 2


def test_packed_conversations_give_the_loss_of_separate_ones(prepare):
    losses, rows = [], []
    for flags in ((), ("--packing", "--max_length", "256")):
        trainer, examples = prepare("--lora_dropout", "0", *flags)
        batch = trainer.data_collator(list(trainer.train_dataset))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
        rows.append(len(trainer.train_dataset))
    assert rows[1] < rows[0] == len(examples["train"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_the_eval_loss_weighs_all_tokens_alike_whatever_the_batch_size(prepare):
    """It was the mean of batches' means, in which short answers counted for more: 9.685 or 9.128 of one adapter."""
    trainer, examples = prepare("--eval_fraction", "0.4")  # in float32
    trainer.remove_callback(Progress)
    losses, tokens = [], []
    for example in examples["eval"]:
        targets = torch.tensor([labels(example)])
        with torch.no_grad():
            losses.append(trainer.model(torch.tensor([example.input_ids]), labels=targets).loss.item())
        tokens.append(int((targets != IGNORED).sum()))
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert abs(expected - sum(losses) / len(losses)) > 1e-3  # the mean of means is another figure
    for trainer.args.per_device_eval_batch_size in range(1, 9):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_what_the_flags_say_is_what_the_trainer_does(prepare):
    adapter_flags = "--use_peft --lora_r 4 --lora_alpha 12 --lora_dropout 0.25 --target_modules q_proj"
    trainer, _ = prepare(*adapter_flags.split(), "--gradient_accumulation_steps", "3")
    adapter = trainer.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 12, 0.25)
    assert adapter.target_modules == {"q_proj"}
    assert (adapter.use_dora, adapter.use_rslora) == (False, False)
    for flag in ("--use_dora", "--use_rslora"):
        adapter = prepare("--use_peft", flag)[0].model.peft_config["default"]
        assert (adapter.use_dora, adapter.use_rslora) == (flag == "--use_dora", flag == "--use_rslora")
    schedule_flags = (
        "--lr_scheduler_type linear --warmup_ratio 0.5 --optim adamw_torch --weight_decay 0.1 --max_steps 10"
    )
    trainer, _ = prepare("--gradient_accumulation_steps", "3", "--save_steps", "4", *schedule_flags.split())
    assert trainer.args.gradient_accumulation_steps == 3
    assert (trainer.args.save_steps, trainer.args.eval_steps, trainer.args.max_steps) == (4, 4, 10)
    trainer.create_optimizer_and_scheduler(10)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0, 0.1}
    rates = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(11)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.slow
def test_a_nan_loss_is_logged_as_nan(prepare):
    trainer, _ = prepare("--learning_rate", "1e20", "--num_train_epochs", "1")
    trainer.train()
    assert math.isnan(curves.from_log(trainer.state.log_history)[-1]["train loss"])
