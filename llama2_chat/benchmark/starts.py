"""What starts in how much GPU memory, and for how many tokens of conversations there is room then.

Every start has a process of its own, which is left with that much memory in all and answers a full batch of users.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import throughput
from llama2_chat.benchmark.local_model import load, time_full_answers
from llama2_chat.benchmark.shapes import (
    checkpoint_folder,
    limit_memory,
    make_checkpoint,
    use_gpus,
    wait_for_compilation,
)
from llama2_chat.process import python_command

PRECISIONS = ("none", "int8", "int4", "nf4", "auto")
CAPS_GB = (16, 22, 24, 40, 48, 78)
PROMPT_TOKENS, ANSWER_TOKENS = 1_000, 32  # of each user


def measure(
    shapes: Sequence[str],
    precisions: Sequence[str],
    tokenizer: str,
    checkpoint: Path | None,
    gpu_memory_gb: float | None,
) -> Iterator[Figures]:
    """precisions: as QUANTIZATION has them, or () for all.

    checkpoint: a folder with one folder per shape, where the weights are, or are put for the next run.
    """
    if not torch.cuda.is_available():
        sys.exit("--starts measures a GPU, and there is none.")
    use_gpus(1)
    with checkpoint_folder(checkpoint) as folder:
        for shape in shapes:
            for cap in CAPS_GB if gpu_memory_gb is None else (gpu_memory_gb,):
                for quantization in precisions or PRECISIONS:
                    arguments = [shape, tokenizer, str(folder / shape), quantization, str(cap)]
                    command = [*python_command("llama2_chat.benchmark.starts:start"), *arguments]
                    child = subprocess.run(command, capture_output=True, text=True)
                    lines = (child.stderr if child.returncode else child.stdout).strip().splitlines()
                    yield {f"{shape}, QUANTIZATION={quantization}, {cap:g} GB": lines[-1]}


def start() -> None:
    """Print what one start leaves room for; exit with the sentence of whatever refuses or fails."""
    shape, tokenizer, folder, quantization, cap = sys.argv[1:]
    make_checkpoint(shape, tokenizer, Path(folder))
    limit_memory(1, float(cap))
    chat = load(["--model-id", folder, "--quantization", quantization])
    wait_for_compilation(chat)
    time_full_answers(chat)
    engine = chat.serving.engine
    users = min(engine.runner.max_batch, engine.occupancy.kv_capacity_tokens // (PROMPT_TOKENS + ANSWER_TOKENS))
    figures = throughput(chat, users, PROMPT_TOKENS, ANSWER_TOKENS)
    print(
        json.dumps(
            {
                "precision": chat.status.precision,
                "KV_CACHE": chat.status.kv_cache,
                "KV tokens": engine.occupancy.kv_capacity_tokens,
                "context": engine.context_length,
                "mode": engine.mode,
                f"{users} users, tokens/s": round(figures["tokens/s"]),
            }
        )
    )
