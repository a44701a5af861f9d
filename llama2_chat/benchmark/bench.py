"""How fast and how large: measures this machine, prints each figure as it has it and, as its last line, JSON.

    python scripts/bench.py                                   the embedded model on the CPU, beside bfloat16 generate()
    python scripts/bench.py --shape 13b --quantization nf4 --gpu-memory-gb 22           a Llama 2 shape on a GPU
    python scripts/bench.py --shape 13b --quantization none --gpus 2                    the same, split over two
    python scripts/bench.py --shape 13b --plot users.png                 tokens/s and waiting against how many users
    python scripts/bench.py --shape 13b --page                           what 31 gradio_clients and a Chromium cost
    python scripts/bench.py --url http://gpu-1:8000               any OpenAI-compatible server, in the same rows
    python scripts/bench.py --http                                       what the API costs, with 32 streams
    python scripts/bench.py --soak                                       ten minutes of readers who come and go
    python scripts/bench.py --train                          QLoRA of the 13B and the 7B, beside TRL called directly

A shape has random weights, which take the time and the memory of real ones and need no licence. Every ratio compares
two things measured in the same run, because machines are shared and noisy. What users do and see is crowd.py's.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import pydoc_data.topics
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llama2_chat import ROOT
from llama2_chat.benchmark import crowd
from llama2_chat.remote import RemoteModel
from llama2_chat.settings import Settings
from llama2_chat.types import SamplingParams
from model import ChatModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import Trainer

Figures = dict[str, object]

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads
    "tiny": (128, 256, 2, 4, 4),  # to try this file without a GPU
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
USERS = (1, 8, 32)
PLOTTED_USERS = (1, 2, 4, 8, 16, 32)
COMPILING_S = 600  # at most
TRAINED_STEPS, TRAINED_BATCH, TRAINED_TOKENS = 6, 4, 512
TRAINED_ROUNDS = 8
PERPLEXITY_TEXT = "Python's own language reference (pydoc_data.topics)"
PERPLEXITY_TOKENS = 8192
QUESTIONS = [
    "Tell me about llamas.",
    "Where do they live?",
    "What do they eat?",
    "How tall are they?",
    "Can they swim?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="measure this shape of Llama 2, with random weights")
    parser.add_argument("--quantization", default="auto", help="as app.py takes it")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use with --shape")
    parser.add_argument("--gpu-memory-gb", type=float, help="pretend that each GPU has no more memory than this")
    parser.add_argument("--tokenizer", default=os.environ.get("LLAMA2_TOKENIZER", "meta-llama/Llama-2-13b-chat-hf"))
    parser.add_argument("--checkpoint", type=Path, help="where the shape's weights are, or are put for the next run")
    parser.add_argument("--users", type=_counts, help="how many at once, such as 1,8,32")
    parser.add_argument("--page", action="store_true", help="measure what the page takes from 32 users, too")
    parser.add_argument("--plot", type=Path, help="draw tokens/s and time to first token against users, as a PNG")
    parser.add_argument("--http", action="store_true", help="the embedded model's speed over HTTP and without")
    parser.add_argument("--soak", type=float, nargs="?", const=10, help="minutes of 32 readers on the embedded model")
    parser.add_argument("--train", action="store_true", help="measure training instead, of --shape or of 13b and 7b")
    parser.add_argument("--url", help="measure this server; INFERENCE_MODEL and INFERENCE_KEY as app.py takes them")
    args = parser.parse_args()
    args.users = args.users or (PLOTTED_USERS if args.plot else USERS if args.shape or args.url else ())
    kinds = {"soak": bench_soak, "http": bench_http, "train": bench_train, "shape": bench_shape, "url": bench_url}
    bench = next((kind for name, kind in kinds.items() if getattr(args, name)), bench_embedded)
    rows: dict[str, object] = {}
    for part in bench(args):
        rows |= part
        for name, value in part.items():
            print(f"{name:<62}  {value:.3g}" if isinstance(value, float) else f"{name:<62}  {value}", flush=True)
    print(json.dumps(rows))
    if args.plot:
        plot(rows, args.users, args.plot)
    sys.exit(not rows.get("every promise kept", True))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split(","))))


def load(argv: Sequence[str | Path]) -> ChatModel:
    chat = ChatModel(Settings.read(list(map(str, argv)))).load()
    atexit.register(chat.close)  # a thread that computes while Python ends would abort it
    if chat.state != "ready":
        sys.exit(chat.status.error)
    return chat


def bench_soak(args: argparse.Namespace) -> Iterator[Figures]:
    yield crowd.soak(load([]), args.soak)


def bench_http(args: argparse.Namespace) -> Iterator[Figures]:
    """What the API takes from 32 readers of the embedded model."""
    chat = load(["--max-batch", "32"])
    crowd.ignore_stop_ids(chat)
    yield crowd.over_http(chat)


def bench_url(args: argparse.Namespace) -> Iterator[Figures]:
    """What users of a server see who reach it over HTTP."""
    server = RemoteModel(Settings.read(["--inference-url", args.url])).load()
    atexit.register(server.close)
    if server.state != "ready":
        sys.exit(server.status.error)
    yield {"server": args.url, "model": server.status.model}
    words = crowd.words_of(server, prompt_tokens=512)
    crowd.together_over_http(server, max(args.users), words, answer_tokens=8)  # warms up
    for users in args.users:
        figures = crowd.together_over_http(server, users, words)
        yield {f"{_users(users)}, {name}": value for name, value in figures.items()}


def bench_embedded(args: argparse.Namespace) -> Iterator[Figures]:
    """The figures of the embedded model, in the precision that a machine without a GPU gets."""
    yield {"cores": torch.get_num_threads(), "torch": torch.__version__}
    yield bench_start()
    chat = load([])
    yield bench_turns(chat)
    crowd.ignore_stop_ids(chat)
    # generate() in a process of its own: two threads that compute in one process slow each other down, even in turn.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        speeds = [(decode_speed(chat), other.submit(plain_generate_speed).result()) for _ in range(4)]
    ours, theirs = map(statistics.median, zip(*speeds[1:], strict=True))  # the first round warms up
    yield {
        "decode, ours, tokens/s": ours,
        "decode, bfloat16 generate(), tokens/s": theirs,
        "decode, ours / generate()": ours / theirs,
    }
    yield crowd.together_and_in_turn(chat, users=8, prompt_tokens=64, answer_tokens=128)
    yield from bench_users(chat, args.users, prompt_tokens=64, answer_tokens=128)
    if args.page:
        yield from bench_page(chat)
    ours, plain = perplexity(chat), perplexity(plain_model())
    yield {
        "perplexity text": f"{PERPLEXITY_TOKENS:,} tokens of {PERPLEXITY_TEXT}",
        f"perplexity, {chat.status.precision}": ours,
        "perplexity, bfloat16": plain,
        "perplexity, ours / bfloat16": ours / plain,
    }


def bench_start() -> dict[str, float]:
    """Seconds from the start of app.py's process to its page and to the first streamed text, and its memory then."""
    import httpx
    import psutil
    from gradio_client import Client

    def answers() -> bool:
        try:
            return httpx.get(url).status_code == 200
        except httpx.TransportError:
            return False

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, ROOT / "app.py", "--port", url.rpartition(":")[2]], stderr=subprocess.DEVNULL
    )
    try:
        while not answers():
            time.sleep(0.05)
        to_page = time.perf_counter() - started
        next(filter(None, Client(url, verbose=False).submit("Say hi.", api_name="/chat")))  # "" while it loads
        to_token = time.perf_counter() - started
        return {
            "start to page, s": to_page,
            "start to first token, s": to_token,
            "resident memory after load, GB": psutil.Process(app.pid).memory_info().rss / 1e9,
        }
    finally:
        app.terminate()
        app.wait()


def bench_turns(chat: ChatModel) -> Figures:
    """Seconds to the first token on turns 2 and 10 of a conversation: the median of three conversations."""
    waits = []
    for conversation in range(3):
        messages, replies = [], []
        for turn in range(10):
            messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            params = SamplingParams(seed=10 * conversation + turn, max_new_tokens=100)
            with chat.stream_reply(messages, params) as reply:
                messages.append({"role": "assistant", "content": "".join(reply)})
            replies.append(reply)
        waits.append([reply.timing.time_to_first_token_s for reply in replies])
    second, tenth = (statistics.median(wait[turn] for wait in waits) for turn in (1, 9))
    return {
        "turn 10, prompt tokens": replies[9].usage.prompt_tokens,
        "turn 2, time to first token, s": second,
        "turn 10, time to first token, s": tenth,
        "turn 10 / turn 2": tenth / second,
    }


def bench_users(chat: ChatModel, counts: Sequence[int], **tokens: int) -> Iterator[Figures]:
    for users in counts:
        figures: Figures = crowd.together(chat, users, **tokens)
        figures["peak memory so far, GB"] = _gpu_gb(torch.cuda.max_memory_reserved)
        yield {f"{_users(users)}, {name}": value for name, value in figures.items()}


def bench_page(chat: ChatModel) -> Iterator[Figures]:
    for attempt in (1, 2):
        yield {f"{name}, run {attempt}": value for name, value in crowd.through_the_page(chat).items()}


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


GREEDY = SamplingParams(temperature=0, max_new_tokens=128)


def decode_speed(chat: ChatModel, prompt_tokens: int = 20, params: SamplingParams = GREEDY) -> float:
    """Tokens per second after the first."""
    with chat.stream_completion(_some_ids(chat, prompt_tokens), params) as reply:
        list(reply)
    return reply.timing.tokens_per_second


@functools.cache
def plain_model() -> ChatModel:
    return load(["--quantization", "none"])


def plain_generate_speed() -> float:
    return generate_speeds(plain_model())[0]


def generate_speeds(chat: ChatModel, prompt_tokens: int = 20, params: SamplingParams = GREEDY) -> tuple[float, float]:
    """The same through transformers' generate(), on the same weights: tokens/s after the first, and of it all."""
    ids = torch.tensor([_some_ids(chat, prompt_tokens)], device=chat.serving.model.device)
    sampling = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k")} if params.temperature else {}

    def seconds(n: int) -> float:
        started = time.perf_counter()
        chat.serving.model.generate(
            ids,
            do_sample=params.temperature > 0,
            repetition_penalty=params.repetition_penalty,
            max_new_tokens=n,
            min_new_tokens=n,
            **sampling,
        )
        return time.perf_counter() - started

    with torch.inference_mode(), _plain_layers(chat.serving.model):
        first, whole = seconds(1), seconds(params.max_new_tokens)
    return (params.max_new_tokens - 1) / (whole - first), params.max_new_tokens / whole


@contextlib.contextmanager
def _plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """With bitsandbytes' own layers, where loading/quantize.py has put faster ones in their place."""
    if not torch.cuda.is_available():  # importing bitsandbytes is loud there
        yield
        return
    from bitsandbytes.nn import Linear4bit

    faster = [(module, type(module)) for module in model.modules() if isinstance(module, Linear4bit)]
    for module, _ in faster:
        module.__class__ = Linear4bit
    try:
        yield
    finally:
        for module, kind in faster:
            module.__class__ = kind


def _some_ids(chat: ChatModel, n: int) -> list[int]:
    return chat.serving.tokenizer(_text(), add_special_tokens=False)["input_ids"][:n]


def _text() -> str:
    return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))


@torch.inference_mode()
def perplexity(chat: ChatModel, window: int = 1024) -> float:
    """exp of the mean negative log-likelihood per token, in windows that know nothing of each other."""
    ids = torch.tensor(_some_ids(chat, PERPLEXITY_TOKENS), device=chat.serving.model.device).split(window)
    losses = [chat.serving.model(input_ids=part[None], labels=part[None]).loss.float() for part in ids]
    return torch.stack(losses).mean().exp().item()


def bench_shape(args: argparse.Namespace) -> Iterator[Figures]:
    """A Llama 2 shape with random weights, loaded from disk as a real one is, then answering."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(args.gpus)))
    with contextlib.nullcontext(args.checkpoint) if args.checkpoint else tempfile.TemporaryDirectory() as folder:
        make_checkpoint(args.shape, args.tokenizer, Path(folder))
        for device in range(args.gpus if args.gpu_memory_gb else 0):
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.gpu_memory_gb * 1e9 / total, device)
        started = time.perf_counter()
        chat = load(["--model-id", folder, "--quantization", args.quantization])
    yield {
        "shape": args.shape,
        "gpu": f"{args.gpus} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "memory cap, GB": args.gpu_memory_gb,
        "precision": chat.status.precision,
        "device": chat.status.device,
        "load, s": time.perf_counter() - started,
        "memory after load, KV cache included, GB": _gpu_gb(torch.cuda.memory_allocated),
        "KV cache, GB": chat.serving.engine.runner.kv_bytes / 1e9,
    }
    yield {"compile, s": wait_for_compilation(chat), "mode": chat.mode}
    yield from bench_answers(chat, args.users)
    if args.page:
        yield from bench_page(chat)
    yield {
        "peak memory, GB": _gpu_gb(torch.cuda.max_memory_allocated),
        "peak memory with what PyTorch keeps, GB": _gpu_gb(torch.cuda.max_memory_reserved),
    }
    params = SamplingParams(**crowd.SAMPLING, max_new_tokens=256)
    yield {"decode, ours, tokens/s": decode_speed(chat, 512, params)}
    decode, whole = generate_speeds(chat, 512, params)
    yield {"decode, generate(), tokens/s": decode, "1 user, generate(), tokens/s": whole}


def bench_answers(chat: ChatModel, counts: Sequence[int]) -> Iterator[Figures]:
    crowd.ignore_stop_ids(chat)
    crowd.together(chat, max(counts), prompt_tokens=512, answer_tokens=8)  # warms up
    yield from bench_users(chat, counts)
    waits = [crowd.first_token_s(chat, crowd.fresh_ids(chat, 512)) for _ in range(5)]
    yield {"prompt 512, time to first token, s": statistics.median(waits)}
    yield crowd.tenth_turn(chat)
    yield crowd.joining(chat)


def wait_for_compilation(chat: ChatModel) -> float:
    """Seconds until the engine has all its faster steps."""
    started = time.perf_counter()
    time.sleep(1 if torch.cuda.is_available() else 0)  # the thread that compiles has just started
    while "compiles" in chat.mode and time.perf_counter() - started < COMPILING_S:
        time.sleep(0.2)
    return time.perf_counter() - started


def make_checkpoint(shape: str, tokenizer: str, folder: Path) -> None:
    """A folder such as the Hub would give: random weights in bfloat16, and Llama 2's tokenizer."""
    hidden, mlp, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    if (folder / "tokenizer_config.json").is_file():  # written last
        if LlamaConfig.from_pretrained(folder).hidden_size != hidden:
            sys.exit(f"{folder} holds another shape than {shape}. Name another folder.")
        return
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def bench_train(args: argparse.Namespace) -> Iterator[Figures]:
    """QLoRA by sft_trainer.py and by TRL called directly."""
    if not args.shape and not torch.cuda.is_available():
        sys.exit("--train measures a GPU, and there is none. --shape tiny tries it without.")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # of the processes below; TRL refuses one that sees several
    yield {"batch": f"{TRAINED_BATCH} x {TRAINED_TOKENS} tokens", "torch": torch.__version__}
    for shape in [args.shape] if args.shape else ("13b", "7b"):
        kept = args.checkpoint and args.checkpoint / shape
        with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
            # In processes of their own, which leave no memory behind.
            _in_a_process(make_checkpoint, shape, args.tokenizer, Path(folder))
            figures = _in_a_process(train_speeds, Path(folder))
        yield {f"{shape}, {name}": value for name, value in figures.items()}


def _in_a_process(function: Callable[..., Any], *args: object) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(function, *args).result()


def train_speeds(folder: Path) -> Figures:
    """Tokens/s of the median step, of two trainers that take turns, and what the first one needs while it is alone."""
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(sys.stderr):
        ours = our_trainer(folder, Path(output_dir))
        step_times(ours)  # warms up
        figures: Figures = {
            "peak memory, GB": _gpu_gb(torch.cuda.max_memory_allocated),
            "peak memory with what PyTorch keeps, GB": _gpu_gb(torch.cuda.max_memory_reserved),
        }
        theirs = plain_trainer(folder, Path(output_dir))
        step_times(theirs)
        turns = [(step_times(ours), step_times(theirs)) for _ in range(TRAINED_ROUNDS)]
    our_steps, their_steps = ([*itertools.chain(*steps)] for steps in zip(*turns, strict=True))
    return figures | {
        "ours, tokens/s": TRAINED_BATCH * TRAINED_TOKENS / statistics.median(our_steps),
        "TRL directly, tokens/s": TRAINED_BATCH * TRAINED_TOKENS / statistics.median(their_steps),
        "ours / TRL directly, median step": statistics.median(their_steps) / statistics.median(our_steps),
        # Launching kernels takes longer than computing them where the processor is slow or shared: then the median
        # says what the neighbours did.
        "ours / TRL directly, fastest step": min(their_steps) / min(our_steps),
    }


def step_times(trainer: Trainer) -> list[float]:
    """Seconds of each step but the first, from its beginning to the beginning of the next."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
            times.append(time.perf_counter())

    times: list[float] = []
    trainer.add_callback(clock := Clock())
    trainer.train()
    trainer.remove_callback(clock)
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


def _rows() -> list[list[int]]:
    ids = torch.randint(3, 32000, (TRAINED_STEPS * TRAINED_BATCH, TRAINED_TOKENS), generator=torch.Generator())
    return ids.tolist()


def our_trainer(folder: Path, output_dir: Path) -> Trainer:
    from llama2_chat.loading.load import load_base
    from llama2_chat.loading.memory import visible_gpus
    from llama2_chat.prompt import TokenizedExample
    from llama2_chat.training import sft_trainer

    flags = f"--model_name {folder} --dataset_name none --output_dir {output_dir} --use_peft --load_in_4bit"
    flags += f" --batch_size {TRAINED_BATCH} --max_length {TRAINED_TOKENS} --num_train_epochs 1"
    args = sft_trainer.read_arguments(flags.split())
    plan, tokenizer = sft_trainer.fetch(args.model_name)
    model = load_base(plan, "nf4", 0 if visible_gpus() else "cpu", lambda *_: None)
    lessons = {"learnt": [TokenizedExample(ids, [(0, len(ids))]) for ids in _rows()], "held out": []}
    sft_trainer.EVAL_STEPS = 0.99  # of the steps, after which it saves: not on the way, as the other
    return sft_trainer.make_trainer(args, model, tokenizer, lessons)


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
            per_device_train_batch_size=TRAINED_BATCH,
            max_length=TRAINED_TOKENS,
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=has_gpu,
            use_cpu=not has_gpu,
            gradient_checkpointing=has_gpu,
            dataloader_pin_memory=has_gpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in _rows()]),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def plot(rows: dict[str, object], counts: Sequence[int], file: Path) -> None:
    """Two calm panels on white, which a dark README shows as well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    speeds = [rows[f"{_users(count)}, tokens/s"] for count in counts]
    waits_ms = [1000 * rows[f"{_users(count)}, time to first token, median, s"] for count in counts]
    _draw(left, "tokens/s, all users together", counts, speeds)
    _draw(right, "time to first token, median, ms", counts, waits_ms)
    figure.savefig(file, dpi=160)


def _draw(axes: Axes, title: str, counts: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(counts, values, color="#3465a4", marker="o", markersize=4, linewidth=1.5)
    for count, value in zip(counts, values, strict=True):
        axes.annotate(f"{value:,.0f}", (count, value), (-4, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.set_title(title, fontsize=10, loc="left", color="#333333")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_xlabel("users who arrive together", fontsize=9, color="#333333")
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.15 * max(values))
    axes.grid(axis="y", color="#e5e5e5")
    axes.tick_params(colors="#555555", labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _gpu_gb(measure) -> str | None:
    """Of each GPU; None if there is none."""
    return " + ".join(f"{measure(device) / 1e9:.1f}" for device in range(torch.cuda.device_count())) or None
