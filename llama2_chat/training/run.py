"""From the flags to the reports: one training or one for each fold, and what becomes of the result.

Everything that can be refused is refused before weights are loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data, merging, report, splits
from llama2_chat.training.base_model import BaseModel, base_precision, fetch_base, fetch_weights, go_on_with_adapter
from llama2_chat.training.checkpoints import check_folders, find_checkpoint, take_up
from llama2_chat.training.options import Options
from llama2_chat.training.processes import check_divided, is_divided, is_main_process, print_lines, processes
from llama2_chat.training.resources import free_memory
from llama2_chat.training.row_sources import Reading
from llama2_chat.training.run_json import Run, read_run, write_run
from llama2_chat.training.splits import Splits
from llama2_chat.training.train_one import show_examples, subject_of, tokenize_rows, tokenize_splits, train_one


def train(options: Options) -> None:
    """Raises ChatError."""
    if options.preview:
        preview(options, options.preview)
        return
    check_divided(options)
    check_folders(options)
    find_checkpoint(options.output_dir, options.goes_on)
    run = new_run(options)
    every = _read_splits(run)
    base = fetch_base(options.model_name, _chats(every))
    if base.checkpoint.adapter:
        options = go_on_with_adapter(base, options)
        print_lines(f"{options.model_name} is an adapter, and is trained further with the rank and layers that it has.")
    if options.merge_and_push:
        merging.create_repo(options.merge_and_push)
    fetch_weights(base.checkpoint, run.precision, bool(run.merged_to))
    run = replace(_with_hashes(run, every), model_sha256=base.checkpoint.base.fingerprint())
    read_as = {"row order": splits.order(every)[:12], "tokenizer and format": base.format_fingerprint()[:12]}
    run = replace(run, settings=run.settings | read_as)
    if base.checkpoint.adapter:
        begins_as = {"adapter": base.checkpoint.adapter.fingerprint()[:12]}
        run = replace(run, settings={**run.settings, **options.deciding(), **begins_as})
    run = take_up(run, options.output_dir, options.resume_with_changes)
    if options.folds:
        _train_folds(options, run, every, base)
        return
    samples = train_one(options, run, every[0], base)
    print_lines(f"Talk to the model: MODEL_ID={options.output_dir} python app.py")
    if run.merged_to and is_main_process():
        _merge(options, run, Path(run.merged_to), base, samples)


def preview(options: Options, number: int) -> None:
    """Show what would be trained on, with neither weights nor anything written."""
    of_run = _read_splits(new_run(options))[0]
    base = fetch_base(options.model_name, _chats([of_run]))
    show_examples(tokenize_splits(options, of_run, base), base, number)


def _read_splits(run: Run) -> list[Splits]:
    """Those of each fold, or of the run, with what there is to say about the data."""
    data = chat_data.read(run.dataset_names, Reading(**run.reading))
    every = splits.of_run(data, run)
    print_lines(*data.summary_lines(), *every[0].notes)
    return every


def new_run(options: Options) -> Run:
    """What run.json will say, except for the fingerprints of model and data."""
    reading = Reading(
        dict(options.columns),
        options.dataset_config,
        options.split,
        list(options.dataset_weights),
        options.plain_text,
        options.method,
        options.conversations_needed(processes().num_processes),
    )
    merged = options.merge_to or (options.output_dir / "merged" if options.merge_and_push else None)
    return Run(
        model_name=options.model_name,
        dataset_names=list(map(_from_here, options.dataset_names)),
        eval_fraction=options.eval_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        folds=options.folds,
        fold=None,
        max_length=options.max_length,
        precision=base_precision(options),
        early_stopping=bool(options.early_stopping),
        merged_to=str(merged) if merged else None,
        train_sha256=None,
        reading=reading._asdict(),
        settings=options.deciding() | _how_many(),
    )


def _how_many() -> dict[str, Any]:
    return {"processes": processes().num_processes} | ({"divided": True} if is_divided() else {})


def _from_here(name: str) -> str:
    """A file or folder below the working directory by its path from there, so that it is found wherever that lies."""
    data, here = Path(name).absolute(), Path.cwd()
    return data.relative_to(here).as_posix() if data.exists() and data.is_relative_to(here) else name


def _chats(every: list[Splits]) -> bool:
    """Whether there is a conversation to learn, and not only texts."""
    return not all(row.is_text for splits in every for rows in splits[:3] for row in rows)


def _with_hashes(run: Run, every: list[Splits]) -> Run:
    return replace(run, train_sha256=splits.fingerprint(every), eval_sha256=splits.fingerprint(every, "eval"))


def _train_folds(options: Options, run: Run, folds: list[Splits], base: BaseModel) -> None:
    """One training for each fold, each from the base model, and one page about all of them."""
    for i, fold in enumerate(folds, 1):
        if not tokenize_rows(options, fold.eval, base)[0]:
            raise ChatError(
                f"The eval split of fold {i} does not fit into {options.max_length:,} tokens. Raise --max_length."
            )
    if is_main_process():
        write_run(run, options.output_dir)
    for i, fold in enumerate(folds, 1):
        print_lines(f"\nFold {i} of {options.folds}")
        folder = options.output_dir / f"fold-{i}"
        of_fold = replace(_with_hashes(run, [fold]), fold=i, changes=[], mixed_data=False)
        of_fold = take_up(of_fold, folder, options.resume_with_changes)
        train_one(replace(options, output_dir=folder), of_fold, fold, base)
        free_memory()
    if is_main_process():
        eval_loss = report.write_folds_report(subject_of(base, run, options), folds)
        print_lines(f"\nEval loss: {eval_loss}, of {options.folds} folds.")
        print_lines(f"The report is {options.output_dir / 'README.md'}.")


def _merge(options: Options, run: Run, folder: Path, base: BaseModel, samples: list[list[int]]) -> None:
    """samples: ids on which the merged model has to give the adapter's logits."""
    free_memory()  # for the full-precision base
    moved = merging.merge(base, options.output_dir, folder, samples)
    # Again: a run that was done already may be merged to another folder now.
    write_run(replace(read_run(options.output_dir), merged_to=run.merged_to), options.output_dir)
    print_lines(f"The merged model is in {folder}; its logits differ from the adapter's by {moved}.")
    if options.merge_and_push:
        merging.push(folder, options.merge_and_push)
        print_lines(f"It is at https://huggingface.co/{options.merge_and_push}.")
