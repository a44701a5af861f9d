"""What is kept of a run: run.json for programs, and for people its curves as CSV and PNG and a page of Markdown.

Figures and words come in, files go out; nothing here knows models, data or training.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from llama2_chat.errors import ChatError

COLUMNS = ("step", "epoch", "train loss", "held-out loss", "learning rate")

Curves = list[dict[str, float]]  # a row for each step that has a figure, of those COLUMNS that it has one for


@dataclass(frozen=True)
class Run:
    """What run.json says: enough to find the model and the parts of its data again."""

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
    learnt_sha256: str | None  # splits.fingerprint() of what was learnt; None is not compared


def write_run(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(asdict(run), indent=2) + "\n", "utf-8")


def read_run(folder: Path) -> Run:
    """Raises ChatError if no training has begun in this folder."""
    file = folder / "run.json"
    try:
        return Run(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError as error:
        raise ChatError(f"{folder} holds no run of sft_trainer.py: it has no run.json.") from error
    except (ValueError, TypeError) as error:
        raise ChatError(f"{file} cannot be read ({error}). Train again, or fetch the folder again.") from error


def curves(history: list[dict[str, float]]) -> Curves:
    """The curves in what a Trainer logs."""
    rows: dict[int, dict[str, float]] = {}
    names = {"epoch": "epoch", "loss": "train loss", "eval_loss": "held-out loss", "learning_rate": "learning rate"}
    for entry in history:
        known = {names[name]: value for name, value in entry.items() if name in names}
        if known.keys() - {"epoch"}:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(known)
    return [rows[step] for step in sorted(rows)]


def write_curves(rows: Curves, folder: Path) -> None:
    """curves.png, then curves.csv: where that is, nothing is missing."""
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


def draw_curves(runs: dict[str, Curves], file: Path) -> None:
    """Train and held-out loss and learning rate against steps, for one run or several by name."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    alone = len(runs) == 1
    for number, (run, rows) in enumerate(runs.items()):
        for axes, name, style, color in (
            (losses, "train loss", "-" if alone else ":", 0 if alone else number),
            (losses, "held-out loss", "o-", 1 if alone else number),
            (rates, "learning rate", "-", 2 if alone else number),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                label = name if alone else run if name == "held-out loss" else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", markersize=4, label=label)
    losses.legend()
    losses.set_ylabel(f"loss, per token of an answer{'' if alone else '; dotted: train, marked: held out'}")
    losses.set_ylim(bottom=0)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def mean_and_deviation(values: Iterable[float]) -> str:
    """Of the values, "1.204 ± 0.031"; the deviation is a sample's."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def fall(rows: Curves, name: str) -> str:
    """From where to where a curve went: "2.310 → 1.204, lowest 1.190"."""
    values = [row[name] for row in rows if name in row]
    return f"{values[0]:.3f} → {values[-1]:.3f}, lowest {min(values):.3f}" if values else "not measured"


def write_page(folder: Path, base_repo: str | None, facts: dict[str, str], lines: list[str]) -> None:
    """README.md, so that it is also what the Hub shows of the folder: facts, curves.png, and these lines."""
    front = ["---", *([f"base_model: {base_repo}"] if base_repo else []), "pipeline_tag: text-generation"]
    front += ["tags: [trl, sft]", "---", "", f"# {folder.name}", "", *table(("", ""), facts.items()), ""]
    front += ["![train and held-out loss and learning rate against steps](curves.png)", ""]
    (folder / "README.md").write_text("\n".join([*front, *lines]) + "\n", "utf-8")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table; whatever a cell says stays in its cell."""
    head = list(head)
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"


def cell(value: object) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 300 else f"{text[:300]} …"


def public(name: str) -> str:
    """Of a local path its last part: a report may be published."""
    return Path(name).resolve().name if Path(name).exists() else name
