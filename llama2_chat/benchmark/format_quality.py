"""What int8, int4 and NF4 cost a model whose weights are on no grid: perplexity, and how far each layer's weights move.

The embedded model's own weights come in four bits, so it cannot tell. Here they are moved off their grid by noise, and
trained in full precision on Python's source until the model is whole again. For a GPU: int4 needs one.
"""

from __future__ import annotations

import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import PERPLEXITY_TEXT, load, perplexity, text_ids
from llama2_chat.kernels.packed import quantize
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.load import load_base
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.training.base_model import fetch_checkpoint

NOISE = 0.3  # beside the spread of each matrix: about a step of the grid, of which nothing is left then
TRAIN_S = 90
WINDOW, BATCH, LEARNING_RATE, WARMUP_STEPS = 1024, 16, 3e-4, 50
AT_ONCE = 4  # of a batch's windows, so that it fits on an A10G
EVAL_TOKENS = 65_536  # of source that is not trained on
PRECISIONS = ("none", "int8", "int4", "nf4")


def measure() -> Iterator[Figures]:
    """Figures of each precision on source that was not trained on, and on prose that was not either."""
    if not torch.cuda.is_available():
        sys.exit("--formats measures a GPU, and there is none.")
    checkpoint = fetch_checkpoint(EMBEDDED)
    tokenizer = load_tokenizer(checkpoint)
    model: Any = load_base(checkpoint, "float32", "cuda", lambda *progress: None)
    train, held_out = _source_ids(tokenizer)
    prose = text_ids(tokenizer, 8192)
    yield {"source, perplexity of the embedded model": perplexity(model, held_out)}
    torch.manual_seed(0)
    for linear in _linears(model):
        linear.weight.data += torch.randn_like(linear.weight) * linear.weight.std() * NOISE
    yield {"source, perplexity with noise": perplexity(model, held_out)}
    yield {"tokens trained on": _train(model, train), "seconds": TRAIN_S}
    yield {"text": f"Python's standard library, files that were not trained on; prose: {PERPLEXITY_TEXT}"}
    yield _weight_errors(model)
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        whole: dict[str, float] = {}
        for quantization in PRECISIONS:
            chat = load(["--model-id", folder, "--quantization", quantization, "--no-compile", "--kv-host-gb", "0"])
            found = {
                name: perplexity(chat.serving.model, ids) for name, ids in (("source", held_out), ("prose", prose))
            }
            chat.close()
            whole = whole or found
            yield {
                **{f"{name}, {chat.status.precision}, perplexity": value for name, value in found.items()},
                **{f"{name}, {chat.status.precision} / 16 bits": value / whole[name] for name, value in found.items()},
            }


def _source_ids(tokenizer: Any) -> tuple[Tensor, list[int]]:
    """Token ids of Python's library and of the packages here, int64 [N]; and of a tenth of the library's files."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    own = sorted(path for path in library.glob("*.py"))
    others = sorted(path for name in ("torch", "transformers") for path in (packages / name).rglob("*.py"))
    random.Random(0).shuffle(own)
    held_out, kept = own[: len(own) // 10], own[len(own) // 10 :]
    ids = [_ids(tokenizer, files) for files in ([*kept, *others], held_out)]
    return torch.tensor(ids[0]), ids[1][:EVAL_TOKENS]


def _ids(tokenizer: Any, files: Sequence[Path]) -> list[int]:
    texts = [path.read_text("utf-8", "replace") for path in files]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [token for ids in found for token in (*ids, tokenizer.eos_token_id)]


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "lm_head" not in name]


def _train(model: Any, ids: Tensor) -> int:
    """Train all weights for TRAIN_S on windows at random places; the tokens that it saw."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    model.train().requires_grad_(True)
    generator, started, steps = torch.Generator().manual_seed(0), time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / TRAIN_S) < 1:
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()]).to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((steps + 1) / WARMUP_STEPS, 1 - done)
        for part in batch.split(AT_ONCE):
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss
            (loss * len(part) / BATCH).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    model.eval().requires_grad_(False)
    return steps * BATCH * WINDOW


@torch.inference_mode()
def _weight_errors(model: nn.Module) -> dict[str, float]:
    """How far quantising moves the weights of a layer, beside their size, on average over the layers."""
    import bitsandbytes.functional as bnb

    errors: dict[str, list[float]] = {"int8": [], "int4": [], "nf4": []}
    for linear in _linears(model):
        weight = linear.weight.to(torch.bfloat16)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        restored = {"nf4": bnb.dequantize_4bit(packed, state), **{f"int{b}": _restored(weight, b) for b in (8, 4)}}
        for name, values in restored.items():
            errors[name].append(((values.float() - weight.float()).norm() / weight.float().norm()).item())
    return {f"weights, relative error, {name}": sum(each) / len(each) for name, each in errors.items()}


def _restored(weight: Tensor, bits: int) -> Tensor:
    """What the packed weights stand for, [out, in]."""
    codes, scales, zero_points = quantize(weight, bits)
    shifts = torch.arange(0, 32, bits, device=weight.device)

    def numbers(packed: Tensor) -> Tensor:
        return (packed[..., None] >> shifts & 2**bits - 1).flatten(1)

    zeros = torch.full_like(scales, 128) if zero_points is None else numbers(zero_points.T.contiguous()).T
    groups = numbers(codes).view(len(weight), scales.shape[1], -1) - zeros[..., None]
    return (groups * scales[..., None].float()).flatten(1)
