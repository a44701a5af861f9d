"""Tokens/s and time to first token against how many users, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.benchmark.load_test import users_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(rows: dict[str, Any], counts: Sequence[int], file: Path) -> None:
    """Two panels on white, which a dark README shows as well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    speeds = [rows[f"{users_name(count)}, tokens/s"] for count in counts]
    waits_ms = [1000 * rows[f"{users_name(count)}, time to first token, median, s"] for count in counts]
    _draw(left, "tokens/s, all users together", counts, speeds)
    _draw(right, "time to first token, median, ms", counts, waits_ms)
    figure.savefig(file, dpi=160)


def _draw(axes: Axes, title: str, counts: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(counts, values, color="#3465a4", marker="o", markersize=4, linewidth=1.5)
    for count, value in zip(counts, values, strict=True):
        axes.annotate(
            f"{value:,.0f}",
            (count, value),
            (-4, 4),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=8,
        )
    axes.set_title(title, fontsize=10, loc="left", color="#333333")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("users who arrive together", fontsize=9, color="#333333")
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.15 * max(values))
    axes.grid(axis="y", color="#e5e5e5")
    axes.tick_params(colors="#555555", labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
