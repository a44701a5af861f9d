"""What was requested of scripts/evaluate_model.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    models: list[str]
    output_dir: Path
    precisions: list[str]  # tasks and sheet use the first
    batch_size: int = 8
    max_length: int | None = None  # tokens of a conversation; None takes the run's
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # questions of each task
    sheet: int | None = None  # questions on the judging sheet; None takes the usual number
    dataset_names: list[str] | None = None  # these five choose other splits than the run's
    reading: dict[str, Any] | None = None  # as run.json has it
    eval_fraction: float | None = None
    test_fraction: float | None = None
    seed: int | None = None

    @property
    def split_flags(self) -> dict[str, Any]:
        """Those given of the flags that decide which conversation is in which split."""
        names = ("dataset_names", "reading", "eval_fraction", "test_fraction", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
