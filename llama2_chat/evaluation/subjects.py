"""The models to measure: found by name before any weights are loaded, then loaded one after another.

A training run gives a base, its adapter or fully trained model, and perhaps a merged model; one with folds gives a base
and an adapter for each fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama2_chat.errors import ChatError
from llama2_chat.loading import load
from llama2_chat.loading.adapters import load_adapter
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.config import read_generation_config
from llama2_chat.loading.hub import fetch_weights
from llama2_chat.loading.memory import visible_gpus
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.named_files import in_home
from llama2_chat.training.base_model import fetch_checkpoint, no_progress
from llama2_chat.training.resources import free_memory
from llama2_chat.training.run_json import Run, read_run


@dataclass(frozen=True)
class Subject:
    """A model to measure: a base, or one that was finetuned from it."""

    name: str
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    fold: int | None = None  # from 1, of a run with folds: which eval split the model is measured on
    base: str | None = None  # the name of the subject that it was finetuned from

    @property
    def is_merged(self) -> bool:
        return self.name.endswith("merged")

    @property
    def stop_ids(self) -> set[int]:
        return load.find_stop_ids(self.tokenizer, read_generation_config(self.checkpoint.base))


# ---- Before the weights ----


def find_runs(models: Sequence[str]) -> dict[str, Run]:
    """What sft_trainer.py wrote about each of the models that it trained."""
    folders = {model: in_home(model) for model in models}
    return {model: _known_run(folder) for model, folder in folders.items() if (folder / "run.json").is_file()}


def _known_run(folder: Path) -> Run:
    """What is known of a run: not what it was trained on, if its data changed in the middle."""
    run = read_run(folder)
    return replace(run, train_sha256=None) if run.mixed_data else run


def has_folds(run: Run) -> bool:
    """Whether the run has a model for each fold, rather than being one of them."""
    return bool(run.folds and not run.fold)


def find_subjects(models: Sequence[str], runs: dict[str, Run]) -> list[Subject]:
    """The models without their weights: each base before what was finetuned from it, merged models last."""
    found: list[Subject] = []
    for model, name in display_names(models).items():
        run = runs.get(model)
        prefix = "" if len(models) == 1 else f"{name}: "
        if run and has_folds(run):
            for fold in range(1, run.folds + 1):
                found += _subjects(f"{model}/fold-{fold}", run, name, prefix, fold, found)
        else:
            found += _subjects(model, run, name, prefix, None, found)
    return found


def display_names(models: Sequence[str]) -> dict[str, str]:
    """What each model is called: a folder by the last part of its path, or by more where two would be called alike."""
    for count in range(1, 9):
        found = {
            model: "/".join(Path(model).resolve().parts[-count:]) if Path(model).exists() else model for model in models
        }
        if len({*found.values()}) == len(models):
            return found
    raise ChatError("One of the models is given twice.")


def _subjects(
    model: str, run: Run | None, name: str, prefix: str, fold: int | None, known: list[Subject]
) -> Iterator[Subject]:
    checkpoint = fetch_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    if checkpoint.adapter:
        base, kind = replace(checkpoint, adapter=None), "adapter"
    elif run:
        base, kind = fetch_checkpoint(run.model_name), "trained"
    else:
        yield Subject(name, checkpoint, tokenizer, fold)
        return
    same = [
        other.name
        for other in known
        if (other.checkpoint.base, other.checkpoint.adapter, other.fold) == (base.base, None, fold)
    ]
    base_name = same[0] if same else f"{prefix}base"
    if not same:  # with the finetuned model's tokenizer and template, or the two would be measured on different tokens
        yield Subject(base_name, base, tokenizer, fold)
    if checkpoint.adapter:
        fetch_weights(checkpoint.adapter, no_progress)
    yield Subject(f"{prefix}{kind}", checkpoint, tokenizer, fold, base_name)
    if run and run.merged_to and Path(run.merged_to).is_dir():
        merged = fetch_checkpoint(run.merged_to)
        yield Subject(f"{prefix}merged", merged, load_tokenizer(merged), fold, base_name)


# ---- The weights ----


def load_in_turn(subjects: list[Subject], precision: str) -> Iterator[tuple[Subject, PreTrainedModel]]:
    """Each subject with its model. Subjects of one base share its weights; only one base is in memory at a time."""
    for folder in dict.fromkeys(subject.checkpoint.base.folder for subject in subjects):
        yield from _load_on_one_base([s for s in subjects if s.checkpoint.base.folder == folder], precision)
        free_memory()


def _load_on_one_base(subjects: list[Subject], precision: str) -> Iterator[tuple[Subject, PreTrainedModel]]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    device = 0 if visible_gpus() else "cpu"
    model = load.load_base(subjects[0].checkpoint, precision, device, no_progress).eval()
    for subject in subjects:
        if not subject.checkpoint.adapter:
            yield subject, model
            continue
        adapted: Any = load_adapter(model, subject.checkpoint).eval()
        yield subject, adapted.get_base_model()
        model = adapted.unload()
        del adapted
