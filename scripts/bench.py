"""How fast and how large: measures this machine, prints each figure as it has it and, as its last line, JSON.

    python scripts/bench.py                                   the embedded model on the CPU, beside bfloat16 generate()
    python scripts/bench.py --shape 13b --quantization nf4 --gpu-memory-gb 22           a Llama 2 shape on a GPU
    python scripts/bench.py --accept                  which precision app.py's model should have on this GPU, on a page
    python scripts/bench.py --formats                   what int8, int4 and NF4 cost a small model that is trained first
    python scripts/bench.py --starts                            which shapes and precisions start in how much GPU memory
    python scripts/bench.py --shape 13b --quantization none --gpus 2                    the same, split over two
    python scripts/bench.py --shape 13b --quantization none --gpus 2 --tensor-parallel 2      both compute each layer
    python scripts/bench.py --shape 13b --plot users.png                 tokens/s and waiting against how many users
    python scripts/bench.py --shape 13b --page                           what 31 readers of the page and a Chromium cost
    python scripts/bench.py --browser           what the page takes from a Chromium, and 32 streams of it from an engine
    python scripts/bench.py --url http://gpu-1:8000               any OpenAI-compatible server, in the same rows
    python scripts/bench.py --documents                      what reading 200 pages takes, and from an answer meanwhile
    python scripts/bench.py --http                                       what the API costs, with 32 streams
    python scripts/bench.py --adapters                 eight users of the embedded model and of four adapters over it
    python scripts/bench.py --adapters --shape 13b --quantization int4                              the same on a GPU
    python scripts/bench.py --draft trained/draft                 what a head that guesses for the embedded model saves
    python scripts/bench.py --kv-formats             what keys and values in 8 bits lose, of the model that app.py loads
    python scripts/bench.py --soak                   ten minutes of readers who come and go, hostile ones among them
    python scripts/bench.py --train                          QLoRA of the 13B and the 7B, beside TRL called directly

A shape has random weights, which take the time and the memory of real ones and need no licence. Every ratio compares
two things measured in the same run, because machines are shared and noisy. The measuring is in llama2_chat/benchmark/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.benchmark import (
    Figures,
    acceptance,
    adapter_cost,
    browser_cost,
    document_cost,
    embedded,
    format_quality,
    kv_formats,
    page_cost,
    server_load,
    serving_cost,
    shapes,
    soak,
    speculation,
    starts,
    training_cost,
)
from llama2_chat.benchmark.plot import plot
from llama2_chat.settings import QUANTIZATIONS

USERS = (1, 8, 32)
PLOTTED_USERS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    args = read_arguments()
    rows: dict[str, object] = {}
    for figures in measure(args):
        rows |= figures
        for name, value in figures.items():
            print(f"{name:<62}  {value:.3g}" if isinstance(value, float) else f"{name:<62}  {value}", flush=True)
    print(json.dumps(rows))
    if args.plot:
        plot(rows, args.users, args.plot)
    if rows.get("every promise kept") is False:  # only a soak has promises
        sys.exit(1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=shapes.SHAPES, help="measure this shape of Llama 2, with random weights")
    add("--quantization", choices=QUANTIZATIONS, default="auto", help="as app.py takes it")
    add("--gpus", type=int, default=1, help="GPUs to use with --shape")
    add("--tensor-parallel", default="1", help="as app.py takes it, with --shape")
    add("--gpu-memory-gb", type=float, help="leave each GPU with no more memory than this")
    add("--starts", nargs="*", choices=starts.PRECISIONS, help="what starts in --gpu-memory-gb, or in several sizes")
    add("--accept", type=Path, nargs="?", const=acceptance.PAGE, help="which precision is right; where the page goes")
    add(
        "--formats",
        action="store_true",
        help="train a small model for minutes on a GPU, and measure it in each precision",
    )
    add("--tokenizer", default=os.environ.get("LLAMA2_TOKENIZER", "meta-llama/Llama-2-13b-chat-hf"))
    add("--checkpoint", type=Path, help="where the shape's weights are, or are put for the next run")
    add("--users", type=_counts, help="how many at once, such as 1,8,32")
    add("--page", action="store_true", help="measure what the page takes from 32 users, too")
    add("--browser", action="store_true", help="measure the page in a Chromium and with 32 streams, with no model")
    add("--documents", action="store_true", help="measure the reading of documents, beside the embedded model")
    add("--plot", type=Path, help="draw tokens/s and time to first token against users, as a PNG")
    add("--http", action="store_true", help="the embedded model's speed over HTTP and without")
    add("--soak", type=float, nargs="?", const=10, help="minutes of readers of a server with the embedded model")
    add("--readers", type=int, default=32, help="healthy ones of a soak")
    add("--hostile", type=int, default=16, help="hostile readers of a soak, for its first two thirds")
    add(
        "--adapters",
        action="store_true",
        help="what four adapters cost eight users of the embedded model, or of --shape",
    )
    add("--draft", type=Path, help="what this DRAFT_MODEL for the embedded model saves")
    add("--kv-formats", action="store_true", help="perplexity and greedy answers with each KV_CACHE")
    add("--train", action="store_true", help="measure training instead, of --shape or of 13b and 7b")
    add("--url", help="measure this server; INFERENCE_MODEL and INFERENCE_KEY as app.py takes them")
    args = parser.parse_args()
    if args.soak is not None and not 0 < args.soak < float("inf"):
        parser.error(f"--soak must be minutes above 0; it was {args.soak:g}.")
    for path in filter(None, (args.accept, args.plot)):  # before it is measured for an hour
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            parser.error(f"{path} cannot be written. Name a file in a folder that is there and is yours.")
    args.users = args.users or _default_users(args)
    return args


def _counts(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"it must be numbers from 1 on, such as 1,8,32; it was {text!r}.")
    return tuple(sorted(map(int, numbers)))


def _default_users(args: argparse.Namespace) -> tuple[int, ...]:
    if args.plot:
        return PLOTTED_USERS
    return USERS if args.shape or args.url else ()


def measure(args: argparse.Namespace) -> Iterator[Figures]:
    if args.soak:
        return soak.measure(args.soak, args.readers, args.hostile)
    if args.accept:
        return acceptance.measure(args.accept)
    if args.formats:
        return format_quality.measure()
    if args.http:
        return serving_cost.measure_api()
    if args.adapters and args.shape:
        return adapter_cost.measure_shape(args.shape, args.tokenizer, args.checkpoint, args.quantization)
    if args.adapters:
        return adapter_cost.measure()
    if args.kv_formats:
        return kv_formats.measure()
    if args.draft:
        return speculation.measure_draft(args.draft)
    if args.documents:
        return document_cost.measure()
    if args.browser:
        return itertools.chain(page_cost.measure(), browser_cost.measure())
    if args.train:
        return training_cost.measure(args.shape, args.tokenizer, args.checkpoint)
    if args.starts is not None:
        chosen = [args.shape] if args.shape else ["7b", "13b"]
        return starts.measure(chosen, args.starts, args.tokenizer, args.checkpoint, args.gpu_memory_gb)
    if args.shape:
        return shapes.measure(
            args.shape,
            args.tokenizer,
            args.checkpoint,
            args.quantization,
            args.gpus,
            args.gpu_memory_gb,
            args.users,
            args.page,
            args.tensor_parallel,
        )
    if args.url:
        return server_load.measure(args.url, args.users)
    return embedded.measure(args.users, args.page)


if __name__ == "__main__":
    main()
