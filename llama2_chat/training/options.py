"""The flags of scripts/sft_trainer.py, checked. Nothing heavy is imported here: --help is immediate."""

from __future__ import annotations

import importlib.util
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.loading import EMBEDDED
from llama2_chat.training.row_formats import known_columns

DEMO: dict[str, Any] = {
    "model_name": EMBEDDED,
    "dataset_names": [str(ROOT / "data" / "demo")],
    "output_dir": Path("trained/demo"),
    "use_peft": True,
    "batch_size": 4,
    "num_train_epochs": 5.0,
    "learning_rate": 1e-3,
}
METHODS = ("sft", "dpo", "kto")
# Flags that decide what a training gives, beside those of the model, the data and its splits.
DECIDING = (
    "learning_rate",
    "num_train_epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "lr_scheduler_type",
    "warmup_ratio",
    "optim",
    "weight_decay",
    "packing",
    "dataset_weights",
    "method",
    "beta",
    "early_stopping",
    "save_steps",
    "logging_steps",
    "use_peft",
)
LORA = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save")
# Those of transformers that need no settings of their own.
SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup"),
    *("cosine_with_restarts", "polynomial", "inverse_sqrt"),
)
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "adafactor", "sgd"),
    *("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),  # of bitsandbytes
)
# What TRL, axolotl and LLaMA-Factory call our flags, where no similarity tells.
OTHER_NAMES = {
    "model_name_or_path": "model_name",
    "base_model": "model_name",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "finetuning_type": "use_peft",
    "adapter": "use_peft",
    "quantization_bit": "load_in_4bit",
    "stage": "method",
    "rl": "method",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "resume_from_checkpoint": "resume",
    "dataset_train_split": "split",
    "interleave_probs": "dataset_weights",
    "mix_strategy": "dataset_weights",
    "val_size": "eval_fraction",
    "val_set_size": "eval_fraction",
    "eval_steps": "save_steps",
    "push_to_hub": "merge_and_push",
    "warmup_steps": "warmup_ratio",
}
POSITIVE = (
    "batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "num_train_epochs",
    "max_length",
    "learning_rate",
    "save_steps",
    "logging_steps",
    "beta",
)


def parse_known(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The flags. Ends the program with exit code 2 and a sentence for a flag that is none, with what may be meant."""
    argv = sys.argv[1:] if argv is None else argv
    for flag, _, value in (text.partition("=") for text in argv):
        if value and any(flag in action.option_strings and action.nargs == 0 for action in parser._actions):
            parser.error(f"{flag} has no value: it is given as it is, or left out.")
    found, rest = parser.parse_known_args(argv)
    if rest:
        flags = [name for name in rest if name.startswith("-")]
        truths = {"true", "false"} & {text.lower() for text in rest}
        why = " Flags that are on or off have no value." if truths else ""
        parser.error(" ".join(_unknown(name, parser) for name in flags) or f"{rest[0]} belongs to no flag.{why}")
    return found


def _unknown(flag: str, parser: ArgumentParser) -> str:
    known = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    other = OTHER_NAMES.get(name)
    near = [other] if other in known else get_close_matches(name, known, 1)
    return f"There is no {flag.partition('=')[0]}.{f' Is --{near[0]} meant?' if near else ''}"


def add_reading_flags(add: Callable[..., Any]) -> None:
    """How the data is read, of the fields of row_sources.Reading."""
    add("--columns", type=named_column, nargs="+", default=[], metavar="NAME=ROLE",
        help="what columns hold: user, assistant, system, or the name that a known format has for it")  # fmt: skip
    add("--dataset_config", default=None, help="which configuration of a data set on the Hub")
    add("--split", default=None, help='the only split of it that is read: "train_sft", "train[:10%%]"')
    add("--plain_text", action="store_true", default=False,
        help="learn a text column as it stands, whole: continued pre-training")  # fmt: skip


def named_column(text: str) -> tuple[str, str]:
    """ "question=user" -> the column, and what a known format calls it."""
    name, _, role = text.rpartition("=")
    known = {"user": "prompt", "assistant": "completion"} | {column: column for column in known_columns()}
    if not (name and role in known):
        raise ArgumentTypeError(f"{text!r} is not NAME=ROLE with one of the roles {', '.join(sorted(known))}")
    return name, known[role]


@dataclass(frozen=True)
class Options:
    """One run's flags, as --help explains them. Raises ChatError if they make no sense."""

    model_name: str
    dataset_names: Sequence[str]
    output_dir: Path
    learning_rate: float
    method: str = "sft"
    beta: float = 0.1  # of DPO and KTO: the higher, the closer the model stays to what it was
    use_peft: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: Sequence[str] = ("all-linear",)
    modules_to_save: Sequence[str] = ()  # layers that are trained whole beside the adapter
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # rather than num_train_epochs
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03  # of all steps
    optim: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    save_steps: float = 0.05  # after how many steps the run is measured and saved; below 1 a part of all steps
    logging_steps: int = 1
    max_length: int = 1024
    packing: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)  # of the data, and what a known format calls them
    dataset_config: str | None = None
    split: str | None = None
    plain_text: bool = False  # a text is learned as it stands
    dataset_weights: Sequence[float] = ()  # how often an epoch has the conversations of each data set; (): once
    streaming: bool = False  # no more is read than max_steps needs
    seed: int = 0
    resume: bool = False
    resume_with_changes: bool = False
    preview: int | None = None  # only show so many conversations
    eval_fraction: float = 0.1
    test_fraction: float = 0.0
    folds: int = 0  # 0: one training
    early_stopping: int | None = None  # measurements without a lower eval loss; None: never
    report_to: str = "none"
    merge_to: Path | None = None
    merge_and_push: str | None = None

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ChatError(fault)

    @property
    def goes_on(self) -> bool:
        return self.resume or self.resume_with_changes

    def deciding(self) -> dict[str, Any]:
        """The flags that decide what a training gives, by name, as JSON has them."""
        names = (*DECIDING, *(LORA if self.use_peft else ()))
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def memory_remedies(self) -> Iterator[str]:
        """What takes less memory, best first."""
        if self.batch_size > 1:
            yield f"lower --batch_size {self.batch_size} and raise --gradient_accumulation_steps as much"
        if not self.load_in_4bit:
            yield f"add --load_in_4bit{'' if self.use_peft else ' --use_peft'}"
        yield f"lower --max_length {self.max_length}"

    def conversations_needed(self, processes: int) -> int | None:
        """Of each data set, so that no step sees one again; None for all that there are."""
        if not self.streaming:
            return None
        assert self.max_steps  # _faults() says so
        trained = self.max_steps * self.batch_size * self.gradient_accumulation_steps * processes
        return math.ceil(trained / max(0.1, 1 - self.eval_fraction - self.test_fraction))

    def _faults(self) -> Iterator[str]:
        for name in (*POSITIVE, "weight_decay"):
            if getattr(self, name) == math.inf:
                yield f"--{name} must be finite."
        for name in POSITIVE:
            if not getattr(self, name) > 0:  # NaN is not
                yield f"--{name} must be above 0."
        for name in ("max_steps", "preview"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"--{name} must be above 0."
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset_names):
            yield f"--dataset_weights has {len(self.dataset_weights)} for {len(self.dataset_names)} in --dataset_name."
        if not all(0 < weight <= 100 for weight in self.dataset_weights):
            yield "--dataset_weights must be above 0, and at most 100."
        if self.streaming and not self.max_steps:
            yield "--streaming needs --max_steps, which says how much is read."
        if (self.use_dora or self.use_rslora or self.modules_to_save) and not self.use_peft:
            yield "DoRA, rsLoRA and --modules_to_save are for adapters; add --use_peft."
        if "all-linear" in self.target_modules and len(self.target_modules) > 1:
            yield "--target_modules: all-linear has all layers that can have an adapter; leave out the others."
        if self.method != "sft" and (self.packing or self.plain_text):
            yield f"--packing and --plain_text are not for --method {self.method}."
        if self.method == "kto" and self.batch_size < 2:
            yield "--method kto compares the answers of a batch: --batch_size must be 2 or more."
        if self.save_steps > 1 and self.save_steps % 1:
            yield "--save_steps must be a whole number of steps, or below 1 for a part of all steps."
        if not self.weight_decay >= 0:
            yield "--weight_decay must be at least 0."
        for name in ("lora_dropout", "warmup_ratio", "eval_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} must be at least 0 and below 1."
        if not 0 <= self.seed < 2**32:
            yield "--seed must be at least 0 and below 2^32."
        if self.folds and self.folds < 2:
            yield "--folds must be 2 or more."
        if self.early_stopping is not None and self.early_stopping < 1:
            yield "--early_stopping must be 1 or more."
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            yield "Weights in 4 or 8 bits cannot be trained themselves; add --use_peft."
        if self.merge_to or self.merge_and_push:
            yield from self._merging_faults()
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            yield f"--report_to {self.report_to} needs a package: pip install {self.report_to}"

    def _merging_faults(self) -> Iterator[str]:
        if not self.use_peft:
            yield "Only an adapter can be merged; add --use_peft, or leave out --merge_to and --merge_and_push."
        if self.folds:
            yield "--folds only measures, so there is no model to merge; leave out --merge_to and --merge_and_push."
