"""run.json: which model was trained on which splits of which data, so that an evaluation finds them again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from llama2_chat.errors import ChatError


@dataclass(frozen=True)
class Run:
    model_name: str
    dataset_name: str  # as given; relative to the working directory where it lies below it
    eval_fraction: float
    test_fraction: float
    seed: int
    folds: int  # 0: one training
    fold: int | None  # from 1, in OUTPUT/fold-1 and so on; None in OUTPUT
    max_length: int
    precision: str  # of the base: nf4, int8, bfloat16, float16, float32
    early_stopping: bool  # then the best checkpoint was kept, else the last
    merged_to: str | None
    train_sha256: str | None  # splits.fingerprint() of what was trained on; None is not compared


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
