"""run.json: all that decides what a training gives.

By it a run goes on as it began, and an evaluation finds again what was trained on and what was not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama2_chat.errors import ChatError


@dataclass(frozen=True)
class Run:
    model_name: str
    dataset_names: list[str]  # as given; relative to the working directory where they lie below it
    eval_fraction: float
    test_fraction: float
    seed: int
    folds: int  # 0: one training
    fold: int | None  # from 1, in OUTPUT/fold-1 and so on; None in OUTPUT
    max_length: int
    precision: str  # of the base: nf4, int8, bfloat16, float16, float32
    early_stopping: bool  # then the best checkpoint was kept, else the last
    merged_to: str | None
    train_sha256: str | None  # splits.fingerprint() of what was trained on; None if nobody knows
    reading: dict[str, Any] = field(default_factory=dict)  # how the data was read, as row_sources.Reading has it
    eval_sha256: str | None = None  # the same of the eval split
    model_sha256: str | None = None  # fingerprint() of the base's files
    settings: dict[str, Any] = field(default_factory=dict)  # the flags that decide, by name: Options.deciding()
    changes: list[str] = field(default_factory=list)  # what changed in mid-run, by --resume_with_changes, and when
    mixed_data: bool = False  # the data was among it: what is in the eval split now may have been trained on before

    def deciding(self) -> dict[str, Any]:
        """All that must be the same when the run goes on, by its name."""
        hashes = {"model": self.model_sha256, "train data": self.train_sha256, "eval data": self.eval_sha256}
        drawn = {"eval_fraction": self.eval_fraction, "test_fraction": self.test_fraction, "folds": self.folds}
        shape = {"precision": self.precision, "max_length": self.max_length, "seed": self.seed}
        return {
            **{name: (value or "unknown")[:12] for name, value in hashes.items()},
            **drawn,
            **shape,
            "divided": False,
            **self.settings,
        }


def write_run(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(asdict(run), indent=2) + "\n", "utf-8")


def read_run(folder: Path) -> Run:
    """Raises ChatError if no training has begun in this folder."""
    file = folder / "run.json"
    try:
        return Run(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError as error:
        raise ChatError(f"{folder} has no run of sft_trainer.py: there is no run.json.") from error
    except (ValueError, TypeError) as error:
        raise ChatError(f"{file} cannot be read ({error}). Train again, or fetch the folder again.") from error
