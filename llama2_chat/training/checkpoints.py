"""What a run that was killed goes on from, and what a run must not overwrite."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2_chat.errors import ChatError
from llama2_chat.training.curves import DONE
from llama2_chat.training.options import Options
from llama2_chat.training.run_json import Run, read_run

# What a checkpoint cannot take up: how many trainings there are, whether the model is divided among GPUs, and what
# adapter, optimizer and log are made of.
FIXED = {"folds", "use_peft", "lora_r", "use_dora", "target_modules"}
FIXED |= {"method", "modules_to_save", "adapter", "optim", "weight_decay", "save_steps", "logging_steps", "divided"}
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")  # a model, whoever left it
LONGER = {"num_train_epochs", "max_steps"}  # with more of it a run that is done goes on


def check_folders(options: Options) -> None:
    """Raises ChatError unless the results can be written, and over nothing else."""
    taken = {Path(name).resolve() for name in (options.model_name, *options.dataset_names)}
    for folder in filter(None, (options.output_dir, options.merge_to)):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if folder.resolve() in taken or not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ChatError(f"Nothing can be written to {folder}: give another --output_dir or --merge_to.")
        taken.add(folder.resolve())
    if options.merge_to and options.merge_to.is_dir() and any(options.merge_to.iterdir()) and not _is_own(options):
        raise ChatError(f"--merge_to {options.merge_to} is not empty. Choose another folder.")


def _is_own(options: Options) -> bool:
    """Whether what is in --merge_to is the merged model of the run that goes on."""
    if not (options.merge_to and options.goes_on and (options.output_dir / "run.json").is_file()):
        return False
    merged_to = read_run(options.output_dir).merged_to
    return bool(merged_to) and Path(str(merged_to)).resolve() == options.merge_to.resolve()


def is_done(folder: Path) -> bool:
    """Whether a run ended there: what it leaves last is there."""
    return (folder / DONE).is_file()


def find_checkpoint(output_dir: Path, goes_on: bool) -> Path | None:
    """The newest whole checkpoint, if the run is to go on from there.

    Raises ChatError if there is one and the run is not to go on, and if a model would be written over.
    """
    found = _checkpoints(output_dir)
    has_run = (
        found or _checkpoints(output_dir, "fold-*/") or is_done(output_dir) or any(output_dir.glob(f"fold-*/{DONE}"))
    )
    if has_run and not goes_on:
        raise ChatError(f"{output_dir} has a run already. Go on with --resume, or choose another --output_dir.")
    if not has_run and any(file for pattern in WEIGHTS for file in output_dir.glob(pattern)):
        raise ChatError(f"{output_dir} holds a model that no run there has left. Choose another --output_dir.")
    return max(found, key=_step, default=None)


def take_up(run: Run, folder: Path, with_changes: bool) -> Run:
    """The run as it goes on from what is in the folder: with the changes of earlier starts, and those of this one.

    Raises ChatError, with what was and what is, if anything that decides a run has changed, unless that is wanted and
    can be taken up.
    """
    found = _checkpoints(folder) or _checkpoints(folder, "fold-*/")
    if not (found or is_done(folder)):
        return run
    kept = read_run(folder)
    changed = _differences(kept.deciding(), run.deciding())
    said = [f"{name} was {before} and is now {after}" for name, (before, after) in changed.items()]
    if changed and not with_changes:
        raise ChatError(
            f"The run in {folder} began otherwise: {'; '.join(said)}. Use what the first start used, choose another "
            "--output_dir, or go on knowingly with --resume_with_changes."
        )
    if fixed := sorted(FIXED & changed.keys()):
        before, after = changed[fixed[0]]
        raise ChatError(
            f"{fixed[0]} was {before} and is now {after}: a run cannot go on with that. Choose another --output_dir."
        )
    if changed and is_done(folder) and not (found and LONGER & changed.keys()):
        gone = "" if found else " and its checkpoints are gone"
        raise ChatError(f"{folder} is done{gone}, and {'; '.join(said)}: train anew in another --output_dir.")
    step = max(map(_step, found), default=0)
    return replace(
        run,
        changes=[*kept.changes, *(f"after step {step} {sentence}" for sentence in said)],
        mixed_data=kept.mixed_data or bool({"train data", "eval data"} & changed.keys()),
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*before, *(name for name in after if name not in before)]
    pairs = {name: (before.get(name, "unknown"), after.get(name, "unknown")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _checkpoints(folder: Path, below: str = "") -> list[Path]:
    """The whole ones. The trainer writes its state last: without it the process died while it wrote."""
    return [path.parent for path in folder.glob(f"{below}checkpoint-*/trainer_state.json") if _is_whole(path)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(state: Path) -> bool:
    try:
        return bool(json.loads(state.read_text("utf-8")))
    except ValueError:
        return False
