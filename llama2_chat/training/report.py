"""README.md of a run or of its folds: one page of Markdown, which is also what the Hub shows of the folder."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.training import card
from llama2_chat.training.curves import (
    EVAL_LOSS,
    EVAL_MARGIN,
    EVAL_PREFERRED,
    TRAIN_LOSS,
    Curves,
    draw_curves,
    read_curves,
    values,
)
from llama2_chat.training.examples import said
from llama2_chat.training.markdown import public, table

if TYPE_CHECKING:
    from llama2_chat.training.answers import Question
    from llama2_chat.training.options import Options
    from llama2_chat.training.run_json import Run
    from llama2_chat.training.splits import Splits


class Subject(NamedTuple):
    """What was trained, and how."""

    model: str
    repo: str | None  # of the base, on the Hub
    run: Run
    options: Options
    base_folder: Path  # where the base lies


def write_report(
    subject: Subject,
    sizes: Mapping[str, int],
    rows: Curves,
    figures: Mapping[str, str],
    answers: Iterable[tuple[Question, str, str]],
) -> None:
    """The page of one training.

    sizes: conversations of each split. figures: time and memory. answers: each question, the answer before, and after.
    """
    facts = {
        **_settings(subject),
        "conversations": ", ".join(f"{size:,} {split}" for split, size in sizes.items() if size),
        TRAIN_LOSS: describe_loss(values(rows, TRAIN_LOSS)),
        EVAL_LOSS: describe_loss(values(rows, EVAL_LOSS)),
        **_preferences(rows),
        **figures,
    }
    cells = [
        (said(row.messages[-2]), split, said(row.messages[-1]), before, after)
        for (split, row), before, after in answers
    ]
    _write_page(subject, facts, table(("question", "split", "expected", "before", "after"), cells) if cells else [])


def _preferences(rows: Curves) -> dict[str, str]:
    """What DPO and KTO reached on the eval split."""
    margins, preferred = values(rows, EVAL_MARGIN), values(rows, EVAL_PREFERRED)
    found = (
        {EVAL_MARGIN: f"{margins[0]:.3f} → {margins[-1]:.3f}, beta × what good answers gained over bad ones"}
        if margins
        else {}
    )
    if preferred:
        found[EVAL_PREFERRED] = f"{preferred[-1]:.0%} of the answers moved as they should"
    return found


def write_folds_report(subject: Subject, folds: Sequence[Splits]) -> str:
    """The page of all folds together, and their curves. Returns the eval loss before and after, in words."""
    folder = subject.options.output_dir
    curves = {f"fold {i}": read_curves(folder / f"fold-{i}") for i in range(1, len(folds) + 1)}
    draw_curves(curves, folder / "curves.png")
    losses = [values(rows, EVAL_LOSS) for rows in curves.values()]
    measured = [(own[0], own[-1], min(own)) for own in losses]
    before, after, lowest = map(mean_and_deviation, zip(*measured, strict=True))
    eval_loss = f"{before} before, {after} after, mean ± standard deviation"
    rows = [
        (name, len(splits.train), len(splits.eval), *(f"{value:.3f}" for value in own))
        for name, splits, own in zip(curves, folds, measured, strict=True)
    ]
    head = (EVAL_LOSS, "train", "eval", "before", "after", "lowest")
    lines = table(head, [*rows, ("mean ± standard deviation", "", "", before, after, lowest)])
    _write_page(subject, _settings(subject) | {EVAL_LOSS: eval_loss}, lines)
    return eval_loss


def mean_and_deviation(values: Iterable[float]) -> str:
    """Of the values, "1.204 ± 0.031"; the deviation is a sample's."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def describe_loss(values: list[float]) -> str:
    """From where to where it went: "2.310 → 1.204, lowest 1.190"."""
    return f"{values[0]:.3f} → {values[-1]:.3f}, lowest {min(values):.3f}" if values else "not measured"


def _settings(subject: Subject) -> dict[str, str]:
    """What was used, all of it, and what of it was not from the beginning."""
    options, run = subject.options, subject.run
    kind = f"{'rs' * options.use_rslora}{'DoRA' if options.use_dora else 'LoRA'}"
    lora = f"{kind} of rank {options.lora_r}, alpha {options.lora_alpha}, dropout {options.lora_dropout:g}"
    whole = f" and all of {' '.join(options.modules_to_save)}" if options.modules_to_save else ""
    method = f"{lora}, in {' '.join(options.target_modules)}{whole}," if options.use_peft else "all weights"
    processes = run.settings.get("processes", 1)
    length = f"{options.max_steps:,} steps" if options.max_steps else f"{options.num_train_epochs:g} epochs"
    has_warmup = options.lr_scheduler_type != "constant"
    warmup = f" after a warm-up of {options.warmup_ratio:.0%} of the steps" if has_warmup else ""
    batch = f"batch {options.batch_size} × {options.gradient_accumulation_steps}"
    rows = {
        "model": f"{public(subject.model)}, {method} on {run.precision}",
        "data": ", ".join(_data(options)),
        "settings": f"{length}, {batch}{f' × {processes} processes' * (processes > 1)}, "
        f"learning rate {options.learning_rate:g}, {options.max_length:,} tokens{', packed' * options.packing}, "
        f"seed {options.seed}",
        "schedule": f"{options.lr_scheduler_type}{warmup}, {options.optim}, weight decay {options.weight_decay:g}",
    }
    if options.method != "sft":
        rows["method"] = f"{options.method.upper()}, beta {options.beta:g}"
    if options.early_stopping:
        rows["stops"] = f"when the eval loss has not fallen {options.early_stopping} times in a row; the best is kept"
    if run.changes:
        rows["changed in mid-run"] = "; ".join(run.changes)
    if run.mixed_data:
        rows["the eval split"] = "may hold conversations that were trained on before the data changed"
    return rows


def _data(options: Options) -> Iterator[str]:
    for name, weight in zip(options.dataset_names, options.dataset_weights or repeat(1.0), strict=False):
        yield f"{public(name)}{f' × {weight:g}' * (weight != 1)}"


def _write_page(subject: Subject, facts: Mapping[str, str], lines: list[str]) -> None:
    """Facts, curves.png, and these lines, below the front matter that the Hub reads."""
    folder: Path = subject.options.output_dir
    front = [*card.front_matter(subject), "", f"# {folder.name}", "", *table(("", ""), facts.items()), ""]
    front += ["![train and eval loss and learning rate against steps](curves.png)", ""]
    (folder / "README.md").write_text("\n".join([*front, *lines, *card.licence_lines(subject)]) + "\n", "utf-8")
