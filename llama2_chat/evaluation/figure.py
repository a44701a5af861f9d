"""evaluation.png: on the left the losses during training, on the right those of each model on each split."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.evaluation.overfitting import EVAL_LOSS, TRAIN_LOSS, lowest_eval_row
from llama2_chat.evaluation.perplexity import Measurement
from llama2_chat.evaluation.results import Finetuned, Results
from llama2_chat.training.chat_data import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_WIDTH = 5.5  # inches
BAR_WIDTH = 0.6  # inches; the number above a bar needs 0.4


def draw(results: Results, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    with_curves = [finetuned for finetuned in results.finetuned if finetuned.curves]
    bars = len({(row.model, row.split) for row in results.measured})
    widths = [max(CURVES_WIDTH, BAR_WIDTH * bars)]
    if with_curves:
        widths.insert(0, CURVES_WIDTH)
    figure, axes = pyplot.subplots(
        1,
        len(widths),
        sharey=True,
        squeeze=False,
        width_ratios=widths,
        figsize=(sum(widths), 4.5),
        layout="constrained",
    )
    if with_curves:
        _draw_curves(axes[0, 0], with_curves)
    _draw_losses(axes[0, -1], results.measured)
    axes[0, 0].set_ylabel("loss, per token of an answer")
    axes[0, 0].set_ylim(0, 1.2 * axes[0, 0].get_ylim()[1])  # room for the legends
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# ---- During training ----


def _draw_curves(axes: Axes, runs: list[Finetuned]) -> None:
    """Both losses of a single run, or the eval losses of several; a triangle marks the lowest eval loss."""
    from matplotlib.ticker import MaxNLocator

    if len(runs) == 1:
        _draw_curve(axes, runs[0], TRAIN_LOSS, "-", color="C0", label="train loss")
        _draw_curve(axes, runs[0], EVAL_LOSS, "o-", color="C1", label="eval loss")
        _annotate_lowest(axes, runs[0])
        axes.legend(loc="upper right", ncols=2)
    else:
        for number, finetuned in enumerate(runs):
            name = f"fold {finetuned.fold}" if finetuned.fold else finetuned.model
            _draw_curve(axes, finetuned, EVAL_LOSS, "o-", color=f"C{number}", label=name)
        axes.legend(loc="upper right", title="eval loss", ncols=5 if runs[0].fold else 1, fontsize="small")
    for finetuned in runs:
        if lowest := lowest_eval_row(finetuned.curves):
            axes.plot(lowest["step"], lowest[EVAL_LOSS], "kv", markersize=9 if len(runs) == 1 else 6, zorder=3)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_title("during training; ▾ is the lowest")


def _draw_curve(axes: Axes, finetuned: Finetuned, column: str, style: str, color: str, label: str) -> None:
    rows = [row for row in finetuned.curves if column in row]
    if rows:
        steps, losses = [row["step"] for row in rows], [row[column] for row in rows]
        axes.plot(steps, losses, style, color=color, markersize=4, label=label)


def _annotate_lowest(axes: Axes, finetuned: Finetuned) -> None:
    lowest = lowest_eval_row(finetuned.curves)
    if lowest is None:
        return
    is_in_first_half = lowest["step"] < finetuned.curves[-1]["step"] / 2
    axes.axvline(lowest["step"], color="0.6", linestyle=":", zorder=0)
    axes.annotate(
        f"lowest: {lowest[EVAL_LOSS]:.2f}, epoch {lowest['epoch']:.1f}",
        (lowest["step"], lowest[EVAL_LOSS]),
        xytext=(0, 14),
        textcoords="offset points",
        horizontalalignment="left" if is_in_first_half else "right",
    )


# ---- Of each model ----


def _draw_losses(axes: Axes, measured: list[Measurement]) -> None:
    """A group of bars for each model, in the first precision, with the perplexity above each bar."""
    rows = [row for row in measured if row.precision == measured[0].precision]
    models = list(dict.fromkeys(row.model for row in rows))
    splits = [split for split in SPLITS if any(row.split == split for row in rows)]
    width = 0.8 / max(1, len(splits))
    for number, split in enumerate(splits):
        offset = (number - (len(splits) - 1) / 2) * width
        groups = [[row for row in rows if (row.model, row.split) == (model, split)] for model in models]
        # A loss that is NaN or infinite has no height: its place stays empty.
        shown = {i: own for i, own in enumerate(groups) if own and all(math.isfinite(row.loss) for row in own)}
        if shown:
            _draw_bars(axes, [i + offset for i in shown], list(shown.values()), width, f"C{number}", split)
    crowded = max(map(len, models)) * len(models) > 50
    slanted: dict[str, Any] = {"rotation": 20, "horizontalalignment": "right"} if crowded else {}
    axes.set_xticks(range(len(models)), models, **slanted)
    axes.set_xlim(-0.5, len(models) - 0.5)
    axes.legend(loc="upper right", ncols=len(splits))
    axes.set_title(f"measured in {rows[0].precision}; the numbers are perplexities")


def _draw_bars(
    axes: Axes, places: list[float], groups: list[list[Measurement]], width: float, color: str, split: str
) -> None:
    heights, below, above = zip(*map(_bar, groups), strict=True)
    bars = axes.bar(places, heights, width * 0.95, yerr=[below, above], capsize=3, color=color, label=split)
    perplexities = [statistics.fmean(row.perplexity for row in rows) for rows in groups]
    axes.bar_label(bars, [f"{perplexity:.3g}" for perplexity in perplexities], padding=3)


def _bar(rows: list[Measurement]) -> tuple[float, float, float]:
    """A bar's height, and how far its whisker reaches below and above it.

    One row: its loss with the 95 % interval; folds: their mean with the standard deviation.
    """
    losses = [row.loss for row in rows]
    if len(rows) > 1:
        deviation = statistics.stdev(losses)
        return statistics.fmean(losses), deviation, deviation
    (loss,) = losses
    low, high = rows[0].interval or (rows[0].perplexity, rows[0].perplexity)
    return loss, max(0.0, loss - math.log(low)), max(0.0, math.log(high) - loss)
