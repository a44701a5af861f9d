"""How fast and how large: measures this machine and prints a table and, as its last line, JSON.

    python scripts/bench.py                                   the embedded model on the CPU, beside bfloat16 generate()
    python scripts/bench.py --shape 13b --quantization nf4 --gpu-memory-gb 22           a Llama 2 shape on a GPU
    python scripts/bench.py --shape 13b --quantization none --gpus 2                    the same, split over two

A shape has random weights, which take the time and the memory of real ones and need no licence. Every ratio compares
two things measured in the same run, because machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import functools
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig  # noqa: E402

from chat_types import SamplingParams  # noqa: E402
from model import ChatModel  # noqa: E402
from settings import Settings  # noqa: E402

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
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
    args = parser.parse_args()
    rows = bench_shape(args) if args.shape else bench_embedded()
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value:.3g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    print(json.dumps(rows))


def bench_embedded() -> dict[str, object]:
    """The figures of the embedded model, in the precision that a machine without a GPU gets."""
    rows: dict[str, object] = {"cores": torch.get_num_threads(), "torch": torch.__version__}
    rows |= bench_start()
    chat = ChatModel(Settings.read([])).load()
    # generate() in a process of its own: two threads that compute in one process slow each other down, even in turn.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        speeds = [(decode_speed(chat), other.submit(plain_generate_speed).result()) for _ in range(4)]
    ours, theirs = map(statistics.median, zip(*speeds[1:], strict=True))  # the first round warms up
    rows["decode, ours, tokens/s"] = ours
    rows["decode, bfloat16 generate(), tokens/s"] = theirs
    rows["decode, ours / generate()"] = ours / theirs
    rows |= bench_turns(chat)
    rows["perplexity text"] = f"{PERPLEXITY_TOKENS:,} tokens of {PERPLEXITY_TEXT}"
    rows[f"perplexity, {chat.status.precision}"] = ours_perplexity = perplexity(chat)
    rows["perplexity, bfloat16"] = plain_perplexity = perplexity(plain_model())
    rows["perplexity, ours / bfloat16"] = ours_perplexity / plain_perplexity
    return rows


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


def bench_turns(chat: ChatModel) -> dict[str, object]:
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


def decode_speed(chat: ChatModel, prompt_tokens: int = 20, max_new_tokens: int = 128) -> float:
    """Tokens per second after the first, greedy."""
    params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
    with chat.stream_completion(_some_ids(chat, prompt_tokens), params) as reply:
        list(reply)
    return reply.timing.tokens_per_second


@functools.cache
def plain_model() -> ChatModel:
    return ChatModel(Settings.read(["--quantization", "none"])).load()


def plain_generate_speed() -> float:
    return generate_speed(plain_model())


def generate_speed(chat: ChatModel, prompt_tokens: int = 20, max_new_tokens: int = 128) -> float:
    """The same through transformers' generate(), on the same weights: its time less that of one token."""
    ids = torch.tensor([_some_ids(chat, prompt_tokens)], device=chat.model.device)

    def seconds(n: int) -> float:
        started = time.perf_counter()
        chat.model.generate(ids, do_sample=False, repetition_penalty=1.1, max_new_tokens=n, min_new_tokens=n)
        return time.perf_counter() - started

    with torch.inference_mode():
        return (max_new_tokens - 1) / (seconds(max_new_tokens) - seconds(1))


def _some_ids(chat: ChatModel, n: int) -> list[int]:
    return chat.tokenizer(_text(), add_special_tokens=False)["input_ids"][:n]


def _text() -> str:
    return "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))


@torch.inference_mode()
def perplexity(chat: ChatModel, window: int = 1024) -> float:
    """exp of the mean negative log-likelihood per token, in windows that know nothing of each other."""
    ids = torch.tensor(_some_ids(chat, PERPLEXITY_TOKENS), device=chat.model.device).split(window)
    losses = [chat.model(input_ids=part[None], labels=part[None]).loss.float() for part in ids]
    return torch.stack(losses).mean().exp().item()


def bench_shape(args: argparse.Namespace) -> dict[str, object]:
    """A Llama 2 shape with random weights, loaded from disk as a real one is, then streaming."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(args.gpus)))
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(args.shape, args.tokenizer, folder)
        for device in range(args.gpus if args.gpu_memory_gb else 0):
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.gpu_memory_gb * 1e9 / total, device)
        started = time.perf_counter()
        chat = ChatModel(Settings.read(["--model-id", folder, "--quantization", args.quantization])).load()
        if chat.state != "ready":
            sys.exit(chat.status.error)
    rows: dict[str, object] = {
        "shape": args.shape,
        "gpu": f"{args.gpus} x {torch.cuda.get_device_name()}",
        "memory cap, GB": args.gpu_memory_gb,
        "precision": chat.status.precision,
        "device": chat.status.device,
        "load, s": time.perf_counter() - started,
        "memory after load, GB": _gpu_gb(torch.cuda.memory_allocated),
    }
    with chat.stream_completion(
        _some_ids(chat, 512), SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=256)
    ) as reply:
        list(reply)
    rows["finish reason"] = reply.finish_reason
    rows["prompt 512, time to first token, s"] = reply.timing.time_to_first_token_s
    rows["decode, ours, tokens/s"] = reply.timing.tokens_per_second
    rows["decode, generate(), tokens/s"] = generate_speed(chat, 512)
    rows["peak memory, GB"] = _gpu_gb(torch.cuda.max_memory_allocated)
    return rows


def make_checkpoint(shape: str, tokenizer: str, folder: str) -> None:
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
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def _gpu_gb(measure) -> str:
    return " + ".join(f"{measure(device) / 1e9:.1f}" for device in range(torch.cuda.device_count()))


if __name__ == "__main__":
    main()
