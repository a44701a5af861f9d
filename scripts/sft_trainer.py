"""Finetune a model on conversations: QLoRA, LoRA or all its weights, in the chat's own format, and show what changed.

    python scripts/sft_trainer.py --demo                           the embedded model, two CPU cores, a few minutes
    python scripts/sft_trainer.py --model_name meta-llama/Llama-2-7b-hf \\
        --dataset_name timdettmers/openassistant-guanaco --load_in_4bit --use_peft \\
        --batch_size 4 --gradient_accumulation_steps 2                                          QLoRA on one GPU
    accelerate launch --num_processes 2 scripts/sft_trainer.py ...                              on two
    accelerate launch --config_file deploy/fsdp.yaml scripts/sft_trainer.py ...              a model divided among two
    python scripts/sft_trainer.py --demo --folds 5 --output_dir trained/folds     five times, each without another fifth
    MODEL_ID=folder python app.py                                                               talk to what came out
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.loading import EMBEDDED
from llama2_chat.training.options import DEMO, METHODS, OPTIMIZERS, SCHEDULES, Options, add_reading_flags, parse_known

PATIENCE_S = 10  # accelerate launch looks every 0.1 s for processes that have ended


def main(argv: Sequence[str] | None = None) -> None:
    options = read_arguments(argv)
    if "LOCAL_RANK" not in os.environ:  # not from `accelerate launch`: TRL refuses a process that sees several GPUs
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # It asks for a package that nobody needs here, and for int8 it logs a line for each layer and batch.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL 1.16 and PEFT 0.21 use names that transformers 5.23 has deprecated.
    warnings.filterwarnings("ignore", r".*gradient_checkpointing` is deprecated", FutureWarning)
    from llama2_chat.training.resources import translate_resource_errors  # seconds of imports: not for --help
    from llama2_chat.training.run import train

    try:
        with translate_resource_errors(
            options.memory_remedies(), options.output_dir, "--resume goes on from what was saved."
        ):
            train(options)
    except ChatError as error:
        leave_it_to_the_first_process()
        sys.exit(f"sft_trainer.py: {error.detail}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command with --resume goes on from the last checkpoint in {options.output_dir}.")


def leave_it_to_the_first_process() -> None:
    """Of several processes that end with the same sentence only the first says it.

    `accelerate launch` ends the others, which wait for that. One that ends alone says why after a while.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage, of 40 lines, above the sentence."""
        leave_it_to_the_first_process()
        self.exit(2, f"{self.prog}: {message}\n")


def read_arguments(argv: Sequence[str] | None = None) -> Options:
    """What was asked for. Ends the program with a sentence and exit code 2 if it makes no sense."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given has the default of Options
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="teach the embedded model the facts in data/demo/; other flags still count")
    add("--model_name", help=f"Hub id or folder of the model to train, or {EMBEDDED}")
    add("--dataset_name", nargs="+", dest="dataset_names", metavar="NAME",
        help="JSONL, JSON, CSV or Parquet files, folders of them, or ids of data sets on the Hub")  # fmt: skip
    add("--dataset_weights", type=float, nargs="+", metavar="W",
        help="how often an epoch has the conversations of each: 2 twice, 0.5 half of them (1)")  # fmt: skip
    add("--streaming", action="store_true", help="read and fetch no more of the data than --max_steps needs")
    add_reading_flags(add)
    add("--preview", type=int, nargs="?", const=10, metavar="N",
        help="only show N conversations (10) as the model will see them, with what is learned marked")  # fmt: skip
    add("--output_dir", type=Path, help="where checkpoints, the result and its report go (trained/MODEL)")
    add("--method", choices=METHODS, metavar="NAME",
        help="sft: learn the answers (sft); dpo: from pairs (chosen, rejected); kto: good and bad (label)")  # fmt: skip
    add("--beta", type=float, help="of dpo and kto: the higher, the closer the model stays to what it was (0.1)")
    add("--use_peft", action="store_true", help="train a LoRA adapter instead of all weights")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load_in_4bit", action="store_true", help="NF4, double quantisation: with --use_peft, QLoRA")
    bits.add_argument("--load_in_8bit", action="store_true", help="LLM.int8, with --use_peft")
    add("--lora_r", type=int, help="rank of the adapter (16)")
    add("--lora_alpha", type=int, help="its weight is alpha / r (32)")
    add("--lora_dropout", type=float, help="(0.05)")
    add("--use_rslora", action="store_true", help="weigh the adapter by alpha / √r, for large ranks")
    add("--use_dora", action="store_true", help="DoRA: directions and lengths of the weights apart")
    add("--target_modules", nargs="+", help="layers that get an adapter (all-linear)")
    add("--modules_to_save", nargs="+", metavar="LAYER", help="layers that are trained whole and kept with the adapter")
    add("--batch_size", type=int, help="conversations computed at once on each GPU (4)")
    add("--gradient_accumulation_steps", type=int, help="batches in one optimizer step (1)")
    add("--num_train_epochs", type=float, help="how often each conversation is seen (3)")
    add("--max_steps", type=int, help="train for so many steps rather than epochs")
    add("--learning_rate", type=float, help="at its highest (adapter 2e-4, all weights 2e-5; dpo and kto 1e-5, 1e-6)")
    add("--lr_scheduler_type", choices=SCHEDULES, metavar="NAME", help=f"{', '.join(SCHEDULES)} (cosine)")
    add("--warmup_ratio", type=float, help="of all steps, over which the learning rate rises (0.03)")
    add("--optim", choices=OPTIMIZERS, metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (adamw_torch_fused)")
    add("--weight_decay", type=float, help="(0)")
    add("--save_steps", type=float, help="steps after which the run is measured and saved; below 1: of all (0.05)")
    add("--logging_steps", type=int, help="steps between two train losses (1)")
    add("--max_length", type=int, help="tokens of a conversation; longer ones lose exchanges (1024)")
    add("--packing", action="store_true", help="put short conversations together into one row of max_length")
    add("--seed", type=int, help="of everything random (0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    add("--resume_with_changes", action="store_true", help="the same with other flags or data than at the first start")
    add("--eval_fraction", type=float, help="of an eval split, where the data has none (0.1)")
    add("--test_fraction", type=float, help="of a test split, which training never looks at (0)")
    add("--folds", type=int, metavar="K",
        help="train K times, each without another K-th, to see how far the eval loss can be trusted")  # fmt: skip
    add("--early_stopping", type=int, nargs="?", const=3, metavar="N",
        help="stop when the eval loss has not fallen N times in a row (3), and keep the best")  # fmt: skip
    add("--report_to", "--log_with", choices=("none", "trackio", "wandb", "tensorboard"),
        help="who else follows the run (none)")  # fmt: skip
    add("--merge_to", type=Path, metavar="FOLDER", help="also write the model with the adapter merged into it")
    add("--merge_and_push", metavar="REPO", help="merge, and upload the merged model to this repository on the Hub")
    if "--demo" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**DEMO)
    flags = vars(parse_known(parser, argv))
    flags.pop("demo", None)
    flags["columns"] = dict(flags["columns"])
    if not (flags.get("model_name") and flags.get("dataset_names")):
        parser.error("give --model_name and --dataset_name, or --demo")
    flags.setdefault("output_dir", Path("trained") / Path(flags["model_name"]).name)
    is_sft = flags.get("method", "sft") == "sft"
    rates = (2e-4, 2e-5) if is_sft else (1e-5, 1e-6)
    flags.setdefault("learning_rate", rates["use_peft" not in flags])
    if not is_sft:
        flags.setdefault("lora_dropout", 0.0)  # the answers are compared with what the model said without any
    try:
        return Options(**flags)
    except ChatError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
