"""The flags of scripts/train_draft.py, checked. Nothing heavy is imported here: --help is immediate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.loading import EMBEDDED

HELP = {
    "--model": "Hub id or folder of the model to guess for",
    "--output_dir": "where the head, its answers and its figures go",
    "--answers": "how many answers the model makes to be learned from",
    "--answers_files": "answers.npz of earlier runs, to be learned from; then none are made",
    "--start_from": "folder of a head that is trained further, with its own vocabulary, instead of a new one",
    "--max_new_tokens": "of each of these answers",
    "--max_batch": "answers made at once; 0 for as many as there is memory for, up to 2,048 on a GPU and 16 on a CPU",
    "--answer_minutes": "of making answers, at most; 0 for no limit",
    "--minutes": "of training, at most; 0 for no limit",
    "--vocabulary": "tokens among which the head guesses, the most frequent ones in the answers; 0 for all",
    "--epochs": "times that all answers are learned from",
    "--learning_rate": "at its highest",
    "--batch_tokens": "tokens of one training step",
    "--max_length": "tokens of a prompt with its answer; what comes later is left out",
    "--guesses": "in a row that are trained for",
    "--held_out": "answers that are not learned from, on which the head is measured",
    "--seed": "of questions, answers and training",
}


@dataclass(frozen=True)
class DraftOptions:
    """What to train a head on, and how. Raises ChatError for what makes no sense."""

    model: str = EMBEDDED
    output_dir: Path = Path("trained/draft")
    answers: int = 2000
    answers_files: Sequence[Path] = ()
    start_from: Path | None = None
    max_new_tokens: int = 320
    max_batch: int = 0
    answer_minutes: float = 0.0
    minutes: float = 0.0
    vocabulary: int = 6144
    epochs: float = 8.0
    learning_rate: float = 1e-3
    batch_tokens: int = 2048
    max_length: int = 640
    guesses: int = 5
    held_out: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_batch", "answer_minutes", "minutes", "vocabulary", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ChatError(f"--{name} must be 0 or more; it was {getattr(self, name)}.")
        for name in ("max_new_tokens", "epochs", "learning_rate", "guesses", "held_out"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ChatError(f"--{name} must be above 0; it was {getattr(self, name)}.")
        if not 2 <= self.max_length <= self.batch_tokens:
            raise ChatError(f"--max_length must be from 2 to --batch_tokens; it was {self.max_length}.")
        if self.answers <= self.held_out:
            raise ChatError(f"--answers must be more than the {self.held_out} held out; it was {self.answers}.")
        if self.start_from and not (self.start_from / "config.json").is_file():
            raise ChatError(
                f"There is no head in {self.start_from}: --start_from is an --output_dir of an earlier run."
            )
        for file in self.answers_files:
            if not file.is_file():
                raise ChatError(f"There is no file {file}: --answers_files are answers.npz of earlier runs.")
