"""documents.md, documents.json and documents.png: what was measured on documents, for people and for programs."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.evaluation.document_answers import Judged
from llama2_chat.evaluation.retrieval import DEPTH, SHOWN, Found, Place, Retrieval
from llama2_chat.training.markdown import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKDOWN, JSON, PICTURE = "documents.md", "documents.json", "documents.png"
SHOWN_MISSES = 20
COLOR = "#3465a4"
CRITERIA = {"faithful": "the excerpts say what the answer says", "relevant": "it answers what was asked"}


@dataclass
class Results:
    retrieval: Retrieval
    model: str = ""  # that answered
    judge: str = ""
    judged: list[Judged] = field(default_factory=list)

    def verdicts(self, criterion: str) -> list[bool]:
        """Those that were given."""
        given = (getattr(each, criterion) for each in self.judged)
        return [verdict for verdict in given if verdict is not None]

    @property
    def marks(self) -> list[int]:
        return [each.correctness for each in self.judged if each.correctness is not None]


def write(results: Results, folder: Path) -> None:
    """All three, of as much as there is; no picture where matplotlib is not installed."""
    (folder / JSON).write_text(json.dumps(everything(results), indent=1, ensure_ascii=False) + "\n", "utf-8")
    has_picture = importlib.util.find_spec("matplotlib") is not None
    if has_picture:
        _draw(results, folder / PICTURE)
    (folder / MARKDOWN).write_text("\n".join(_page(results, has_picture)) + "\n", "utf-8")


def summary(results: Results) -> dict[str, Any]:
    """The figures alone."""
    retrieval = results.retrieval
    figures: dict[str, Any] = {
        "documents": retrieval.documents,
        "pages": retrieval.pages,
        "questions": len(retrieval.found),
        **{f"recall_at_{k}": retrieval.recall(k) for k in SHOWN},
        "mean_reciprocal_rank": retrieval.mean_reciprocal_rank,
        "index_s": round(retrieval.index_s, 3),
        "search_ms": round(retrieval.search_ms, 3),
    }
    if not results.judged:
        return figures
    rates = {name: _rate(verdicts) for name in CRITERIA if (verdicts := results.verdicts(name))}
    marks = {"correctness": statistics.fmean(results.marks)} if results.marks else {}
    return figures | {"model": results.model, "judge": results.judge, "answers": len(results.judged)} | rates | marks


def everything(results: Results) -> dict[str, Any]:
    return {
        **summary(results),
        "ranks": [
            {"question": each.question.text, "right": sorted(each.right), "rank": each.rank}
            for each in results.retrieval.found
        ],
        "judged": [
            {
                "question": each.found.question.text,
                "expected": each.found.question.answer,
                "answer": each.answer,
                "right_page_quoted": each.right_page_quoted,
                **{name: getattr(each, name) for name in (*CRITERIA, "correctness")},
                "reasons": each.reasons,
            }
            for each in results.judged
        ],
    }


# ---- The page ----


def _page(results: Results, has_picture: bool) -> Iterator[str]:
    retrieval = results.retrieval
    documents = f"{retrieval.documents:,} document{'s' if retrieval.documents > 1 else ''}"
    yield f"# {len(retrieval.found):,} questions about {documents} of {retrieval.pages:,} pages"
    yield from ("", *search_lines(retrieval))
    if has_picture:
        yield from ("", f"![recall at each rank; verdicts and marks of the answers]({PICTURE})")
    if results.judged:
        head = ("question", "expected", "answer", "right page quoted", *CRITERIA, "correctness")
        yield from ("", "## Answers", "", *answer_lines(results), "")
        yield from table(head, map(_answer_row, results.judged))
    if missed := [each for each in retrieval.found if not each.rank]:
        yield from ("", "## Not found", "", *_misses(missed))


def search_lines(retrieval: Retrieval) -> Iterator[str]:
    how = f"by words and, with {retrieval.encoder}, by meaning" if retrieval.encoder else "by words"
    yield f"How often the right page is among the first chunks that the search finds {how}:"
    yield ""
    cells = [f"{retrieval.recall(k):.3f}" for k in SHOWN]
    head = (*(f"recall@{k}" for k in SHOWN), "MRR")
    yield from table(head, [(*cells, f"{retrieval.mean_reciprocal_rank:.3f}")])
    yield ""
    yield (
        f"MRR is the mean of 1/rank; a page that is not among the first {DEPTH} chunks counts as 0. Indexed in "
        f"{retrieval.index_s:.1f} s, searched in {retrieval.search_ms:.1f} ms a question."
    )


def answer_lines(results: Results) -> Iterator[str]:
    yield f"{results.model} answered {len(results.judged):,} of the questions, {results.judge} judged."
    yield ""
    yield from table(("", "yes", "95 % interval", "no verdict"), _verdict_rows(results))
    if results.marks:
        mean = statistics.fmean(results.marks)
        yield ""
        yield f"Correctness: {mean:.2f} of 5, the mean of {len(results.marks):,} answers beside the expected ones."
    quoted = sum(each.right_page_quoted for each in results.judged)
    yield ""
    yield f"The right page was among the excerpts of {quoted:,} answers."


def _verdict_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for name, meaning in CRITERIA.items():
        verdicts = results.verdicts(name)
        share = ("", "")
        if verdicts:
            low, high = interval(sum(verdicts), len(verdicts))
            share = f"{sum(verdicts):,} of {len(verdicts):,}", f"{low:.0%} to {high:.0%}"
        yield f"{name}: {meaning}", *share, f"{len(results.judged) - len(verdicts):,}"


def _answer_row(each: Judged) -> tuple[str, ...]:
    words = {True: "yes", False: "no", None: "–"}
    verdicts = (words[getattr(each, name)] for name in CRITERIA)
    mark = "–" if each.correctness is None else str(each.correctness)
    question = each.found.question
    return question.text, question.answer or "–", each.answer, words[each.right_page_quoted], *verdicts, mark


def _misses(missed: Sequence[Found]) -> Iterator[str]:
    if len(missed) > SHOWN_MISSES:
        yield f"The first {SHOWN_MISSES} of {len(missed):,}:"
        yield ""
    rows = (
        (
            each.question.text,
            ", ".join(map(_name, sorted(each.right)[:3])),
            _name(each.places[0]) if each.places else "–",
        )
        for each in missed[:SHOWN_MISSES]
    )
    yield from table(("question", "right", "found first"), rows)


def _name(place: Place) -> str:
    return f"{place[0]}, page {place[1]:,}"


def _rate(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def interval(yes: int, of: int) -> tuple[float, float]:
    """Of a share, with 95 % confidence, as Wilson has it: fair for few answers, too."""
    z = 1.96
    share, n = yes / of, 1 + z * z / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (middle - half) / n), min(1.0, (middle + half) / n)


# ---- The picture ----


def _draw(results: Results, file: Path) -> None:
    """Recall; beside it what the judge said, if there is a judge."""
    from matplotlib.figure import Figure

    panels = 1 + bool(results.judged) + bool(results.marks)
    figure = Figure(figsize=(4 * panels, 3), layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_recall(axes[0], results.retrieval)
    if results.judged:
        _draw_verdicts(axes[1], results)
    if results.marks:
        counts = [results.marks.count(mark) for mark in range(1, 6)]
        axes[2].bar_label(axes[2].bar(range(1, 6), counts, color=COLOR), padding=2, fontsize=8)
        _style(axes[2], "answers by correctness, from 1 to 5", 1.15 * max(counts))
    figure.savefig(file, dpi=160)


def _draw_recall(axes: Axes, retrieval: Retrieval) -> None:
    ks = range(1, DEPTH + 1)
    axes.plot(ks, [retrieval.recall(k) for k in ks], color=COLOR, marker="o", markersize=4)
    for k in SHOWN:
        value = retrieval.recall(k)
        axes.annotate(f"{value:.3f}", (k, value), (0, 5), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xticks(ks)
    axes.set_xlabel("chunks that are looked at", fontsize=9, color="#333333")
    _style(axes, "recall of the right page", 1.12)


def _draw_verdicts(axes: Axes, results: Results) -> None:
    for place, name in enumerate(CRITERIA):
        if verdicts := results.verdicts(name):
            share, (low, high) = _rate(verdicts), interval(sum(verdicts), len(verdicts))
            whiskers = [[max(0.0, share - low)], [max(0.0, high - share)]]
            axes.bar(place, share, 0.6, yerr=whiskers, capsize=4, color=COLOR, ecolor="#555555")
            color = "white" if share > 0.15 else "#333333"
            axes.annotate(f"{share:.0%}", (place, 0.03), ha="center", fontsize=9, color=color)
    axes.set_xticks(range(len(CRITERIA)), CRITERIA)
    axes.set_xlim(-0.6, len(CRITERIA) - 0.4)
    _style(axes, "answers, with 95 % intervals", 1.12)


def _style(axes: Axes, title: str, top: float) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#333333")
    axes.set_ylim(0, top)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
