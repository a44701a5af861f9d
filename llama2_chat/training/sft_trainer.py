"""Teach a model from conversations: QLoRA, LoRA or all its weights, in the chat's own format, and show what it learnt.

    python scripts/sft_trainer.py --demo                           the embedded model, two CPU cores, a few minutes
    python scripts/sft_trainer.py --model_name meta-llama/Llama-2-7b-hf \\
        --dataset_name timdettmers/openassistant-guanaco --load_in_4bit --use_peft \\
        --batch_size 4 --gradient_accumulation_steps 2                                          QLoRA on one GPU
    accelerate launch --num_processes 2 scripts/sft_trainer.py ...                              on two
    python scripts/sft_trainer.py --demo --folds 5 --output_dir trained/folds     five times, each without another fifth
    MODEL_ID=folder python app.py                                                               talk to what came out

TRL's SFTTrainer trains; what it is given are ready-made ids and labels, so that no template but the chat's has a say.
Reading data is chat_data.py's, dividing it splits.py's, models are the room loading's, what is kept report.py's.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from llama2_chat import ROOT, prompt
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.loading import choose, load
from llama2_chat.loading.choose import Checkpoint, Plan
from llama2_chat.loading.memory import compute_dtype, visible_gpus
from llama2_chat.loading.small_model import EMBEDDED
from llama2_chat.prompt import TokenizedExample
from llama2_chat.settings import Settings
from llama2_chat.training import chat_data, merging, report, splits
from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.report import Curves, Run
from llama2_chat.training.splits import Parts

if TYPE_CHECKING:
    from trl import SFTTrainer

COMPARED = 5  # questions of each part that are asked before and after
ANSWER_TOKENS = 64
EVAL_STEPS = 0.05  # of a run, after which it is measured on what is held out, and saved
DEMO = {
    "model_name": EMBEDDED,
    "dataset_name": str(ROOT / "data"),
    "output_dir": Path("trained/demo"),
    "use_peft": True,
    "batch_size": 8,
    "num_train_epochs": 6.0,
    "learning_rate": 1e-3,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    # It asks for a package that nobody needs here, and for int8 it logs a line for each layer and batch.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # TRL 1.16 and PEFT 0.21 call transformers 5.23 by names that it has given up.
    warnings.filterwarnings("ignore", r".*gradient_checkpointing` is deprecated", FutureWarning)
    if "LOCAL_RANK" not in os.environ:  # not from `accelerate launch`: TRL refuses a process that sees several GPUs
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        with limits_told([*_knobs(args)], args.output_dir, "--resume keeps what was saved."):
            train(args)
    except ChatError as error:
        sys.exit(f"sft_trainer.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. The same command with --resume goes on from the last checkpoint in {args.output_dir}.")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for. Ends the program with a sentence and exit code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--demo", action="store_true", help="teach the embedded model the facts in data/; other flags still count")
    add("--model_name", help=f"Hub id or folder of the model to teach, or {EMBEDDED}")
    add("--dataset_name", help="JSONL, JSON, CSV or Parquet file, a folder of them, or a data set's id on the Hub")
    add("--output_dir", type=Path, help="where checkpoints, the result and its report go (trained/MODEL)")
    add("--use_peft", action="store_true", help="train a LoRA adapter instead of all weights")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load_in_4bit", action="store_true", help="NF4, double quantisation: with --use_peft, QLoRA")
    bits.add_argument("--load_in_8bit", action="store_true", help="LLM.int8, with --use_peft")
    add("--lora_r", type=int, default=16, help="rank of the adapter (16)")
    add("--lora_alpha", type=int, default=32, help="its weight is alpha / r (32)")
    add("--lora_dropout", type=float, default=0.05, help="(0.05)")
    add("--target_modules", nargs="+", default=["all-linear"], help="layers that get an adapter (all-linear)")
    add("--batch_size", type=int, default=4, help="conversations computed at once on each GPU (4)")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches in one step of learning (1)")
    add("--num_train_epochs", type=float, default=3.0, help="how often each conversation is seen (3)")
    add("--learning_rate", type=float, help="at its highest (2e-4 for an adapter, 2e-5 for all weights)")
    add("--max_length", type=int, default=1024, help="tokens of a conversation; longer ones lose exchanges (1024)")
    add("--packing", action="store_true", help="put short conversations together into one row of max_length")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    add("--eval_fraction", type=float, default=0.1, help="held out, where the data has no part for it (0.1)")
    add("--test_fraction", type=float, default=0.0, help="kept for a last test and never looked at while training (0)")
    add("--folds", type=int, default=0, metavar="K",
        help="train K times, each without another K-th, to see how far the held-out loss can be trusted")  # fmt: skip
    add("--early_stopping", type=int, nargs="?", const=3, metavar="N",
        help="stop when the held-out loss has not fallen N times in a row (3), and keep the best")  # fmt: skip
    add("--report_to", "--log_with", default="none", choices=("none", "trackio", "wandb", "tensorboard"),
        help="who else follows the run (none)")  # fmt: skip
    add("--merge_to", type=Path, metavar="FOLDER", help="also write the model with the adapter merged into it")
    add("--merge_and_push", metavar="REPO", help="merge, and upload the merged model to this repository on the Hub")
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if fault := _fault(args):
        parser.error(fault)
    args.output_dir = args.output_dir or Path("trained") / Path(args.model_name).name
    args.learning_rate = args.learning_rate or (2e-4 if args.use_peft else 2e-5)
    return args


def _fault(args: argparse.Namespace) -> str | None:
    if not (args.model_name and args.dataset_name):
        return "give --model_name and --dataset_name, or --demo"
    if (args.load_in_4bit or args.load_in_8bit) and not args.use_peft:
        return "weights in 4 or 8 bits cannot be trained themselves; add --use_peft"
    if (args.merge_to or args.merge_and_push) and not args.use_peft:
        return "only an adapter can be merged; add --use_peft, or leave out --merge_to and --merge_and_push"
    for name in ("batch_size", "gradient_accumulation_steps", "lora_r", "lora_alpha", "num_train_epochs", "max_length"):
        if not getattr(args, name) > 0:
            return f"--{name} must be above 0"
    if args.learning_rate is not None and not args.learning_rate > 0:
        return "--learning_rate must be above 0"
    if not 0 <= args.seed < 2**32:
        return "--seed must be from 0 to below 2^32"
    for name in ("lora_dropout", "eval_fraction", "test_fraction"):
        if not 0 <= getattr(args, name) < 1:
            return f"--{name} must be from 0 to below 1"
    if args.folds and args.folds < 2:
        return "--folds must be 2 or more"
    if args.folds and (args.merge_to or args.merge_and_push):
        return "--folds measures and gives no model to merge; leave out --merge_to and --merge_and_push"
    if args.early_stopping is not None and args.early_stopping < 1:
        return "--early_stopping must be 1 or more"
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        return f"--report_to {args.report_to} needs a package: pip install {args.report_to}"
    return None


def train(args: argparse.Namespace) -> None:
    """From the data to the report; everything that can be refused is refused before weights are loaded."""
    check_folders(args)
    find_checkpoint(args.output_dir, args.resume)
    data, run = chat_data.read(args.dataset_name), describe(args)
    parts = splits.divide(data, run)
    told(*data.told(), *parts[0].told)
    run = replace(run, learnt_sha256=splits.fingerprint(parts))
    plan, tokenizer = fetch(args.model_name)
    if args.merge_and_push:
        merging.create_repo(args.merge_and_push)
    if args.folds:
        train_folds(args, run, parts, plan, tokenizer)
        return
    samples = learn(args, run, parts[0], plan, tokenizer)
    told(f"Talk to the model: MODEL_ID={args.output_dir} python app.py")
    if run.merged_to and PartialState().is_main_process:
        free_memory()  # for the full-precision base
        folder = Path(run.merged_to)
        moved = merging.merge(plan, tokenizer, args.output_dir, folder, samples)
        report.write_run(run, args.output_dir)  # if it was done before, it did not say so
        told(f"The merged model is in {folder}; its logits differ from the adapter's by {moved:.1g} at most.")
        if args.merge_and_push:
            merging.push(folder, args.merge_and_push)
            told(f"It is at https://huggingface.co/{args.merge_and_push}.")


def train_folds(
    args: argparse.Namespace, run: Run, parts: list[Parts], plan: Checkpoint, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One training for each fold, each from the untaught model, and one page about all of them."""
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    for i, part in enumerate(parts, 1):
        if not chat_data.encode(part.held_out, tokenizer, stop_ids, args.max_length)[0]:
            raise ChatError(
                f"What fold {i} holds out does not fit into {args.max_length:,} tokens. Raise --max_length."
            )
    if PartialState().is_main_process:
        report.write_run(run, args.output_dir)
    for i, part in enumerate(parts, 1):
        folder, of_fold = args.output_dir / f"fold-{i}", replace(run, fold=i, learnt_sha256=splits.fingerprint([part]))
        told(f"\nFold {i} of {args.folds}")
        learn(argparse.Namespace(**vars(args) | {"output_dir": folder}), of_fold, part, plan, tokenizer)
        free_memory()
    if PartialState().is_main_process:
        write_folds_report(args, plan, parts)


def learn(
    args: argparse.Namespace, run: Run, parts: Parts, plan: Checkpoint, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """One training, with all that is kept of it in args.output_dir. Returns the ids of two conversations learnt."""
    checkpoint = find_checkpoint(args.output_dir, args.resume, run.learnt_sha256)
    stop_ids = load.find_stop_ids(tokenizer, load.read_generation_config(plan.base))
    lessons = {}
    for part, rows in (("learnt", parts.learnt), ("held out", parts.held_out), ("test", parts.test)):
        lessons[part], faults = chat_data.encode(rows, tokenizer, stop_ids, args.max_length)
        if rows:
            tokens = sum(len(lesson.input_ids) for lesson in lessons[part])
            told(f"{part}: {len(lessons[part]):,} conversations, {tokens:,} tokens.", *faults)
    if not lessons["learnt"]:
        raise ChatError("Nothing is left to learn. Raise --max_length, or look at the rows named above.")
    if args.early_stopping and not lessons["held out"]:
        raise ChatError("--early_stopping needs something held out. Raise --eval_fraction, or give more data.")
    samples = [lesson.input_ids for lesson in lessons["learnt"][:2]]
    if checkpoint and report.read_curves(args.output_dir):
        told(f"{args.output_dir} is done.")
        return samples
    if run.fold in (None, 1):
        told(*(f"\n{chat_data.marked(lesson, tokenizer)}" for lesson in lessons["learnt"][:3]))
        told("\n⟦ ⟧ is what is learnt.\n")

    found = visible_gpus()
    model = load.load_base(plan, run.precision, PartialState().local_process_index if found else "cpu", silent)
    layers = [f".{name}" for name, _ in model.named_modules()]
    for target in args.target_modules:  # PEFT would pass over one that is misspelt beside others
        if target != "all-linear" and not any(layer.endswith(f".{target}") for layer in layers):
            raise ChatError(f"--target_modules: the model has no layer called {target}.")
    compared = to_compare(parts, tokenizer, args.max_length)

    def answers(model: PreTrainedModel) -> list[str]:
        batches = (compared[i : i + args.batch_size] for i in range(0, len(compared), args.batch_size))
        return [text for batch in batches for text in answer(model, tokenizer, batch, stop_ids)]

    answers_file = args.output_dir / "answers.json"
    if PartialState().is_main_process:
        report.write_run(run, args.output_dir)
        if not (checkpoint and answers_file.is_file()):
            answers_file.write_text(json.dumps(answers(model), ensure_ascii=False, indent=1), "utf-8")
    trainer = make_trainer(args, model, tokenizer, lessons, resumed=checkpoint is not None)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    seconds = time.perf_counter() - started
    trainer.save_model()
    if trainer.is_world_process_zero():
        if args.use_peft:
            name_base(args.output_dir, plan)
        before = json.loads(answers_file.read_text("utf-8"))
        after = answers(trainer.model)
        rows = report.curves(trainer.state.log_history)
        memory = "GPU memory, at most" if found else "memory, at the end"
        time_taken = "time since --resume" if checkpoint else "time"
        figures = {time_taken: f"{seconds / 60:.1f} minutes", memory: f"{memory_gb():.1f} GB"}
        write_report(args, plan, lessons, rows, figures, list(zip(compared, before, after, strict=True)))
        report.write_curves(rows, args.output_dir)  # last: a fold that has them is done
        told(f"\nThe report is {args.output_dir / 'README.md'}.")
    return samples


def told(*lines: str) -> None:
    if PartialState().is_main_process:
        print(*lines, sep="\n", flush=True)  # a log is read while it grows


def free_memory() -> None:
    gc.collect()  # a trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Downloads draw a bar of their own."""


# ---- Before the weights ----


def check_folders(args: argparse.Namespace) -> None:
    """Raises ChatError unless what comes of the run can be written, and over nothing else."""
    taken = {Path(name).resolve() for name in (args.model_name, args.dataset_name)}
    for folder in filter(None, (args.output_dir, args.merge_to)):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if folder.resolve() in taken or not (there.is_dir() and os.access(there, os.W_OK)):
            raise ChatError(f"Nothing can be written to {folder}: give another --output_dir or --merge_to.")
        taken.add(folder.resolve())
    if args.merge_to and not args.resume and args.merge_to.is_dir() and any(args.merge_to.iterdir()):
        raise ChatError(f"--merge_to {args.merge_to} is not empty. Choose another folder.")


def fetch(model_name: str) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    """The model's files but not its weights, and its tokenizer with the format in which it will chat."""
    settings = Settings.read([])
    plan = choose.fetch(Plan(model_name, "", "none", settings.cache_dir.expanduser(), settings.hub_cache_dir), silent)
    if plan.adapter:
        raise ModelUnavailable(f"{model_name} is an adapter. Merge it into its base model first, or train the base.")
    tokenizer = load.load_tokenizer(plan)
    if prompt.recognise(tokenizer) == prompt.LLAMA_2_FORMAT and tokenizer.chat_template is None:
        tokenizer.chat_template = prompt.LLAMA_2_TEMPLATE  # saved with the result: a base model has none
    return plan, tokenizer


def describe(args: argparse.Namespace) -> Run:
    """What run.json will say, but for what was learnt."""
    data, here = Path(args.dataset_name).absolute(), Path.cwd()
    is_below = data.exists() and data.is_relative_to(here)
    merged = args.merge_to or (args.output_dir / "merged" if args.merge_and_push else None)
    return Run(
        model_name=args.model_name,
        dataset_name=data.relative_to(here).as_posix() if is_below else args.dataset_name,
        eval_fraction=args.eval_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
        folds=args.folds,
        fold=None,
        max_length=args.max_length,
        precision=precision(args),
        early_stopping=bool(args.early_stopping),
        merged_to=merged and str(merged),
        learnt_sha256=None,
    )


def find_checkpoint(output_dir: Path, resume: bool, learnt_sha256: str | None = None) -> Path | None:
    """The newest whole checkpoint, if the run is to go on from there.

    Raises ChatError if it is not to, or if what it has learnt has another fingerprint.
    """
    # The trainer writes its state last: without it the process died while it wrote.
    found = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    if not resume and (found or any(output_dir.glob("fold-*/checkpoint-*/trainer_state.json"))):
        raise ChatError(f"{output_dir} holds a run already. Go on with --resume, or choose another --output_dir.")
    if found and learnt_sha256 and report.read_run(output_dir).learnt_sha256 != learnt_sha256:
        raise ChatError(
            f"The run in {output_dir} has learnt other conversations: the data has changed, or --seed, --folds or "
            "what is held out. Give what it was begun with, or choose another --output_dir."
        )
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text("utf-8")))
    except ValueError:
        return False


def precision(args: argparse.Namespace) -> str:
    """Of the base model. All weights are trained in float32, for small steps get lost in 16 bits."""
    if args.load_in_4bit:
        return "nf4"
    if args.load_in_8bit:
        return "int8"
    return full_precision() if args.use_peft else "float32"


def full_precision() -> str:
    """Of this device: 16 bits, unless it is a CPU that would compute bfloat16 by hand."""
    found, cpu = visible_gpus(), torch.cpu.get_capabilities()
    if not (found or any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))):
        return "float32"
    return str(compute_dtype(found)).removeprefix("torch.")


# ---- Training ----


def make_trainer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: dict[str, list[TokenizedExample]],
    resumed: bool = False,
) -> SFTTrainer:
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    has_gpu, held_out = bool(visible_gpus()), bool(lessons["held out"])
    is_bfloat16 = compute_dtype(visible_gpus()) is torch.bfloat16
    config = SFTConfig(
        output_dir=str(args.output_dir),
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # of all steps, as everything below 1
        max_length=args.max_length,
        packing=args.packing,
        eval_packing=False,
        bf16=has_gpu and is_bfloat16,
        fp16=has_gpu and not is_bfloat16,
        use_cpu=not has_gpu,
        dataloader_pin_memory=has_gpu,
        gradient_checkpointing=has_gpu,  # a third slower, and a fraction of the memory, which is what a GPU lacks
        seed=args.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number would be told as 0
        eval_strategy="steps" if held_out else "no",
        eval_steps=EVAL_STEPS,
        eval_on_start=held_out and not resumed,
        save_strategy="steps",
        save_steps=EVAL_STEPS,
        save_total_limit=2,
        load_best_model_at_end=bool(args.early_stopping),
        restore_callback_states_from_checkpoint=True,  # else a resumed run waits anew before it stops early
        report_to=args.report_to,
        project=(args.output_dir.parent if args.folds else args.output_dir).name,
        run_name=args.output_dir.name,
        trackio_static_space_id=False,  # a run is followed here, not published
        disable_tqdm=True,  # ours says more
    )
    adapter = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules,
        task_type="CAUSAL_LM",
    )
    rows = {
        part: datasets.Dataset.from_list(
            [{"input_ids": lesson.input_ids, "labels": chat_data.labels(lesson)} for lesson in part_lessons]
        )
        for part, part_lessons in lessons.items()
        if part_lessons and part != "test"
    }
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=rows["learnt"],
        eval_dataset=rows.get("held out"),
        processing_class=tokenizer,
        peft_config=adapter if args.use_peft else None,
        callbacks=[Progress(), *([EarlyStoppingCallback(args.early_stopping)] if args.early_stopping else [])],
    )
    trainer.remove_callback(PrinterCallback)
    if config.fp16:
        for parameter in model.parameters():
            if parameter.requires_grad:  # TRL has made them bfloat16, which float16's loss scaling cannot take
                parameter.data = parameter.data.float()
    return trainer


class Progress(TrainerCallback):
    """One bar: steps, time left, loss, tokens/s and memory."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )
        self.shown: dict[str, str] = {}
        self.started, self.tokens_before = time.perf_counter(), None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            if self.tokens_before is None:  # a resumed run counts on from where it was
                self.tokens_before, self.started = logs["num_tokens"], time.perf_counter()
            else:
                seconds = time.perf_counter() - self.started
                self.shown["tokens/s"] = f"{(logs['num_tokens'] - self.tokens_before) / seconds:,.0f}"
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if "eval_loss" in logs:
            self.shown["held-out loss"] = f"{logs['eval_loss']:.3f}"
        self.shown["memory"] = f"{memory_gb():.1f} GB"
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def memory_gb() -> float:
    """What this process has taken of the GPU at most, or takes of a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


@contextmanager
def limits_told(knobs: Sequence[str], folder: Path, kept: str) -> Iterator[None]:
    """Memory that runs out becomes a sentence that says which knobs to turn, and so does a full disk."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ChatError) else error
        if cause is None:
            raise
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or "t allocate memory" in str(cause):
            raise ChatError(f"The memory ran out. In this order: {'; '.join(knobs)}. {kept}") from error
        # torch.save and safetensors say it in many ways, or only that a file is not as long as it should be.
        if "No space left" in str(cause) or (folder.is_dir() and shutil.disk_usage(folder).free < 2**20):
            raise ChatError(f"The disk that holds {folder} is full. Make room there. {kept}") from error
        raise


def _knobs(args: argparse.Namespace) -> Iterator[str]:
    """What takes less memory, best first."""
    if args.batch_size > 1:
        yield f"lower --batch_size {args.batch_size} and raise --gradient_accumulation_steps as much"
    if not args.load_in_4bit:
        yield f"add --load_in_4bit{'' if args.use_peft else ' --use_peft'}"
    yield f"lower --max_length {args.max_length}"


# ---- What came of it ----


def name_base(adapter: Path, plan: Checkpoint) -> None:
    """Let the adapter name its base as people do, not by the folder where this machine keeps it."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    name = plan.model_id if plan.is_embedded or plan.base.repo else str(plan.base.folder.absolute())
    file.write_text(json.dumps(config | {"base_model_name_or_path": name}, indent=2), "utf-8")


def to_compare(parts: Parts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[tuple[str, Conversation]]:
    """The first few conversations of both parts, held out first, whose last question fits into max_length."""
    chosen = []
    for part, rows in (("held out", parts.held_out), ("learnt", parts.learnt)):
        fitting = (row for row in rows if len(prompt.encode(tokenizer, row.messages[:-1])) <= max_length)
        chosen += [(part, row) for row in islice(fitting, COMPARED)]
    return chosen


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compared: list[tuple[str, Conversation]],
    stop_ids: set[int],
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """What the model would say, most likely token by token, in place of each conversation's last answer."""
    prompts = [prompt.encode(tokenizer, row.messages[:-1]) for _, row in compared]
    T, pad_id = max(map(len, prompts)), min(stop_ids)
    rows = [[pad_id] * (T - len(ids)) + ids for ids in prompts]
    mask = [[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad_id
            ),
        )
    model.train(was_training)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output[:, T:].tolist()]


def write_report(
    args: argparse.Namespace,
    plan: Checkpoint,
    lessons: dict[str, list[TokenizedExample]],
    rows: Curves,
    figures: dict[str, str],
    answers: list[tuple[tuple[str, Conversation], str, str]],
) -> None:
    """One page of Markdown. It is README.md, so that it is also what the Hub shows of the folder."""
    facts = {
        **_settings(args, plan),
        "conversations": ", ".join(f"{len(rows):,} {part}" for part, rows in lessons.items() if rows),
        "train loss": report.fall(rows, "train loss"),
        "held-out loss": report.fall(rows, "held-out loss"),
        **figures,
    }
    said = [
        (row.messages[-2]["content"], part, row.messages[-1]["content"], before, after)
        for (part, row), before, after in answers
    ]
    lines = report.table(("question", "part", "expected", "before", "after"), said)
    report.write_page(args.output_dir, plan.base.repo, facts, lines)


def write_folds_report(args: argparse.Namespace, plan: Checkpoint, parts: list[Parts]) -> None:
    """The same for all folds together."""
    curves = {f"fold {i}": report.read_curves(args.output_dir / f"fold-{i}") for i in range(1, args.folds + 1)}
    report.draw_curves(curves, args.output_dir / "curves.png")
    losses = [[row["held-out loss"] for row in rows if "held-out loss" in row] for rows in curves.values()]
    measured = [(values[0], values[-1], min(values)) for values in losses]
    before, after, lowest = map(report.mean_and_deviation, zip(*measured, strict=True))
    facts = _settings(args, plan) | {"held-out loss": f"{before} before, {after} after, mean ± standard deviation"}
    rows = [
        (name, len(part.learnt), len(part.held_out), *(f"{value:.3f}" for value in values))
        for name, part, values in zip(curves, parts, measured, strict=True)
    ]
    head = ("held-out loss", "learnt", "held out", "before", "after", "lowest")
    lines = report.table(head, [*rows, ("mean ± standard deviation", "", "", before, after, lowest)])
    report.write_page(args.output_dir, plan.base.repo, facts, lines)
    told(f"\nHeld-out loss: {facts['held-out loss']}, of {args.folds} folds.")
    told(f"The report is {args.output_dir / 'README.md'}.")


def _settings(args: argparse.Namespace, plan: Checkpoint) -> dict[str, str]:
    how = f"LoRA of rank {args.lora_r}, alpha {args.lora_alpha}," if args.use_peft else "all weights"
    return {
        "model": f"{report.public(plan.model_id)}, {how} on {precision(args)}",
        "data": report.public(args.dataset_name),
        "settings": f"{args.num_train_epochs:g} epochs, batch {args.batch_size} × {args.gradient_accumulation_steps}, "
        f"learning rate {args.learning_rate:g}, {args.max_length:,} tokens, seed {args.seed}",
    }
