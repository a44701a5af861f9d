"""Train loss, eval loss and learning rate against steps: taken from a Trainer's log, kept as CSV, drawn as PNG."""

from __future__ import annotations

import csv
from pathlib import Path

from llama2_chat.errors import ChatError

TRAIN_LOSS, EVAL_LOSS, LEARNING_RATE = "train loss", "eval loss", "learning rate"
COLUMNS = ("step", "epoch", TRAIN_LOSS, EVAL_LOSS, LEARNING_RATE)
LOGGED = {"epoch": "epoch", "loss": TRAIN_LOSS, "eval_loss": EVAL_LOSS, "learning_rate": LEARNING_RATE}

Curves = list[dict[str, float]]  # a row for each step that has a figure, of those COLUMNS that it has one for


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
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_curves(folder: Path) -> Curves:
    """What write_curves() wrote, or nothing if it wrote nothing here. Raises ChatError if it is damaged."""
    try:
        with (folder / "curves.csv").open(newline="") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ChatError(f"{folder / 'curves.csv'} cannot be read ({error}). Move it away, or train again.") from error


def remove(folder: Path) -> None:
    """Let the run in this folder no longer be done."""
    (folder / "curves.csv").unlink(missing_ok=True)


def values(rows: Curves, column: str) -> list[float]:
    """Of one column, without the steps that have none."""
    return [row[column] for row in rows if column in row]


def draw_curves(runs: dict[str, Curves], file: Path) -> None:
    """Losses above, learning rate below, of one run or of several by name."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    alone = len(runs) == 1
    for number, (run, rows) in enumerate(runs.items()):
        for axes, name, style, color in (
            (losses, TRAIN_LOSS, "-" if alone else ":", 0 if alone else number),
            (losses, EVAL_LOSS, "o-", 1 if alone else number),
            (rates, LEARNING_RATE, "-", 2 if alone else number),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                label = name if alone else run if name == EVAL_LOSS else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", markersize=4, label=label)
    losses.legend()
    losses.set_ylabel(f"loss per token of the answers{'' if alone else '; dotted: train, with marks: eval'}")
    losses.set_ylim(bottom=0)
    rates.set_ylabel(LEARNING_RATE)
    rates.set_xlabel("step")
    rates.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
