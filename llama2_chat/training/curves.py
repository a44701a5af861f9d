"""Train loss, eval loss and learning rate against steps: taken from a Trainer's log, kept as CSV, drawn as PNG."""

from __future__ import annotations

import csv
from pathlib import Path

from llama2_chat.errors import ChatError

TRAIN_LOSS, EVAL_LOSS, LEARNING_RATE = "train loss", "eval loss", "learning rate"
TRAIN_MARGIN, EVAL_MARGIN, EVAL_PREFERRED = "train margin", "eval margin", "eval preferred"
COLUMNS = ("step", "epoch", TRAIN_LOSS, EVAL_LOSS, LEARNING_RATE)
OF_PREFERENCES = (TRAIN_MARGIN, EVAL_MARGIN, EVAL_PREFERRED)  # more columns of a training by DPO or KTO
DONE = "curves.csv"  # what a run writes last
LOGGED = {
    "epoch": "epoch",
    "loss": TRAIN_LOSS,
    "eval_loss": EVAL_LOSS,
    "learning_rate": LEARNING_RATE,
    "rewards/margins": TRAIN_MARGIN,
    "eval_rewards/margins": EVAL_MARGIN,
    "eval_rewards/accuracies": EVAL_PREFERRED,
}

Curves = list[dict[str, float]]  # a row for each step that has a figure, of those columns that it has one for


def from_log(history: list[dict[str, float]]) -> Curves:
    """The curves in what a Trainer logs, which is several entries for one step."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        known = {LOGGED[name]: value for name, value in entry.items() if name in LOGGED}
        if known.keys() - {"epoch"}:
            step = int(entry["step"])
            rows.setdefault(step, {"step": step}).update(known)
    return [rows[step] for step in sorted(rows)]


def write_curves(rows: Curves, folder: Path) -> None:
    """curves.png, then curves.csv: if that is there, nothing is missing."""
    draw_curves({"": rows}, folder / "curves.png")
    with (folder / DONE).open("w", newline="") as file:
        more = [name for name in OF_PREFERENCES if values(rows, name)]
        writer = csv.DictWriter(file, [*COLUMNS, *more])
        writer.writeheader()
        writer.writerows(rows)


def read_curves(folder: Path) -> Curves:
    """What write_curves() wrote, or nothing if it wrote nothing here. Raises ChatError if it is damaged."""
    try:
        with (folder / DONE).open(newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ChatError(f"{folder / DONE} cannot be read ({error}). Move it away, or train again.") from error


def remove(folder: Path) -> None:
    """Let the run in this folder no longer be done."""
    (folder / DONE).unlink(missing_ok=True)


def values(rows: Curves, column: str) -> list[float]:
    """Of one column, without the steps that have none."""
    return [row[column] for row in rows if column in row]


def draw_curves(runs: dict[str, Curves], file: Path) -> None:
    """Losses, margins if there are any, and learning rate, one below the other, of one run or of several by name."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    alone, has_margins = len(runs) == 1, any(values(rows, name) for rows in runs.values() for name in OF_PREFERENCES)
    heights = (3, 2, 1) if has_margins else (3, 1)
    figure, (losses, *margins, rates) = pyplot.subplots(
        len(heights), 1, sharex=True, figsize=(8, 2 + sum(heights)), height_ratios=heights
    )
    for number, (run, rows) in enumerate(runs.items()):
        for axes, name, style, color in (
            (losses, TRAIN_LOSS, "-" if alone else ":", 0 if alone else number),
            (losses, EVAL_LOSS, "o-", 1 if alone else number),
            (rates, LEARNING_RATE, "-", 2 if alone else number),
            *((axes, TRAIN_MARGIN, "-" if alone else ":", 0 if alone else number) for axes in margins),
            *((axes, EVAL_MARGIN, "o-", 1 if alone else number) for axes in margins),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                label = name if alone else run if name in (EVAL_LOSS, EVAL_MARGIN) else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", markersize=4, label=label)
    for axes, name in (
        (losses, "loss" if margins else "loss per token of the answers"),
        *((a, "margin") for a in margins),
    ):
        axes.legend()
        axes.set_ylabel(f"{name}{'' if alone else '; dotted: train, with marks: eval'}")
    losses.set_ylim(bottom=0)
    rates.set_ylabel(LEARNING_RATE)
    rates.set_xlabel("step")
    rates.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
