"""A shape of Llama 2 with random weights, loaded from disk as a real model is, then answering.

Random weights take the time and the memory of real ones and need no licence.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from llama2_chat.benchmark import Figures, load_test, serving_cost, speculation
from llama2_chat.benchmark.decode_speed import decode_speed, generate_speeds
from llama2_chat.benchmark.load_test import SAMPLING
from llama2_chat.benchmark.local_model import GB, fresh_ids, gpu_gb, kv_cache_bytes, load, time_full_answers
from llama2_chat.text import first_line
from model import ChatModel

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads
    "tiny": (128, 256, 2, 4, 4),  # to try this file without a GPU
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
COMPILING_S = 600  # at most
WRITERS = 8  # files of weights that are written at once


def measure(
    shape: str,
    tokenizer: str,
    checkpoint: Path | None,
    quantization: str,
    gpus: int,
    gpu_memory_gb: float | None,
    users: Sequence[int],
    with_page: bool,
    tensor_parallel: str,
) -> Iterator[Figures]:
    """checkpoint: where the weights are, or are put for the next run; None makes them for this run only."""
    use_gpus(gpus)
    check_gpu(shape)
    with checkpoint_folder(checkpoint) as folder:
        make_checkpoint(shape, tokenizer, folder)
        if gpu_memory_gb is not None:
            limit_memory(gpus, gpu_memory_gb)
        started = time.perf_counter()
        flags = ["--quantization", quantization, "--tensor-parallel", tensor_parallel]
        chat = load(["--model-id", folder, *flags])
    yield {
        "shape": shape,
        "gpu": f"{gpus} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "memory cap, GB": gpu_memory_gb,
        "precision": chat.status.precision,
        "KV_CACHE": chat.status.kv_cache,
        "device": chat.status.device,
        "load, s": time.perf_counter() - started,
        "memory after load, KV cache included, GB": gpu_gb(torch.cuda.memory_allocated),
        "KV cache, GB": kv_cache_bytes(chat) / GB,
        "KV cache, tokens": chat.occupancy.kv_capacity_tokens if chat.occupancy else 0,
    }
    yield {"compile, s": wait_for_compilation(chat), "mode": chat.mode}
    yield from _measure_answers(chat, users)
    if with_page:
        yield from serving_cost.measure_page(chat)
    yield {
        "peak memory, GB": gpu_gb(torch.cuda.max_memory_allocated),
        "peak memory with what PyTorch keeps, GB": gpu_gb(torch.cuda.max_memory_reserved),
    }
    params = replace(SAMPLING, max_new_tokens=256)
    yield {"decode, ours, tokens/s": decode_speed(chat, 512, params)}
    if "x" in chat.status.device:  # generate() knows one part alone
        return
    decode, whole = generate_speeds(chat, 512, params)
    yield {"decode, generate(), tokens/s": decode, "1 user, generate(), tokens/s": whole}
    if torch.cuda.is_available():
        yield from speculation.measure_planted(chat)


def check_gpu(shape: str) -> None:
    """Exit with a sentence, before gigabytes are written, if this shape needs a GPU and there is none."""
    if shape != "tiny" and not torch.cuda.is_available():
        sys.exit(f"--shape {shape} measures a GPU, and there is none. --shape tiny runs without one.")


def use_gpus(count: int) -> None:
    """Hide all GPUs but the first of those that are visible, from this process and its children."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:count])


@contextlib.contextmanager
def checkpoint_folder(kept: Path | None) -> Iterator[Path]:
    """The folder that is kept, or else one that is removed again."""
    if kept:
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def limit_memory(gpus: int, gpu_memory_gb: float) -> None:
    """Leave each GPU with so many GB in all, as if it were smaller: the rest is taken where PyTorch does not look.

    So the limit holds for whatever takes memory: the CUDA context, cuBLAS and bitsandbytes too.
    """
    if not torch.cuda.is_available():
        sys.exit("--gpu-memory-gb limits a GPU, and there is none.")
    driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    for device in range(gpus):
        surplus = torch.cuda.get_device_properties(device).total_memory - int(gpu_memory_gb * GB)
        with torch.cuda.device(device):
            torch.empty(1, device="cuda")  # makes the context in which the driver allocates
            if surplus < 0 or driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(surplus)):
                sys.exit(f"GPU {device} does not have {gpu_memory_gb:g} GB.")


def _measure_answers(chat: ChatModel, counts: Sequence[int]) -> Iterator[Figures]:
    time_full_answers(chat)
    load_test.throughput(chat, max(counts), prompt_tokens=512, answer_tokens=8)  # warms up
    yield from load_test.throughput_by_users(chat, counts)
    waits = [load_test.first_token_s(chat, fresh_ids(chat, 512)) for _ in range(5)]
    yield {"prompt 512, time to first token, s": statistics.median(waits)}
    yield load_test.prefix_reuse(chat)
    yield load_test.return_from_host(chat)
    yield load_test.inter_token_latency(chat)


def wait_for_compilation(chat: ChatModel) -> float:
    """Seconds until the engine has all its faster steps."""
    started = time.perf_counter()
    time.sleep(1 if torch.cuda.is_available() else 0)  # the thread that compiles has just started
    while "compiles" in chat.mode and time.perf_counter() - started < COMPILING_S:
        time.sleep(0.2)
    return time.perf_counter() - started


def make_checkpoint(shape: str, tokenizer: str, folder: Path) -> None:
    """A folder as the Hub would give it: random weights in bfloat16, and Llama 2's tokenizer."""
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
        architectures=["LlamaForCausalLM"],
    )
    if (folder / "tokenizer_config.json").is_file():  # written last
        if LlamaConfig.from_pretrained(folder).hidden_size != hidden:
            sys.exit(f"{folder} holds a shape other than {shape}. Name another folder.")
        return
    known = _load_tokenizer(tokenizer)  # before gigabytes are written
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--checkpoint {folder} cannot be made: {error.strerror}.")
    _write_weights(config, folder)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    known.save_pretrained(folder)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(
            f"--tokenizer {name} cannot be loaded ({first_line(error)}). Name a folder that holds Llama 2's, or set "
            "HF_TOKEN to a token of someone who may read it on the Hub."
        )


def _write_weights(config: LlamaConfig, folder: Path) -> None:
    """In a file for each layer: a large shape fits in no GPU as a whole, and several files are written at once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: defaultdict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files[f"model-{layer}.safetensors"][name] = parameter.shape
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(lambda file: save_file(_random(files[file], config), folder / file), files))
    where = {name: file for file, names in files.items() for name in names}
    total = sum(2 * shape.numel() for names in files.values() for shape in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _random(shapes: Mapping[str, torch.Size], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """As transformers initialises a Llama: norms are ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:
            tensor.normal_(0, config.initializer_range)
        tensors[name] = tensor.cpu()
    return tensors
