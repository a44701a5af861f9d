"""The conversations that models are measured on: which run's splits, how many of them, and encoded for each model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.evaluation.options import Options
from llama2_chat.evaluation.subjects import Subject, has_folds
from llama2_chat.training import splits
from llama2_chat.training.chat_data import SPLITS, Conversation
from llama2_chat.training.examples import Examples, tokenize
from llama2_chat.training.run_json import Run
from llama2_chat.training.splits import Splits


def find_splits(runs: dict[str, Run], options: Options) -> tuple[Run, list[Splits]]:
    """The run whose splits all models are measured on, and these splits, one for each fold.

    Raises ChatError if the data has changed since the run, or if the models cannot be compared fairly.
    """
    run = _choose_run(runs, options)
    try:
        folds = splits.find_again(run)
    except ChatError:
        if not options.dataset_names or options.reading or not run.reading:
            raise
        run = replace(run, reading={})  # other data than the run's, which need not have its columns or method
        folds = splits.find_again(run)
    fingerprint = splits.fingerprint(folds)
    if run.train_sha256 is None and {own.train_sha256 for own in runs.values()} == {fingerprint}:
        run = replace(run, train_sha256=fingerprint)  # the flags name the data that the models were trained on
    return run, folds


def _choose_run(runs: dict[str, Run], options: Options) -> Run:
    """The run of the models, changed as the flags say."""
    flags, first_model = options.split_flags, options.models[0]
    if any(map(has_folds, runs.values())) and (len(options.models) > 1 or options.tasks or options.sheet):
        raise ChatError(
            "A run with folds is measured by itself, without --tasks and --sheet. For more, name one of its folds."
        )
    if len({run.train_sha256 for run in runs.values()}) > 1 and not flags:
        raise ChatError(
            f"{' and '.join(runs)} were trained on different conversations. Choose with --dataset_name what to compare "
            "them on; none of them may have been trained on its eval and test splits."
        )
    if runs:
        run = next(iter(runs.values()))
    elif options.dataset_names:
        run = _unknown_run(first_model, options.dataset_names, options.precisions[0])
    elif Path(first_model).is_dir():
        raise ChatError(f"{first_model} has no run.json that names its eval split. Give --dataset_name.")
    else:
        raise ChatError(
            f"There is no folder {first_model} here, and a model on the Hub has no run.json that names its eval split. "
            "Give --dataset_name for one of those."
        )
    if flags:
        run = replace(run, **flags, train_sha256=None)
    return replace(run, max_length=options.max_length or run.max_length)


def _unknown_run(model: str, dataset_names: list[str], precision: str) -> Run:
    """Of a model that sft_trainer.py did not train: the splits that it would make of the data."""
    return Run(
        model_name=model,
        dataset_names=dataset_names,
        eval_fraction=0.1,
        test_fraction=0.0,
        seed=0,
        folds=0,
        fold=None,
        max_length=1024,
        precision=precision,
        early_stopping=False,
        merged_to=None,
        train_sha256=None,
    )


def encode(subject: Subject, folds: list[Splits], run: Run) -> Examples:
    """What the subject is measured on, as its tokenizer reads it; no split of it is empty. folds: one for each."""
    of_fold = folds[(subject.fold or 1) - 1]
    encoded = {}
    rows_by_split = (_train_sample(of_fold, run.seed), of_fold.eval, of_fold.test)
    for split, rows in zip(SPLITS, rows_by_split, strict=True):
        good = [row for row in rows if row.is_wanted]
        examples, _ = tokenize(good, subject.tokenizer, subject.stop_ids, run.max_length)
        if examples:
            encoded[split] = examples
    if not encoded:
        raise ChatError(f"No conversation fits into {run.max_length:,} tokens. Raise --max_length.")
    return encoded


def _train_sample(fold: Splits, seed: int) -> list[Conversation]:
    """At most as many of the train split as there are in the others: more would take long and add little."""
    size = len(fold.eval) + len(fold.test)
    return random.Random(seed).sample(fold.train, size) if 0 < size < len(fold.train) else fold.train


def data_notes(run: Run, folds: list[Splits]) -> Iterator[str]:
    """What a reader of the figures should know about the data."""
    if not run.train_sha256:
        yield (
            "It is not known which of these conversations the models were trained on: the splits are those that "
            "sft_trainer.py would make of the data."
        )
    if len(sample := _train_sample(folds[0], run.seed)) < len(folds[0].train):
        yield f"Of the {len(folds[0].train):,} conversations in the train split, {len(sample):,} are measured."
