"""The embedded model as a machine without a GPU gets it: start, turns, guesses, speed, users, perplexity.

Ratios compare two things measured in the same run, alternately, because machines are shared and noisy.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from llama2_chat import ROOT
from llama2_chat.benchmark import Figures, serving_cost, speculation
from llama2_chat.benchmark.decode_speed import decode_speed, unquantized_generate_speed, unquantized_model
from llama2_chat.benchmark.load_test import batching_gain, throughput_by_users
from llama2_chat.benchmark.local_model import (
    GB,
    PERPLEXITY_TEXT,
    load,
    perplexity,
    text_ids,
    time_full_answers,
)
from llama2_chat.types import Message, SamplingParams
from model import ChatModel

CONVERSATIONS, TURNS = 3, 10
TURN_TOKENS = 100  # of an answer, at most
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128  # of users who arrive together
DECODE_ROUNDS = 4  # the first warms up
PERPLEXITY_TOKENS = 8192
QUESTIONS = [
    "Tell me about llamas.",
    "Where do they live?",
    "What do they eat?",
    "How tall are they?",
    "Can they swim?",
]


def measure(users: Sequence[int], with_page: bool) -> Iterator[Figures]:
    yield {"cores": torch.get_num_threads(), "torch": torch.__version__}
    yield start_time()
    chat = load([])
    yield turn_times(chat)
    yield from speculation.measure(chat)
    time_full_answers(chat)
    yield decode_beside_generate(chat)
    yield batching_gain(chat, 8, PROMPT_TOKENS, ANSWER_TOKENS)
    yield from throughput_by_users(chat, users, PROMPT_TOKENS, ANSWER_TOKENS)
    if with_page:
        yield from serving_cost.measure_page(chat)
    ids = text_ids(chat.serving.tokenizer, PERPLEXITY_TOKENS)
    ours, plain = (perplexity(each.serving.model, ids) for each in (chat, unquantized_model()))
    yield {
        "perplexity text": f"{PERPLEXITY_TOKENS:,} tokens of {PERPLEXITY_TEXT}",
        f"perplexity, {chat.status.precision}": ours,
        "perplexity, bfloat16": plain,
        "perplexity, ours / bfloat16": ours / plain,
    }


def start_time() -> dict[str, float]:
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
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    app = subprocess.Popen([sys.executable, ROOT / "app.py", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        while not answers():
            time.sleep(0.05)
        to_page = time.perf_counter() - started
        next(filter(None, Client(url, verbose=False).submit("Say hi.", api_name="/chat")))  # "" while it loads
        to_token = time.perf_counter() - started
        return {
            "start to page, s": to_page,
            "start to first token, s": to_token,
            "resident memory after load, GB": psutil.Process(app.pid).memory_info().rss / GB,
        }
    finally:
        app.terminate()
        app.wait()


def turn_times(chat: ChatModel) -> Figures:
    """Seconds to the first token on turns 2 and 10 of a conversation: the median of three conversations."""
    conversations = [_converse(chat, seed=TURNS * number) for number in range(CONVERSATIONS)]
    second, tenth = (
        statistics.median(replies[turn].timing.time_to_first_token_s for replies in conversations) for turn in (1, 9)
    )
    return {
        "turn 10, prompt tokens": conversations[-1][9].usage.prompt_tokens,
        "turn 2, time to first token, s": second,
        "turn 10, time to first token, s": tenth,
        "turn 10 / turn 2": tenth / second,
    }


def _converse(chat: ChatModel, seed: int) -> list[Any]:
    """The replies of one conversation."""
    messages: list[Message] = []
    replies = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        with chat.stream_reply(messages, SamplingParams(seed=seed + turn, max_new_tokens=TURN_TOKENS)) as reply:
            messages.append({"role": "assistant", "content": "".join(reply)})
        replies.append(reply)
    return replies


def decode_beside_generate(chat: ChatModel) -> dict[str, float]:
    # generate() in a process of its own: two threads that compute in one process slow each other down, even in turn.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        speeds = [(decode_speed(chat), other.submit(unquantized_generate_speed).result()) for _ in range(DECODE_ROUNDS)]
    ours, theirs = map(statistics.median, zip(*speeds[1:], strict=True))
    return {
        "decode, ours, tokens/s": ours,
        "decode, bfloat16 generate(), tokens/s": theirs,
        "decode, ours / generate()": ours / theirs,
    }
