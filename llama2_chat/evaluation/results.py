"""What an evaluation found, as evaluation.json for programs and as a page of Markdown and a figure for people.

Losses and scores come in, files go out; nothing here knows models or how anything was measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llama2_chat.evaluation import judging, verdict
from llama2_chat.evaluation.harness import Score
from llama2_chat.evaluation.verdict import Losses, Verdict
from llama2_chat.training import report
from llama2_chat.training.report import Curves, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("learnt", "held out", "test")
RESAMPLES = 1000  # of the conversations, for an interval of 95 %


class Taught(NamedTuple):
    """Which model was taught from which, and how its loss went meanwhile."""

    model: str
    base: str
    fold: int | None
    curves: Curves
    kept_lowest: bool
    learnt_known: bool  # whether the part that is called learnt was, and the others were not


@dataclass(frozen=True)
class Measured:
    """A model's losses in one precision on one part of the conversations."""

    model: str
    precision: str
    fold: int | None  # from 1, of a run with folds
    part: str
    losses: np.ndarray  # [conversations, 2]: the sum over the tokens of the answers, and how many they are
    seconds: float
    memory_gb: float

    @property
    def loss(self) -> float:
        """Per token, each of which counts alike."""
        total, tokens = self.losses.sum(0)
        return float(total / tokens)

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The perplexity's, of 95 %; a single conversation gives none."""
        return _interval(self.losses)


@dataclass
class Results:
    title: str
    run: Run
    taught: list[Taught]
    measured: list[Measured] = field(default_factory=list)
    scores: dict[str, list[Score]] = field(default_factory=dict)  # by model
    notes: list[str] = field(default_factory=list)
    has_sheet: bool = False

    def write(self, folder: Path) -> None:
        """evaluation.json, evaluation.md and evaluation.png, of as much as there is."""
        (folder / "evaluation.json").write_text(json.dumps(_plain(self._everything()), indent=1) + "\n", "utf-8")
        (folder / "evaluation.md").write_text("\n".join(self.page()) + "\n", "utf-8")
        self._draw(folder / "evaluation.png")

    def verdicts(self) -> list[Verdict]:
        """One for each model that was taught, by the first precision that it was measured in."""
        return [self._verdict(taught) for taught in self.taught]

    def page(self) -> list[str]:
        lines = [f"# {self.title}", ""]
        many = len(self.taught) > 1
        for taught, (_, sentence) in zip(self.taught, self.verdicts(), strict=True):
            name = f"fold {taught.fold}" if taught.fold else taught.model
            lines.append(f"- {name}: {sentence}" if many else sentence)
        lines += ["", "![training and held-out loss; loss by model and part](evaluation.png)", ""]
        lines += ["## Perplexity of the answers", "", *self._perplexities()]
        if self.scores:
            lines += ["", "## lm-evaluation-harness", "", *self._scores()]
        if self.has_sheet:
            lines += [
                "",
                "## For people to judge",
                "",
                f"`{judging.SHEET}` holds questions with two answers each, `{judging.RUBRIC}` how to mark them, and "
                f"`{judging.KEY}`, which is not for judges, who gave which. "
                "`python scripts/evaluate_model.py --judged` counts the sheets that are filled in.",
            ]
        return [*lines, *(line for note in self.notes for line in ("", note))]

    def _everything(self) -> dict[str, Any]:
        run = asdict(self.run)
        for name in ("model_name", "dataset_name", "merged_to"):
            run[name] = run[name] and report.public(run[name])
        kinds = [
            {"model": taught.model, "fold": taught.fold, **verdict._asdict()}
            for taught, verdict in zip(self.taught, self.verdicts(), strict=True)
        ]
        return {
            "run": run,
            "verdicts": kinds,
            "perplexity": [
                {
                    "model": row.model,
                    "precision": row.precision,
                    "fold": row.fold,
                    "part": row.part,
                    "conversations": len(row.losses),
                    "tokens": int(row.losses[:, 1].sum()),
                    "loss": row.loss,
                    "perplexity": row.perplexity,
                    "interval": row.interval,
                    "seconds": round(row.seconds, 2),
                    "memory_gb": round(row.memory_gb, 2),
                }
                for row in self.measured
            ],
            "tasks": {model: [score._asdict() for score in scores] for model, scores in self.scores.items()},
            "notes": self.notes,
        }

    # ---- Perplexity ----

    def _perplexities(self) -> Iterator[str]:
        rows: dict[tuple[str, str], list[Measured]] = {}
        for row in self.measured:
            rows.setdefault((row.model, row.precision), []).append(row)
        parts = [part for part in PARTS if any(row.part == part for row in self.measured)]
        head = ("model", "precision", *parts, "seconds", "memory")
        yield from report.table(
            head,
            (
                (
                    *name,
                    *(_cell([row for row in its if row.part == part]) for part in parts),
                    f"{sum(row.seconds for row in its):.1f}",
                    f"{max(row.memory_gb for row in its):.1f} GB",
                )
                for name, its in rows.items()
            ),
        )
        yield ""
        if any(row.fold for row in self.measured):
            yield f"Mean ± standard deviation over {self.run.folds} folds, each measured on what it left out."
        else:
            yield (
                f"Each token of an answer counts alike. In brackets: 95 %, by drawing the conversations {RESAMPLES:,} "
                "times anew."
            )
        yield ""
        for part in parts:
            sizes = [_size([row for row in its if row.part == part]) for its in rows.values()]
            yield f"- {part}: {sizes[0]}" + (
                "; models that read them as other tokens cannot be compared" if len({*sizes}) > 1 else ""
            )
        for taught in self.taught:
            if not taught.fold:
                yield from self._compared(taught)

    def _compared(self, taught: Taught) -> Iterator[str]:
        for part in PARTS[1:]:
            pair = [self._first(name, taught.fold, part) for name in (taught.base, taught.model)]
            if all(pair) and len({*(len(row.losses) for row in pair)}) == 1 and len(pair[0].losses) > 1:
                low, high = _interval(pair[1].losses, pair[0].losses)
                ratio = _exp(pair[1].loss - pair[0].loss)
                yield (
                    f"- {part}: the perplexity of {taught.model} is {ratio:.2f} × that of {taught.base} "
                    f"({low:.2f} to {high:.2f})"
                )

    def _first(self, model: str, fold: int | None, part: str) -> Measured | None:
        rows = (row for row in self.measured if (row.model, row.fold, row.part) == (model, fold, part))
        return next(rows, None)

    def _verdict(self, taught: Taught) -> Verdict:
        losses = []
        for part in PARTS[:2]:
            pair = [self._first(name, taught.fold, part) for name in (taught.base, taught.model)]
            losses.append(Losses(*(row.loss for row in pair)) if taught.learnt_known and all(pair) else None)
        return verdict.judge(taught.curves, *losses, taught.kept_lowest)

    # ---- Tasks ----

    def _scores(self) -> Iterator[str]:
        models = list(self.scores)
        found = {(score.task, score.metric): score for scores in self.scores.values() for score in scores}
        by_name = {
            model: {(score.task, score.metric): score for score in scores} for model, scores in self.scores.items()
        }
        rows = (
            (*name, f"{score.questions:,}", *(_score(by_name[model].get(name)) for model in models))
            for name, score in found.items()
        )
        yield from report.table(("task", "metric", "questions", *models), rows)
        yield ""
        yield f"In {self.measured[0].precision}, without a chat template; ± is the standard error."

    # ---- The figure ----

    def _draw(self, file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")  # there may be no screen
        from matplotlib import pyplot

        curves = [taught for taught in self.taught if taught.curves]
        bars = len({(row.model, row.part) for row in self.measured})
        widths = [*([5.5] if curves else []), max(5.5, 0.6 * bars)]  # inches; a bar's number needs 0.4
        figure, axes = pyplot.subplots(
            1,
            len(widths),
            sharey=True,
            squeeze=False,
            width_ratios=widths,
            figsize=(sum(widths), 4.5),
            layout="constrained",
        )
        if curves:
            _draw_curves(axes[0, 0], curves)
        self._draw_losses(axes[0, -1])
        axes[0, 0].set_ylabel("loss, per token of an answer")
        axes[0, 0].set_ylim(0, 1.2 * axes[0, 0].get_ylim()[1])  # room for the legends
        figure.savefig(file, dpi=120)
        pyplot.close(figure)

    def _draw_losses(self, axes: Axes) -> None:
        """A group of bars for each model, in the first precision, with the perplexity above each bar."""
        rows = [row for row in self.measured if row.precision == self.measured[0].precision]
        models = list(dict.fromkeys(row.model for row in rows))
        parts = [part for part in PARTS if any(row.part == part for row in rows)]
        width = 0.8 / max(1, len(parts))
        for number, part in enumerate(parts):
            its = [[row for row in rows if (row.model, row.part) == (model, part)] for model in models]
            # What is no number has no height: its place stays empty.
            places = [i for i, found in enumerate(its) if found and all(math.isfinite(row.loss) for row in found)]
            if not places:
                continue
            heights, below, above = zip(*(_bar(its[i]) for i in places), strict=True)
            bars = axes.bar(
                [i + (number - (len(parts) - 1) / 2) * width for i in places],
                heights,
                width * 0.95,
                yerr=[below, above],
                capsize=3,
                color=f"C{number}",
                label=part,
            )
            perplexities = [statistics.fmean(row.perplexity for row in its[i]) for i in places]
            axes.bar_label(bars, [f"{perplexity:.3g}" for perplexity in perplexities], padding=3)
        slanted = {"rotation": 20, "horizontalalignment": "right"} if max(map(len, models)) * len(models) > 50 else {}
        axes.set_xticks(range(len(models)), models, **slanted)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.legend(loc="upper right", ncols=len(parts))
        axes.set_title(f"measured in {rows[0].precision}; the numbers are perplexities")


def _draw_curves(axes: Axes, runs: list[Taught]) -> None:
    """Both losses of a run, with the lowest point of the held-out one; of several runs the held-out ones."""
    for number, taught in enumerate(runs):
        alone = len(runs) == 1
        name = f"fold {taught.fold}" if taught.fold else taught.model
        for column, style, color in (
            ("train loss", "-", "C0"),
            ("held-out loss", "o-", "C1" if alone else f"C{number}"),
        ):
            points = [(row["step"], row[column]) for row in taught.curves if column in row]
            if points and (alone or column == "held-out loss"):
                axes.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=column if alone else name)
        if low := verdict.lowest(taught.curves):
            axes.plot(low["step"], low["held-out loss"], "kv", markersize=9 if alone else 6, zorder=3)
            if alone:
                axes.axvline(low["step"], color="0.6", linestyle=":", zorder=0)
                axes.annotate(
                    f"lowest: {low['held-out loss']:.2f}, epoch {low['epoch']:.1f}",
                    (low["step"], low["held-out loss"]),
                    xytext=(0, 14),
                    textcoords="offset points",
                    horizontalalignment="left" if low["step"] < taught.curves[-1]["step"] / 2 else "right",
                )
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("while it was taught; ▾ is the lowest")
    title, columns = (None, 2) if alone else ("held-out loss", 5 if runs[0].fold else 1)
    axes.legend(loc="upper right", title=title, ncols=columns, fontsize=None if alone else "small")


def _bar(rows: list[Measured]) -> tuple[float, float, float]:
    """Its height, and how far the whisker reaches below and above: one row's interval, or folds' standard deviation."""
    losses = [row.loss for row in rows]
    if len(rows) > 1:
        deviation = statistics.stdev(losses)
        return statistics.fmean(losses), deviation, deviation
    (loss,), (low, high) = losses, rows[0].interval or (rows[0].perplexity, rows[0].perplexity)
    return loss, max(0.0, loss - math.log(low)), max(0.0, math.log(high) - loss)


def _cell(rows: list[Measured]) -> str:
    if not rows:
        return ""
    if len(rows) > 1:
        perplexities = [row.perplexity for row in rows]
        return f"{statistics.fmean(perplexities):.3g} ± {statistics.stdev(perplexities):.2g}"
    (row,) = rows
    return f"{row.perplexity:.3g}" + (f" ({row.interval[0]:.3g} to {row.interval[1]:.3g})" if row.interval else "")


def _size(rows: list[Measured]) -> str:
    """How much a model was measured on: "12 conversations, 127 tokens"; of folds, in each."""
    counts = ([len(row.losses) for row in rows], [int(row.losses[:, 1].sum()) for row in rows])
    conversations, tokens = (
        f"{min(each):,}" + (f" to {max(each):,}" if min(each) < max(each) else "") if each else "0" for each in counts
    )
    return f"{conversations} conversations, {tokens} tokens{' in each fold' if len(rows) > 1 else ''}"


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


def _interval(losses: np.ndarray, beside: np.ndarray | None = None) -> tuple[float, float] | None:
    """95 % of the perplexity, or of its ratio to another model's on the same conversations."""
    N = len(losses)
    if N < 2:
        return None
    draw, each = np.random.default_rng(0), np.full(N, 1 / N)
    both = losses if beside is None else np.hstack([losses, beside])
    with np.errstate(invalid="ignore"):  # a broken model's losses are no numbers
        # How often each is drawn, as floats, which BLAS multiplies; one by one, or it would be 8 KB of each.
        sums = np.stack([draw.multinomial(N, each).astype(float) @ both for _ in range(RESAMPLES)])
        logs = sums[:, 0] / sums[:, 1] - (0 if beside is None else sums[:, 2] / sums[:, 3])
        low, high = np.percentile(logs, (2.5, 97.5))
    return _exp(low), _exp(high)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def _plain(value: Any) -> Any:
    """The same, but None for what is no number: JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
