"""Which precision a model should have on the GPU at hand: what runs, how well it answers, how fast; on a page to keep.

The model is the one that app.py would start. Each precision has a process of its own. Where 16 bits do not fit on the
GPU, their perplexity is measured all the same, with the layers that lack room in memory of the host.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import throughput, users_name
from llama2_chat.benchmark.local_model import (
    GB,
    PERPLEXITY_TEXT,
    gpu_gb,
    perplexity,
    text_ids,
    time_full_answers,
)
from llama2_chat.benchmark.shapes import wait_for_compilation
from llama2_chat.loading import EMBEDDED
from llama2_chat.process import python_command
from llama2_chat.settings import Settings
from model import ChatModel

PRECISIONS = {"none": "16 bits", "int8": "int8", "int4": "int4", "nf4": "NF4"}  # as QUANTIZATION has them
MOST_RISE = 0.02  # of int4's perplexity over that of 16 bits, if it shall be the default in four bits
USERS, PROMPT_TOKENS, ANSWER_TOKENS, PERPLEXITY_TOKENS = (1, 8, 32), 512, 256, 8192
CPU_USERS, CPU_PROMPT_TOKENS, CPU_ANSWER_TOKENS, CPU_PERPLEXITY_TOKENS = (1, 8), 64, 32, 2048
OWN_GRID = "What it should take in four bits the small model cannot tell: its own weights come in four bits."
ROOM_GB = 4  # of each GPU, left for steps where the layers that lack room are elsewhere
PAGE = Path("acceptance.md")


def measure(page: Path) -> Iterator[Figures]:
    """page: the Markdown file that is written."""
    where = {"hardware": _hardware(), "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    yield where
    found: dict[str, Mapping[str, Any]] = {}
    for quantization, name in PRECISIONS.items():
        command = [*python_command("llama2_chat.benchmark.acceptance:measure_precision"), quantization]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = (child.stderr if child.returncode else child.stdout).strip().splitlines() or ["it ended"]
        found[name] = {"does not run": lines[-1]} if child.returncode else json.loads(lines[-1])
        yield {f"{name}, {figure}": value for figure, value in found[name].items()}
    if found["16 bits"].get("model") == EMBEDDED:
        said = OWN_GRID
    else:
        said = verdict({name: figures.get("perplexity") for name, figures in found.items()})
    page.write_text(_page(where, found, said), "utf-8")
    yield {"QUANTIZATION=auto": said, "page": str(page)}


def verdict(perplexities: Mapping[str, float | None]) -> str:
    """What QUANTIZATION=auto should take in four bits, by what was measured of each precision."""
    whole, int4, nf4 = (perplexities.get(name) for name in ("16 bits", "int4", "NF4"))
    missing = [name for name in ("16 bits", "int4", "NF4") if perplexities.get(name) is None]
    if whole is None or int4 is None or nf4 is None:
        return f"What it should take in four bits cannot be said: {' and '.join(missing)} could not be measured here."
    risen = f"int4's perplexity is {int4 / whole - 1:+.1%} beside that of 16 bits, and NF4's {nf4 / whole - 1:+.1%}"
    if int4 / whole - 1 <= MOST_RISE and int4 <= nf4:
        return f"It should become int4: {risen}."
    return f"It should stay NF4: {risen}; {MOST_RISE:+.0%} at most and not above NF4 was asked for."


def _hardware() -> str:
    if not torch.cuda.is_available():
        return f"a CPU, {torch.get_num_threads()} threads"
    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return " + ".join(f"{each.name}, {each.total_memory / GB:.0f} GB" for each in seen)


def _page(where: Figures, found: Mapping[str, Mapping[str, Any]], said: str) -> str:
    figures = list(dict.fromkeys(figure for each in found.values() for figure in each if figure != "does not run"))
    rows = [f"| {figure} | {' | '.join(_written(each.get(figure)) for each in found.values())} |" for figure in figures]
    failed = [f"- {name}: {each['does not run']}" for name, each in found.items() if "does not run" in each]
    model = next((each["model"] for each in found.values() if "model" in each), "A model")
    command = f"`python scripts/bench.py --accept`, {where['date']}, torch {where['torch']}"
    return "\n".join(
        [
            f"# {model} on {where['hardware']}",
            "",
            f"{command}. Perplexity: of {PERPLEXITY_TEXT}.",
            "",
            f"| | {' | '.join(found)} |",
            f"|---|{'---|' * len(found)}",
            *rows,
            "",
            *(["What does not run here:", "", *failed, ""] if failed else []),
            f"QUANTIZATION=auto: {said}",
            "",
        ]
    )


def _written(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


# ---- In a process of its own ----


def measure_precision() -> None:
    """Print the figures of one precision, as JSON."""
    (quantization,) = sys.argv[1:]
    chat = ChatModel(Settings.read(["--quantization", quantization]))
    started = time.perf_counter()
    chat.load()
    figures: dict[str, object] = {"model": chat.status.model}
    try:
        if chat.state == "ready":
            figures["load, s"] = time.perf_counter() - started
            figures |= _measured(chat)
        else:
            figures["does not run"] = chat.status.error
            if quantization == "none" and torch.cuda.is_available():
                figures["perplexity"] = _perplexity_beside_the_gpu(chat.settings)
    finally:
        chat.close()
    print(json.dumps(figures), flush=True)
    os._exit(0)  # threads that still compile would abort the process


def _measured(chat: ChatModel) -> Figures:
    on_gpu = torch.cuda.is_available()
    wait_for_compilation(chat)  # before the model computes here, too
    ids = text_ids(chat.serving.tokenizer, PERPLEXITY_TOKENS if on_gpu else CPU_PERPLEXITY_TOKENS)
    engine = chat.serving.engine
    figures: dict[str, object] = {
        "in memory as": chat.status.precision,
        "tokens of conversations": engine.occupancy.kv_capacity_tokens,
        "steps": engine.mode,
        "perplexity": perplexity(chat.serving.model, ids),
    }
    time_full_answers(chat)
    prompt, answer = (PROMPT_TOKENS, ANSWER_TOKENS) if on_gpu else (CPU_PROMPT_TOKENS, CPU_ANSWER_TOKENS)
    users = USERS if on_gpu else CPU_USERS
    throughput(chat, max(users), prompt, 8)  # warms up
    for count in users:
        speeds = throughput(chat, count, prompt, answer)
        figures[f"{users_name(count)}, tokens/s"] = speeds["tokens/s"]
        figures[f"{users_name(count)}, time to first token, worst, s"] = speeds["time to first token, worst, s"]
    figures["peak GPU memory, GB"] = gpu_gb(torch.cuda.max_memory_reserved)
    return figures


@torch.inference_mode()
def _perplexity_beside_the_gpu(settings: Settings) -> float | None:
    """Of the model in 16 bits, whose layers are elsewhere as far as the GPUs lack room; None if that fails, too."""
    from llama2_chat.loading.choose import choose, fetch
    from llama2_chat.loading.load import bring_plain
    from llama2_chat.loading.memory import compute_dtype, free_host_bytes, visible_gpus
    from llama2_chat.loading.read import load_tokenizer, read_model

    torch.cuda.empty_cache()
    with contextlib.suppress(Exception):
        checkpoint = fetch(choose(settings), lambda *progress: None)
        if checkpoint.adapter:  # the others' are of both
            return None
        files = bring_plain(checkpoint, lambda *progress: None)
        gpus = visible_gpus()
        room: dict[int | str, int] = {"cpu": free_host_bytes()}  # else they would be on a disk
        room |= {index: max(gpu.free_bytes - ROOM_GB * GB, 0) for index, gpu in enumerate(gpus)}
        model = read_model(files, compute_dtype(gpus), None, "auto", room)
        return perplexity(model.eval(), text_ids(load_tokenizer(checkpoint), PERPLEXITY_TOKENS))
    return None
