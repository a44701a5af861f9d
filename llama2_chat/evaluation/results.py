"""Everything that an evaluation found, and evaluation.json of it.

report.py makes a page of Markdown of it and figure.py a figure. Nothing here knows how anything was measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from llama2_chat.evaluation import overfitting
from llama2_chat.evaluation.harness import Score
from llama2_chat.evaluation.overfitting import Assessment, Losses
from llama2_chat.evaluation.perplexity import Measurement, bootstrap_interval, exp
from llama2_chat.training.chat_data import SPLITS
from llama2_chat.training.curves import Curves
from llama2_chat.training.markdown import public
from llama2_chat.training.run_json import Run


class Finetuned(NamedTuple):
    """Which model was finetuned from which base, and its curves."""

    model: str
    base: str
    fold: int | None
    curves: Curves
    kept_lowest: bool  # whether the model of the lowest eval loss was kept, rather than the last
    knows_splits: bool  # whether the train split is what the model was trained on, and the others are not


class Comparison(NamedTuple):
    """A finetuned model's perplexity as a multiple of its base's, with its 95 % interval."""

    split: str
    ratio: float
    low: float
    high: float


@dataclass
class Results:
    title: str
    run: Run
    finetuned: list[Finetuned]
    measured: list[Measurement] = field(default_factory=list)
    scores: dict[str, list[Score]] = field(default_factory=dict)  # by model
    notes: list[str] = field(default_factory=list)
    has_sheet: bool = False

    def add_scores(self, model: str, scores: list[Score], faults: list[str]) -> None:
        if scores:
            self.scores[model] = scores
        self.notes += [f"{model}: {fault}" for fault in faults]

    def assessments(self) -> list[Assessment]:
        """One for each of self.finetuned, by the first precision that it was measured in."""
        return [self._assess(finetuned) for finetuned in self.finetuned]

    def compare(self, finetuned: Finetuned) -> list[Comparison]:
        """The model beside its base on the eval and test splits, as far as both read the same conversations there."""
        found = []
        for split in SPLITS[1:]:
            model = self._first(finetuned.model, finetuned.fold, split)
            base = self._first(finetuned.base, finetuned.fold, split)
            if model and base and model.conversations == base.conversations:
                interval = bootstrap_interval(model.losses, base.losses)
                if interval:
                    found.append(Comparison(split, exp(model.loss - base.loss), *interval))
        return found

    def to_json(self) -> str:
        return json.dumps(_plain(self._everything()), indent=1) + "\n"

    def _everything(self) -> dict[str, Any]:
        run = asdict(self.run)
        for name in ("model_name", "merged_to"):
            run[name] = run[name] and public(run[name])
        run["dataset_names"] = list(map(public, self.run.dataset_names))
        return {
            "run": run,
            "overfitting": [
                {"model": finetuned.model, "fold": finetuned.fold, **assessment._asdict()}
                for finetuned, assessment in zip(self.finetuned, self.assessments(), strict=True)
            ],
            "perplexity": [_figures(row) for row in self.measured],
            "tasks": {model: [score._asdict() for score in scores] for model, scores in self.scores.items()},
            "notes": self.notes,
        }

    def _assess(self, finetuned: Finetuned) -> Assessment:
        on_train, on_eval = (self._losses(finetuned, split) for split in SPLITS[:2])
        if self.run.reading.get("method", "sft") != "sft":  # its loss is another: good answers may well become rarer
            on_train = on_eval = None
        return overfitting.assess(finetuned.curves, on_train, on_eval, finetuned.kept_lowest)

    def _losses(self, finetuned: Finetuned, split: str) -> Losses | None:
        base = self._first(finetuned.base, finetuned.fold, split)
        model = self._first(finetuned.model, finetuned.fold, split)
        return Losses(base.loss, model.loss) if base and model and finetuned.knows_splits else None

    def _first(self, model: str, fold: int | None, split: str) -> Measurement | None:
        """In the first precision."""
        rows = (row for row in self.measured if (row.model, row.fold, row.split) == (model, fold, split))
        return next(rows, None)


def _figures(row: Measurement) -> dict[str, Any]:
    return {
        "model": row.model,
        "precision": row.precision,
        "fold": row.fold,
        "split": row.split,
        "conversations": row.conversations,
        "tokens": row.tokens,
        "loss": row.loss,
        "perplexity": row.perplexity,
        "interval": row.interval,
        "seconds": round(row.seconds, 2),
        "memory_gb": round(row.memory_gb, 2),
    }


def _plain(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
