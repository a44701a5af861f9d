"""One training, and all that is kept of it: weights, checkpoints, run.json, answers, curves and a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from llama2_chat.errors import ChatError
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.memory import visible_gpus
from llama2_chat.training import card, curves, report
from llama2_chat.training.answers import Question, answer, choose_questions
from llama2_chat.training.base_model import BaseModel, load_for_training, mend_generation_config
from llama2_chat.training.chat_data import SPLITS, Conversation
from llama2_chat.training.checkpoints import find_checkpoint, is_done
from llama2_chat.training.examples import mark_answers, tokenize
from llama2_chat.training.options import Options
from llama2_chat.training.preferences import Compared, mark_compared, tokenize_compared
from llama2_chat.training.processes import is_divided, is_main_process, print_lines, processes
from llama2_chat.training.resources import let_others_read, memory_gb
from llama2_chat.training.run_json import Run, read_run, write_run
from llama2_chat.training.splits import Splits
from llama2_chat.training.trainer import make_trainer

SHOWN_EXAMPLES = 3
ANSWERS = "answers.json"  # those before training, which a resumed run cannot ask for any more


def train_one(options: Options, run: Run, splits: Splits, base: BaseModel) -> list[list[int]]:
    """Train one model into options.output_dir. Returns the ids of two conversations that it was trained on."""
    checkpoint = find_checkpoint(options.output_dir, options.goes_on)
    examples = tokenize_splits(options, splits, base)
    samples = [example.input_ids for example in examples["train"][:2]]
    if is_done(options.output_dir) and read_run(options.output_dir).changes == run.changes:
        curves.read_curves(options.output_dir)  # raises what speaks against them
        print_lines(f"{options.output_dir} is done.")
        return samples
    print_lines(*(f"Changed: {change}." for change in run.changes))
    if run.fold in (None, 1):
        show_examples(examples, base, SHOWN_EXAMPLES)

    device = processes().local_process_index if visible_gpus() else "cpu"
    model = load_for_training(base.checkpoint, run.precision, device, is_divided())
    if not options.use_peft:
        print_lines(*filter(None, [mend_generation_config(model)]))
    if not base.checkpoint.adapter:
        _check_layers(model, options)
    questions = choose_questions(splits, base.tokenizer, options.max_length)
    if is_main_process():
        curves.remove(options.output_dir)  # of a run that was done, and goes on for longer
        write_run(run, options.output_dir)
        file = options.output_dir / ANSWERS
        if not (checkpoint and file.is_file()):
            before = _answer(model, base, questions, options.batch_size)
            file.write_text(json.dumps(before, ensure_ascii=False, indent=1), "utf-8")
    trainer = make_trainer(options, model, base.tokenizer, examples, resumed=checkpoint is not None)
    figures = _train(trainer, checkpoint)
    trained: Any = trainer.model
    if is_divided() or is_main_process():  # a divided model answers only while all processes ask it
        after = _answer(trained, base, questions, options.batch_size)
    if is_main_process():
        let_others_read(options.output_dir)
        if options.use_peft:
            _name_base(options.output_dir, base.checkpoint)
        before = json.loads((options.output_dir / ANSWERS).read_text("utf-8"))
        rows = curves.from_log(trainer.state.log_history)
        sizes = {split: len(examples[split]) for split in SPLITS}
        answers = zip(questions, before, after, strict=True)
        report.write_report(subject_of(base, run, options), sizes, rows, figures, answers)
        card.pass_on_files(base.checkpoint.base.folder, options.output_dir)
        curves.write_curves(rows, options.output_dir)  # last: a run that has them is done
        print_lines(f"\nThe report is {options.output_dir / 'README.md'}.")
    return samples


def subject_of(base: BaseModel, run: Run, options: Options) -> report.Subject:
    files = base.checkpoint.base
    return report.Subject(base.checkpoint.model_id, files.repo, run, options, files.folder)


def tokenize_rows(options: Options, rows: list[Conversation], base: BaseModel) -> tuple[list[Any], list[str]]:
    """TokenizedExamples, or Compared ones for DPO and KTO, and notes."""
    tokenize_them: Any = tokenize if options.method == "sft" else tokenize_compared
    return tokenize_them(rows, base.tokenizer, base.stop_ids, options.max_length)


def tokenize_splits(options: Options, splits: Splits, base: BaseModel) -> dict[str, list[Any]]:
    """By split. Raises ChatError if nothing is left to train on, or to measure on where that is needed."""
    examples = {}
    for split in SPLITS:
        rows = getattr(splits, split)
        if split == "train":
            rows = [row for row in rows for _ in range(row.copies)]
        examples[split], notes = tokenize_rows(options, rows, base)
        if rows:
            tokens = sum(len(example.input_ids) for example in examples[split])
            print_lines(f"{split}: {len(examples[split]):,} conversations, {tokens:,} tokens.", *notes)
    if not examples["train"]:
        raise ChatError("Nothing is left to train on. Raise --max_length, or look at the rows named above.")
    if options.early_stopping and not examples["eval"]:
        raise ChatError("--early_stopping needs an eval split. Raise --eval_fraction, or give more data.")
    return examples


def show_examples(examples: dict[str, list[Any]], base: BaseModel, number: int) -> None:
    """The first of the train split, as the model will see them."""
    for example in examples["train"][:number]:
        mark = mark_compared if isinstance(example, Compared) else mark_answers
        print_lines(f"\n{mark(example, base.tokenizer)}")
    print_lines("\n⟦ ⟧ marks what the loss is computed on.\n")


def _check_layers(model: PreTrainedModel, options: Options) -> None:
    """Raise ChatError for a layer that the model lacks, as PEFT ignores a misspelt one beside others, and for the head.

    TRL computes the loss from the head's weights themselves, past an adapter.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    if head is not None and {*names, *(name.rpartition(".")[2] for name in names)} & {*options.target_modules}:
        raise ChatError(
            f"--target_modules: the output head, {names[0]}, cannot have an adapter. --modules_to_save trains it."
        )
    layers = [f".{name}" for name, _ in model.named_modules()]
    for flag in ("target_modules", "modules_to_save"):
        for name in getattr(options, flag):
            is_all = flag == "target_modules" and name == "all-linear"
            if not is_all and not any(layer.endswith(f".{name}") for layer in layers):
                raise ChatError(f"--{flag}: the model has no layer called {name}.")


def _answer(model: PreTrainedModel, base: BaseModel, questions: list[Question], batch_size: int) -> list[str]:
    rows = [question.row for question in questions]
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [text for batch in batches for text in answer(model, base.tokenizer, batch, base.stop_ids)]


def _train(trainer: Trainer, checkpoint: Path | None) -> dict[str, str]:
    """Train and save. Returns the time and the memory that it took, for the report."""
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    minutes = (time.perf_counter() - started) / 60
    trainer.save_model()
    memory = "GPU memory, at most" if visible_gpus() else "memory, at the end"
    name = "time since --resume" if checkpoint else "time"
    return {name: f"{minutes:.1f} minutes", memory: f"{memory_gb():.1f} GB"}


def _name_base(adapter: Path, checkpoint: Checkpoint) -> None:
    """Let the adapter name its base as people do, not by the folder where this machine keeps it."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    if checkpoint.adapter:  # what was trained on names it already
        began = json.loads((checkpoint.adapter.folder / "adapter_config.json").read_text("utf-8"))
        name = began["base_model_name_or_path"]
    elif checkpoint.is_embedded:
        name = checkpoint.model_id
    else:
        name = checkpoint.base.repo or str(checkpoint.base.folder.absolute())
    file.write_text(json.dumps(config | {"base_model_name_or_path": name}, indent=2), "utf-8")
