"""What a run that was killed goes on from, and what a run must not overwrite."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.training.options import Options
from llama2_chat.training.run_json import read_run


def check_folders(options: Options) -> None:
    """Raises ChatError unless the results can be written, and over nothing else."""
    taken = {Path(name).resolve() for name in (options.model_name, options.dataset_name)}
    for folder in filter(None, (options.output_dir, options.merge_to)):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if folder.resolve() in taken or not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ChatError(f"Nothing can be written to {folder}: give another --output_dir or --merge_to.")
        taken.add(folder.resolve())
    if options.merge_to and not options.resume and options.merge_to.is_dir() and any(options.merge_to.iterdir()):
        raise ChatError(f"--merge_to {options.merge_to} is not empty. Choose another folder.")


def find_checkpoint(output_dir: Path, resume: bool, train_sha256: str | None = None) -> Path | None:
    """The newest whole checkpoint, if the run is to go on from there.

    Raises ChatError if it is not to, or if its train split has another fingerprint.
    """
    # The trainer writes its state last: without it the process died while it wrote.
    found = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json") if _is_whole(path)]
    if not resume and (found or any(output_dir.glob("fold-*/checkpoint-*/trainer_state.json"))):
        raise ChatError(f"{output_dir} has a run already. Go on with --resume, or choose another --output_dir.")
    if found and train_sha256 and read_run(output_dir).train_sha256 != train_sha256:
        raise ChatError(
            f"The run in {output_dir} was trained on other conversations: the data has changed, or --seed, --folds or "
            "the fractions. Use those of the first start, or choose another --output_dir."
        )
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(state: Path) -> bool:
    try:
        return bool(json.loads(state.read_text("utf-8")))
    except ValueError:
        return False
