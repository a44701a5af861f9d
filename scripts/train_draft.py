"""Train a head that guesses what a model says next, on the model's own answers to questions that it makes up itself.

For the small model, for another one, and to answer with what came out:

    python scripts/train_draft.py
    python scripts/train_draft.py --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --output_dir trained/draft-tiny
    DRAFT_MODEL=trained/draft python app.py
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.training.draft_options import HELP, DraftOptions


def main(argv: Sequence[str] | None = None) -> None:
    options = read_arguments(argv)
    logging.basicConfig(level=logging.WARNING)
    from llama2_chat.training.draft_run import train_draft  # seconds of imports: not for --help

    try:
        train_draft(options)
    except ChatError as error:
        sys.exit(f"train_draft.py: {error.detail}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on.")


def read_arguments(argv: Sequence[str] | None = None) -> DraftOptions:
    """What was asked for. Ends the program with a sentence and exit code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for option in fields(DraftOptions):
        many = {"nargs": "+"} if option.name == "answers_files" else {}
        kind = Path if option.name in ("answers_files", "output_dir", "start_from") else type(option.default)
        flag = f"--{option.name}"
        parser.add_argument(flag, type=kind, default=option.default, help=HELP[flag], **many)
    try:
        return DraftOptions(**vars(parser.parse_args(argv)))
    except ChatError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
