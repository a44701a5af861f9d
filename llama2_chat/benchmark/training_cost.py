"""QLoRA of a shape by sft_trainer.py, beside TRL called directly: tokens/s and memory.

The two trainers take turns in one process: in processes of their own, one after another, the same step came out 0.91
and 1.19 times as fast as itself on a machine whose processor is shared.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import gpu_gb
from llama2_chat.benchmark.shapes import check_gpu, checkpoint_folder, make_checkpoint, use_gpus

if TYPE_CHECKING:
    from transformers import Trainer

STEPS, BATCH, TOKENS = 6, 4, 512
ROUNDS = 8


def measure(shape: str | None, tokenizer: str, checkpoint: Path | None) -> Iterator[Figures]:
    """shape: None measures 13b and 7b. checkpoint: where the weights of each shape are kept."""
    shapes = [shape] if shape else ["13b", "7b"]
    check_gpu(shapes[0])
    use_gpus(1)  # in the processes below: TRL refuses to see several
    yield {"batch": f"{BATCH} x {TOKENS} tokens", "torch": torch.__version__}
    for name in shapes:
        with checkpoint_folder(checkpoint and checkpoint / name) as folder:
            # In processes of their own, which leave no memory behind.
            run_in_process(make_checkpoint, name, tokenizer, folder)
            figures = run_in_process(train_speeds, folder)
        yield {f"{name}, {row}": value for row, value in figures.items()}


def run_in_process(function: Callable[..., Any], *args: object) -> Any:
    """What the function returns. Its memory, of a GPU too, is free again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(function, *args).result()


def train_speeds(folder: Path) -> dict[str, object]:
    """Tokens/s of the median step of both trainers, and what the first one needs while it is alone."""
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(sys.stderr):
        ours = our_trainer(folder, Path(output_dir))
        step_times(ours)  # warms up
        memory: dict[str, object] = {
            "peak memory, GB": gpu_gb(torch.cuda.max_memory_allocated),
            "peak memory with what PyTorch keeps, GB": gpu_gb(torch.cuda.max_memory_reserved),
        }
        theirs = plain_trainer(folder, Path(output_dir))
        step_times(theirs)
        turns = [(step_times(ours), step_times(theirs)) for _ in range(ROUNDS)]
    our_steps = [seconds for steps, _ in turns for seconds in steps]
    their_steps = [seconds for _, steps in turns for seconds in steps]
    return memory | {
        "ours, tokens/s": BATCH * TOKENS / statistics.median(our_steps),
        "TRL directly, tokens/s": BATCH * TOKENS / statistics.median(their_steps),
        "ours / TRL directly, median step": statistics.median(their_steps) / statistics.median(our_steps),
        # Where the processor is slow or shared, launching kernels takes longer than computing them, and the median
        # shows what else ran there.
        "ours / TRL directly, fastest step": min(their_steps) / min(our_steps),
    }


def step_times(trainer: Trainer) -> list[float]:
    """Seconds of each step but the first, from its beginning to the beginning of the next."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(clock := Clock())
    trainer.train()
    trainer.remove_callback(clock)
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


def _random_rows() -> list[list[int]]:
    ids = torch.randint(3, 32000, (STEPS * BATCH, TOKENS), generator=torch.Generator())
    return ids.tolist()


def our_trainer(folder: Path, output_dir: Path) -> Trainer:
    from llama2_chat.loading.load import load_base
    from llama2_chat.loading.memory import visible_gpus
    from llama2_chat.prompt import TokenizedExample
    from llama2_chat.training.base_model import fetch_base, no_progress
    from llama2_chat.training.options import Options
    from llama2_chat.training.trainer import make_trainer

    options = Options(
        model_name=str(folder),
        dataset_names=["none"],
        output_dir=output_dir,
        learning_rate=2e-4,
        use_peft=True,
        load_in_4bit=True,
        batch_size=BATCH,
        max_length=TOKENS,
        num_train_epochs=1,
        save_steps=0.99,  # of the run: it saves only near the end, as the other trainer never saves
    )
    base = fetch_base(options.model_name)
    model = load_base(base.checkpoint, "nf4", 0 if visible_gpus() else "cpu", no_progress)
    examples = {"train": [TokenizedExample(ids, [(0, len(ids))]) for ids in _random_rows()], "eval": []}
    return make_trainer(options, model, base.tokenizer, examples)


def plain_trainer(folder: Path, output_dir: Path) -> Trainer:
    """As TRL's and PEFT's own documentation does it."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from llama2_chat.loading.quantize import nf4_config

    has_gpu = torch.cuda.is_available()
    return SFTTrainer(
        str(folder),
        args=SFTConfig(
            output_dir=str(output_dir),
            model_init_kwargs={
                "quantization_config": nf4_config(torch.bfloat16),
                "dtype": torch.bfloat16,
                "device_map": {"": 0 if has_gpu else "cpu"},
            },
            per_device_train_batch_size=BATCH,
            max_length=TOKENS,
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=has_gpu,
            use_cpu=not has_gpu,
            gradient_checkpointing=has_gpu,
            dataloader_pin_memory=has_gpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in _random_rows()]),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
