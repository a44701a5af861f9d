"""Whether a model has overfitted, in plain words: from the curves of its training and its losses beside its base's.

Figures come in, a sentence goes out; nothing here measures.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from llama2_chat.training.report import Curves

RISE = 0.02  # of the held-out loss above its lowest; less is what it wobbles by from one measurement to the next
FALL = 0.01  # of the held-out loss at the end of a run; less is flat. The learning rate is near 0 there: it says much
END = 0.25  # of a run
CARRIED = 0.5  # of the gain on what was learnt; a model that carries less over to what was not knows it by heart
NEAR = 0.1  # of a run, over which the training loss is averaged: it is that of one batch, and leaps


class Verdict(NamedTuple):
    kind: str  # "overfitting", "astray", "still falling", "nothing learnt", "no overfitting", "unknown"
    sentence: str


class Losses(NamedTuple):
    """Per token, of a model and of the one that it was taught from."""

    base: float
    taught: float

    @property
    def gain(self) -> float:
        return self.base - self.taught


def judge(
    curves: Curves, learnt: Losses | None = None, held_out: Losses | None = None, kept_lowest: bool = False
) -> Verdict:
    """learnt, held_out: None where nobody knows what was learnt.

    kept_lowest: the model is that of the lowest held-out loss rather than of the last step.
    """
    if lost := _lost(curves):
        return Verdict(
            "astray",
            f"The training went astray: at epoch {lost['epoch']:.1f} its loss was no number any more. Lower "
            "--learning_rate.",
        )
    if not all(math.isfinite(sum(losses)) for losses in (learnt, held_out) if losses):
        return Verdict("unknown", "Overfitting cannot be told: a loss is no number in the precision measured first.")
    if sum("held-out loss" in row for row in curves) > 2:
        verdict = _of_curves(curves, kept_lowest)
    elif learnt and held_out:
        return _of_losses(learnt, held_out)
    else:
        return Verdict("unknown", "Overfitting cannot be told: nothing is known to have been held out.")
    if held_out and held_out.gain < -FALL * held_out.base:
        if learnt and verdict.kind in ("no overfitting", "still falling"):
            return _of_losses(learnt, held_out)
        return Verdict(verdict.kind, f"{verdict.sentence} On what is held out it is worse than its base.")
    if learnt and held_out and learnt.gain > FALL * learnt.base:
        return Verdict(verdict.kind, f"{verdict.sentence} {_carried(learnt, held_out)}")
    return verdict


def lowest(curves: Curves) -> dict[str, float] | None:
    """The row of the lowest held-out loss."""
    return min(
        (row for row in curves if math.isfinite(row.get("held-out loss", math.nan))),
        key=lambda row: row["held-out loss"],
        default=None,
    )


def _lost(curves: Curves) -> dict[str, float] | None:
    """The first row in which a loss is no number."""
    both = ("train loss", "held-out loss")
    return next((row for row in curves if not all(math.isfinite(row[name]) for name in both if name in row)), None)


def _of_curves(curves: Curves, kept_lowest: bool) -> Verdict:
    first, *_, last = held_out = [row for row in curves if "held-out loss" in row]
    low = lowest(curves)
    begun, least, ended = (row["held-out loss"] for row in (first, low, last))
    if ended > (1 + RISE) * least:
        then, now = _train_loss(curves, low["step"]), _train_loss(curves, last["step"])
        rose = f"since epoch {low['epoch']:.1f} the held-out loss rose from {least:.2f} to {ended:.2f}"
        if now >= then:
            return Verdict(
                "astray",
                f"The training went astray: {rose}, and the training loss from {then:.2f} to {now:.2f}. Lower "
                "--learning_rate.",
            )
        advice = (
            "The model of that epoch was kept."
            if kept_lowest
            else "--early_stopping keeps the model of that epoch; more conversations put it off."
        )
        return Verdict(
            "overfitting",
            f"Overfitting: {rose}, while the training loss fell from {then:.2f} to {now:.2f}. {advice}",
        )
    if least > (1 - FALL) * begun:
        return Verdict(
            "nothing learnt",
            f"Nothing was learnt that helps with what is held out: its loss stayed at {begun:.2f}. Raise "
            "--learning_rate or --num_train_epochs, or look at the data.",
        )
    before = [begun, *(row["held-out loss"] for row in held_out if row["step"] <= (1 - END) * last["step"])][-1]
    if ended < (1 - FALL) * before:
        return Verdict(
            "still falling",
            f"No overfitting yet: in the last quarter the held-out loss still fell, from {before:.2f} to {ended:.2f}. "
            "Train longer with --num_train_epochs.",
        )
    return Verdict(
        "no overfitting", f"No overfitting: the held-out loss fell from {begun:.2f} to {ended:.2f} and stayed there."
    )


def _train_loss(curves: Curves, step: float) -> float:
    """Around this step."""
    reach = NEAR * curves[-1]["step"] / 2
    rows = [row for row in curves if "train loss" in row]
    near = [row for row in rows if abs(row["step"] - step) <= reach] or [
        min(rows, key=lambda row: abs(row["step"] - step))
    ]
    return sum(row["train loss"] for row in near) / len(near)


def _of_losses(learnt: Losses, held_out: Losses) -> Verdict:
    if learnt.gain <= FALL * learnt.base:
        return Verdict(
            "nothing learnt",
            "Nothing was learnt: on the conversations that it was taught the model is no better than its base.",
        )
    if held_out.gain <= 0:
        return Verdict(
            "overfitting", "Overfitting: better than its base on what it learnt, and worse on what is held out."
        )
    if held_out.gain < CARRIED * learnt.gain:
        return Verdict("overfitting", f"Overfitting: it knows much by heart. {_carried(learnt, held_out)}")
    return Verdict("no overfitting", f"No overfitting. {_carried(learnt, held_out)}")


def _carried(learnt: Losses, held_out: Losses) -> str:
    return (
        f"The loss fell by {learnt.gain:.2f} on what was learnt and by {held_out.gain:.2f} on what is held out: "
        f"{held_out.gain / learnt.gain:.0%} carries over."
    )
