"""Did it get better? A finetuned model beside its base: perplexity, lm-evaluation-harness, a judging sheet.

    python scripts/evaluate_model.py trained/demo            what sft_trainer.py left there, on its eval and test splits
    python scripts/evaluate_model.py trained/demo --tasks hellaswag truthfulqa_mc2 data/quillmere/quillmere.yaml
    python scripts/evaluate_model.py one two --dataset_name some.jsonl --sheet 30           any two models
    python scripts/evaluate_model.py --judged anna.csv ben.csv --output_dir trained/demo/evaluation

evaluation.md, .json and .png go to --output_dir, with sheet.csv for people. Which conversations a model was trained on
is read from the run's run.json, so that none of them is taken for one of the eval split.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.evaluation.evaluation import count_judgements, evaluate
from llama2_chat.evaluation.options import Options
from llama2_chat.evaluation.questions import SHEET_QUESTIONS
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.load import UNQUANTIZED
from llama2_chat.named_files import in_home
from llama2_chat.training.base_model import full_precision
from llama2_chat.training.options import add_reading_flags, parse_known
from llama2_chat.training.resources import translate_resource_errors
from llama2_chat.training.row_sources import AS_IT_IS, Reading


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    # PEFT 0.21 uses names that transformers 5.23 has deprecated.
    warnings.filterwarnings("ignore", r".*gradient_checkpointing` is deprecated", FutureWarning)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    kept = f"What was measured so far is in {args.output_dir}."
    try:
        if args.judged:
            count_judgements(args.judged, args.output_dir)
        else:
            remedies = f"lower --batch_size {args.batch_size}", "leave only --precisions nf4"
            with translate_resource_errors(remedies, args.output_dir, kept):
                evaluate(Options(**{name: value for name, value in vars(args).items() if name != "judged"}))
    except ChatError as error:
        sys.exit(f"evaluate_model.py: {error.detail}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {kept}")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The fields of Options, and `judged`. Ends the program with a sentence and exit code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL",
        help=f"output folder of sft_trainer.py, adapter, model's folder, Hub id, or {EMBEDDED}")  # fmt: skip
    add("--output_dir", type=Path, help="where the report goes (MODEL/evaluation)")
    add("--precisions", nargs="+", choices=(*UNQUANTIZED, "nf4", "int8", "int4"), metavar="P",
        help=f"{', '.join(UNQUANTIZED)}, nf4, int8, int4; tasks and sheet use the first (full and nf4)")  # fmt: skip
    add("--batch_size", type=int, default=8, help="conversations computed at once (8)")
    add("--max_length", type=int, help="tokens of a conversation; longer ones lose exchanges (as in training)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-evaluation-harness, or YAML files of your own")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--sheet", type=int, metavar="N", help=f"questions on the sheet for people; 0: no sheet ({SHEET_QUESTIONS})")
    add("--judged", nargs="+", type=Path, default=[], metavar="CSV", help="only read sheets that were filled in")
    data = parser.add_argument_group("other conversations than the run's, or for a model that has no run.json")
    data.add_argument(
        "--dataset_name", nargs="+", dest="dataset_names", metavar="NAME", help="as sft_trainer.py takes it"
    )
    add_reading_flags(data.add_argument)
    data.add_argument("--eval_fraction", type=float, help="of an eval split, where the data has none (0.1)")
    data.add_argument("--test_fraction", type=float, help="of a test split (0)")
    data.add_argument("--seed", type=int, help="of the random split (0)")
    args = parse_known(parser, argv)
    reading = Reading(dict(args.columns), args.dataset_config, args.split, plain_text=args.plain_text)
    args.reading = None if reading == AS_IT_IS else reading._asdict()
    del args.columns, args.dataset_config, args.split, args.plain_text
    if fault := _fault(args):
        parser.error(fault)
    if args.models and not args.output_dir:
        folder = in_home(args.models[0])
        args.output_dir = (folder if folder.is_dir() else Path("trained") / folder.name) / "evaluation"
    args.precisions = list(dict.fromkeys(args.precisions or [full_precision(), "nf4"]))
    return args


def _fault(args: argparse.Namespace) -> str | None:
    if args.models and args.judged:
        return "give models to evaluate or --judged, not both"
    if not (args.models or args.judged):
        return "give a model to evaluate, or --judged with sheets that were filled in"
    for name in ("batch_size", "max_length", "limit"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            return f"--{name} must be above 0"
    for name in ("eval_fraction", "test_fraction"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            return f"--{name} must be at least 0 and below 1"
    if args.sheet is not None and args.sheet < 0:
        return "--sheet must be 0 or more"
    return None


if __name__ == "__main__":
    main()
