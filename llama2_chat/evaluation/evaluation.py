"""From the models' names to a report; what scripts/evaluate_model.py calls.

Everything that can be refused is refused before weights are loaded, and what has been measured is written at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2_chat.evaluation import eval_data, harness, judging, questions, report
from llama2_chat.evaluation.folder import make_folder
from llama2_chat.evaluation.losses import measure
from llama2_chat.evaluation.options import Options
from llama2_chat.evaluation.results import Finetuned, Results
from llama2_chat.evaluation.subjects import (
    Subject,
    display_names,
    find_runs,
    find_subjects,
    has_folds,
    load_in_turn,
)
from llama2_chat.loading.load import check_precision
from llama2_chat.training.curves import read_curves
from llama2_chat.training.run_json import Run, read_run


def evaluate(options: Options) -> None:
    """Measure the models and write the report to options.output_dir. Raises ChatError."""
    for precision in options.precisions:
        check_precision(precision)  # the others take hours
    runs = find_runs(options.models)
    run, folds = eval_data.find_splits(runs, options)
    for note in folds[0].notes:
        print(note)
    subjects = find_subjects(options.models, runs)
    number = questions.SHEET_QUESTIONS if options.sheet is None else options.sheet
    sheet = questions.plan_sheet(options.models, subjects, folds[0], run, 0 if has_folds(run) else number)
    if sheet.rows:
        judging.check_free(options.output_dir)
    tasks, faults = _fetch_tasks(options.tasks)
    splits_of = {(subject.name, subject.fold): eval_data.encode(subject, folds, run) for subject in subjects}

    make_folder(options.output_dir)
    title = f"{' and '.join(display_names(options.models).values())}, evaluated"
    results = Results(title, run, find_finetuned(subjects, run), notes=[*faults, *eval_data.data_notes(run, folds)])
    answers: dict[str, list[str]] = {}
    for precision in options.precisions:
        for subject, model in load_in_turn(subjects, precision):
            measured = splits_of[subject.name, subject.fold]
            results.measured += measure(subject, model, precision, measured, options.batch_size)
            report.write(results, options.output_dir)  # at once: it is kept, whatever ends what follows
            if precision == options.precisions[0] and subject.name in sheet.pair:
                answers[subject.name] = questions.answer(subject, model, sheet.rows, options.batch_size)
            if precision == options.precisions[0] and tasks:
                scores, faults = harness.run(tasks, model, subject.tokenizer, options.batch_size, options.limit)
                results.add_scores(subject.name, scores, faults)
            del model  # or it would stay in memory while the next one is loaded
        if sheet.rows and not results.has_sheet:
            judging.write(options.output_dir, sheet.questions, {name: answers[name] for name in sheet.pair}, run.seed)
            results.has_sheet = True
        report.write(results, options.output_dir)
    print("", *report.page(results), f"\nThe report is {options.output_dir / 'evaluation.md'}.", sep="\n")


def _fetch_tasks(names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """As harness.find_tasks."""
    if not names:
        return [], []
    print(f"Fetching the questions of {', '.join(names)} ...", flush=True)
    return harness.find_tasks(names)


def find_finetuned(subjects: list[Subject], run: Run) -> list[Finetuned]:
    """Those whose overfitting can be assessed. A merged model is left out: it is its adapter once more."""
    return [_finetuned(subject, subject.base, run) for subject in subjects if subject.base and not subject.is_merged]


def _finetuned(subject: Subject, base: str, run: Run) -> Finetuned:
    folder = (subject.checkpoint.adapter or subject.checkpoint.base).folder
    own_run = read_run(folder) if (folder / "run.json").is_file() else None
    return Finetuned(
        subject.name,
        base,
        subject.fold,
        # Its eval losses are of two eval splits, the second of which may have been trained on.
        [] if own_run is not None and own_run.mixed_data else read_curves(folder),
        kept_lowest=own_run is not None and own_run.early_stopping,
        knows_splits=own_run is not None and run.train_sha256 is not None,
    )


def count_judgements(sheets: Sequence[Path], output_dir: Path | None) -> None:
    """Print what people think, and write it beside the sheets or to output_dir. Raises ChatError."""
    folder = output_dir or sheets[0].parent
    judgement = judging.read(sheets, folder / judging.KEY)
    make_folder(folder)
    judging.write_judgement(judgement, folder)
    print(*judgement.summary_lines(), sep="\n")
