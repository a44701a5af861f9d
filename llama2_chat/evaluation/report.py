"""evaluation.md: what an evaluation found, as a page of Markdown; written together with its figure and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from llama2_chat.evaluation import figure, judging
from llama2_chat.evaluation.harness import Score
from llama2_chat.evaluation.perplexity import RESAMPLES, Measurement
from llama2_chat.evaluation.results import Results
from llama2_chat.training.chat_data import SPLITS
from llama2_chat.training.markdown import table


def write(results: Results, folder: Path) -> None:
    """evaluation.json, evaluation.md and evaluation.png, of as much as there is."""
    (folder / "evaluation.json").write_text(results.to_json(), "utf-8")
    (folder / "evaluation.md").write_text("\n".join(page(results)) + "\n", "utf-8")
    figure.draw(results, folder / "evaluation.png")


def page(results: Results) -> list[str]:
    lines = [f"# {results.title}"]
    if results.finetuned:
        lines += ["", *_overfitting(results)]
    lines += ["", "![train and eval loss against steps; loss by model and split](evaluation.png)", ""]
    lines += ["## Perplexity of the answers", "", *_perplexities(results)]
    if results.scores:
        lines += ["", "## lm-evaluation-harness", "", *_scores(results)]
    if results.has_sheet:
        lines += [
            "",
            "## For people to judge",
            "",
            f"`{judging.SHEET}` holds questions with two answers each, `{judging.RUBRIC}` says how to mark them, and "
            f"`{judging.KEY}`, which judges should not see, says which model gave which answer. "
            "`python scripts/evaluate_model.py --judged` counts the sheets that are filled in.",
        ]
    return [*lines, *(line for note in results.notes for line in ("", note))]


def _overfitting(results: Results) -> Iterator[str]:
    several = len(results.finetuned) > 1
    for finetuned, assessment in zip(results.finetuned, results.assessments(), strict=True):
        name = f"fold {finetuned.fold}" if finetuned.fold else finetuned.model
        yield f"- {name}: {assessment.sentence}" if several else assessment.sentence


# ---- Perplexity ----


def _perplexities(results: Results) -> Iterator[str]:
    rows: dict[tuple[str, str], list[Measurement]] = {}
    for row in results.measured:
        rows.setdefault((row.model, row.precision), []).append(row)
    splits = [split for split in SPLITS if any(row.split == split for row in results.measured)]
    yield from table(
        ("model", "precision", *splits, "seconds", "memory"),
        (
            (
                *name,
                *(_perplexity_cell(_of_split(own, split)) for split in splits),
                f"{sum(row.seconds for row in own):.1f}",
                f"{max(row.memory_gb for row in own):.1f} GB",
            )
            for name, own in rows.items()
        ),
    )
    yield ""
    if any(row.fold for row in results.measured):
        yield f"Mean ± standard deviation over {results.run.folds} folds, each measured on what it left out."
    else:
        yield (
            "All tokens of the answers have the same weight. In brackets: the 95 % interval, from "
            f"{RESAMPLES:,} bootstrap samples of the conversations."
        )
    yield ""
    for split in splits:
        sizes = [_size(_of_split(own, split)) for own in rows.values()]
        differ = "; models whose tokenizers differ cannot be compared" if len({*sizes}) > 1 else ""
        yield f"- {split}: {sizes[0]}{differ}"
    yield from _comparisons(results)


def _comparisons(results: Results) -> Iterator[str]:
    for finetuned in results.finetuned:
        for split, ratio, low, high in [] if finetuned.fold else results.compare(finetuned):
            yield (
                f"- {split}: the perplexity of {finetuned.model} is {ratio:.2f} × that of {finetuned.base} "
                f"({low:.2f} to {high:.2f})"
            )


def _of_split(rows: list[Measurement], split: str) -> list[Measurement]:
    return [row for row in rows if row.split == split]


def _perplexity_cell(rows: list[Measurement]) -> str:
    if not rows:
        return ""
    if len(rows) > 1:
        perplexities = [row.perplexity for row in rows]
        return f"{statistics.fmean(perplexities):.3g} ± {statistics.stdev(perplexities):.2g}"
    (row,) = rows
    interval = f" ({row.interval[0]:.3g} to {row.interval[1]:.3g})" if row.interval else ""
    return f"{row.perplexity:.3g}{interval}"


def _size(rows: list[Measurement]) -> str:
    """How much a model was measured on: "12 conversations, 127 tokens"; of folds, in each."""
    conversations, tokens = _range([row.conversations for row in rows]), _range([row.tokens for row in rows])
    return f"{conversations} conversations, {tokens} tokens{' in each fold' if len(rows) > 1 else ''}"


def _range(counts: list[int]) -> str:
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"


# ---- Tasks ----


def _scores(results: Results) -> Iterator[str]:
    by_name = {
        model: {(score.task, score.metric): score for score in scores} for model, scores in results.scores.items()
    }
    names = {name: score.questions for scores in by_name.values() for name, score in scores.items()}
    rows = (
        (*name, f"{questions:,}", *(_score_cell(scores.get(name)) for scores in by_name.values()))
        for name, questions in names.items()
    )
    yield from table(("task", "metric", "questions", *results.scores), rows)
    yield ""
    yield f"In {results.measured[0].precision}, without a chat template; ± is the standard error."


def _score_cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")
