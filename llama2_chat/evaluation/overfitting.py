"""Whether a finetuned model overfits, in plain words: from its training curves and its losses beside its base's.

Figures come in, a sentence goes out; nothing here measures.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from llama2_chat.training.curves import EVAL_LOSS, TRAIN_LOSS, Curves

RISE = 0.02  # of the eval loss above its lowest point; less is noise between one measurement and the next
FALL = (
    0.01  # of the eval loss; less is flat. At the end of a run the learning rate is near 0, so that 1 % is much there
)
END = 0.25  # of a run: the last quarter
GENERALISES = 0.5  # of the gain on the train split; a model that gains less than this on the eval split has memorised
SMOOTHED = 0.1  # of a run, over which the train loss is averaged: each value is that of one batch, and jumps

Kind = Literal["overfitting", "diverged", "still falling", "nothing learned", "no overfitting", "unknown"]


class Assessment(NamedTuple):
    kind: Kind
    sentence: str


class Losses(NamedTuple):
    """Per token, of a model and of its base on one split."""

    base: float
    finetuned: float

    @property
    def gain(self) -> float:
        return self.base - self.finetuned

    @property
    def are_finite(self) -> bool:
        return math.isfinite(self.base) and math.isfinite(self.finetuned)


def assess(
    curves: Curves, on_train: Losses | None = None, on_eval: Losses | None = None, kept_lowest: bool = False
) -> Assessment:
    """Whether the model overfits.

    on_train, on_eval: on these splits; None where nobody knows what the model was trained on.
    kept_lowest: the model is that of the lowest eval loss rather than of the last step.
    """
    if broken := _first_broken_row(curves):
        return Assessment(
            "diverged",
            f"Training diverged: at epoch {broken['epoch']:.1f} the loss became NaN or infinite. Lower "
            "--learning_rate.",
        )
    if not all(losses.are_finite for losses in (on_train, on_eval) if losses):
        return Assessment(
            "unknown", "Overfitting cannot be assessed: in the first precision a loss is NaN or infinite."
        )
    if sum(EVAL_LOSS in row for row in curves) > 2:
        assessment = _from_curves(curves, kept_lowest)
    elif on_train and on_eval:
        return _from_losses(on_train, on_eval)
    else:
        return Assessment("unknown", "Overfitting cannot be assessed: no eval split is known.")
    if on_eval and on_eval.gain < -FALL * on_eval.base:
        if on_train and assessment.kind in ("no overfitting", "still falling"):
            return _from_losses(on_train, on_eval)
        return Assessment(assessment.kind, f"{assessment.sentence} On the eval split it is worse than its base.")
    if on_train and on_eval and on_train.gain > FALL * on_train.base:
        return Assessment(assessment.kind, f"{assessment.sentence} {_generalisation(on_train, on_eval)}")
    return assessment


def lowest_eval_row(curves: Curves) -> dict[str, float] | None:
    """The row with the lowest eval loss; None if no eval loss is finite."""
    rows = (row for row in curves if math.isfinite(row.get(EVAL_LOSS, math.nan)))
    return min(rows, key=lambda row: row[EVAL_LOSS], default=None)


def _first_broken_row(curves: Curves) -> dict[str, float] | None:
    """The first row in which a loss is NaN or infinite."""
    return next(
        (row for row in curves if not all(math.isfinite(row.get(name, 0)) for name in (TRAIN_LOSS, EVAL_LOSS))), None
    )


def _from_curves(curves: Curves, kept_lowest: bool) -> Assessment:
    """curves: all losses are finite, and three or more rows have an eval loss."""
    evals = [row for row in curves if EVAL_LOSS in row]
    lowest = min(evals, key=lambda row: row[EVAL_LOSS])
    first_loss, lowest_loss, last_loss = (row[EVAL_LOSS] for row in (evals[0], lowest, evals[-1]))
    if last_loss > (1 + RISE) * lowest_loss:
        return _of_rising(curves, lowest, evals[-1], kept_lowest)
    if lowest_loss > (1 - FALL) * first_loss:
        return Assessment(
            "nothing learned",
            f"Nothing was learned that helps on the eval split: its loss stayed at {first_loss:.2f}. Raise "
            "--learning_rate or --num_train_epochs, or check the data.",
        )
    before_end = [row[EVAL_LOSS] for row in evals if row["step"] <= (1 - END) * evals[-1]["step"]]
    before = before_end[-1] if before_end else first_loss
    if last_loss < (1 - FALL) * before:
        return Assessment(
            "still falling",
            f"No overfitting yet: in the last quarter the eval loss was still falling, from {before:.2f} to "
            f"{last_loss:.2f}. Train longer with --num_train_epochs.",
        )
    return Assessment(
        "no overfitting",
        f"No overfitting: the eval loss fell from {first_loss:.2f} to {last_loss:.2f} and stayed there.",
    )


def _of_rising(curves: Curves, lowest: dict[str, float], last: dict[str, float], kept_lowest: bool) -> Assessment:
    """Overfitting if the train loss fell while the eval loss rose; if both rose, training diverged."""
    train_then, train_now = _train_loss(curves, lowest["step"]), _train_loss(curves, last["step"])
    rose = f"since epoch {lowest['epoch']:.1f} the eval loss rose from {lowest[EVAL_LOSS]:.2f} to {last[EVAL_LOSS]:.2f}"
    if train_now >= train_then:
        return Assessment(
            "diverged",
            f"Training diverged: {rose}, and the train loss from {train_then:.2f} to {train_now:.2f}. Lower "
            "--learning_rate.",
        )
    advice = "--early_stopping keeps the model of that epoch; more conversations put overfitting off."
    if kept_lowest:
        advice = "The model of that epoch was kept."
    return Assessment(
        "overfitting",
        f"Overfitting: {rose}, while the train loss fell from {train_then:.2f} to {train_now:.2f}. {advice}",
    )


def _train_loss(curves: Curves, step: float) -> float:
    """The mean around this step."""
    reach = SMOOTHED * curves[-1]["step"] / 2
    rows = [row for row in curves if TRAIN_LOSS in row]
    near = [row for row in rows if abs(row["step"] - step) <= reach]
    near = near or [min(rows, key=lambda row: abs(row["step"] - step))]
    return sum(row[TRAIN_LOSS] for row in near) / len(near)


def _from_losses(on_train: Losses, on_eval: Losses) -> Assessment:
    if on_train.gain <= FALL * on_train.base:
        return Assessment(
            "nothing learned", "Nothing was learned: even on its train split the model is no better than its base."
        )
    if on_eval.gain <= 0:
        return Assessment(
            "overfitting", "Overfitting: better than its base on the train split, and worse on the eval split."
        )
    if on_eval.gain < GENERALISES * on_train.gain:
        return Assessment("overfitting", f"Overfitting: much of it is memorised. {_generalisation(on_train, on_eval)}")
    return Assessment("no overfitting", f"No overfitting. {_generalisation(on_train, on_eval)}")


def _generalisation(on_train: Losses, on_eval: Losses) -> str:
    return (
        f"The loss fell by {on_train.gain:.2f} on the train split and by {on_eval.gain:.2f} on the eval split: "
        f"{on_eval.gain / on_train.gain:.0%} carries over."
    )
