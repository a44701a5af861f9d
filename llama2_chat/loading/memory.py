"""What a model takes of GPU memory, in which precision it fits, and on which devices. Needs no weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llama2_chat.context import context_window
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kv_cache import head_bytes
from llama2_chat.process import CGROUP
from llama2_chat.settings import Settings
from llama2_chat.text import is_out_of_host_memory, is_out_of_memory

log = logging.getLogger("llama2_chat")

GB = 1_000_000_000
# Per GPU, measured on an H100 with limits of 16 to 78 GB: the CUDA context and kernels' workspace, and what lies unused
# between the scales of int4.
WORKSPACE_BYTES, INT4_WORKSPACE_BYTES = 1 * GB, 800_000_000
CPU_KV_BYTES = 256 * 2**20  # 11,000 tokens of the embedded model
STEP_TOKENS = 2_048  # of the engine's longest step, GPU_CHUNK
MIN_CONTEXT_TOKENS = 4_096  # of a conversation as it is counted; models with longer windows may run with part of theirs
LEAST_CONTEXT_TOKENS = 1_024  # of KV cache that must fit
# Bytes per parameter of a linear layer. Int4: 4 bits, and per 64 weights 16 bits of scale and 4 of zero point. NF4 with
# double quantisation: 4 bits, and per 64 weights 8 bits of scale, themselves scaled per 256.
BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.539, "nf4": 0.516}

FOUR_BITS = ("int4", "nf4")
NO_INT4 = "QUANTIZATION=int4 needs a CUDA GPU. Unset it: int8 is fastest on a CPU."

DeviceMap = str | dict[str, str | int]


@dataclass(frozen=True)
class Gpu:
    """What the choice of a precision needs to know about one GPU."""

    free_bytes: int
    capability: tuple[int, int] = (8, 0)
    name: str = ""


def visible_gpus() -> list[Gpu]:
    """The visible CUDA GPUs, with what this process may still take of each."""
    return [gpu for index in range(_gpu_count()) for gpu in own_gpu(index)]


def own_gpu(index: int) -> list[Gpu]:
    """The one GPU of a process that leaves the others alone: asking takes memory there. None on a machine without."""
    if not _gpu_count():
        return []
    free, _ = torch.cuda.mem_get_info(index)
    return [Gpu(free, torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))]


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_bytes(headroom_gb: float, only: int | None = None) -> dict[torch.device, int]:
    """What the KV pool may take of each device. only: of this GPU alone; None for all."""
    torch.cuda.empty_cache()  # what loading needed for a moment
    headroom = int(headroom_gb * GB)
    free = {
        torch.device("cuda", index): max(gpu.free_bytes - headroom, 0)
        for index in range(_gpu_count())
        if only in (None, index)
        for gpu in own_gpu(index)
    }
    return {torch.device("cpu"): CPU_KV_BYTES, **free}


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of this computer, or of this container, that programs may still take.

    cgroup: the folder where Linux tells what a container may have.
    """
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or "max": no limit of its own
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, max(limit - used + int(cached), 0))
    return free


def compute_dtype(gpus: Sequence[Gpu]) -> torch.dtype:
    """bfloat16 where every GPU computes in it, as CPUs do; float16 on the older ones."""
    return torch.bfloat16 if all(gpu.capability >= (8, 0) for gpu in gpus) else torch.float16


@dataclass(frozen=True)
class Size:
    """What a model weighs, known from its configuration before any weights are here."""

    linear: int  # parameters in linear layers: the part that int8 and NF4 shrink
    other: int  # embeddings, output head, norms
    context: int  # tokens
    kv_bytes_per_token: int  # in 16 bits
    kv_bytes_in_8_bits: int
    kv_cache: str = "none"  # a KV_CACHE
    step_bytes: int = 0  # of activations, in the engine's longest step
    headroom_bytes: int = int(Settings.kv_headroom_gb * GB)  # per GPU, which the engine leaves alone
    adapter_bytes: int = 0  # of those that requests choose from, and of what guesses
    comes_in: str | None = None  # "gptq", "awq", ...: what its weights are unpacked from before they are loaded

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Size:
        """As an unquantised model."""
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
        )
        text = config.get_text_config()
        if not getattr(text, "num_attention_heads", None):
            raise ModelUnavailable(
                f"A model of the type {text.model_type} keeps a state instead of keys and values of past tokens, which "
                "this program cannot share between visitors. Choose a Llama 2, or a model that attends as it does."
            )
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            linear=linear,
            other=sum(parameter.numel() for parameter in model.parameters()) - linear,
            context=context_window(config)[0],
            kv_bytes_per_token=2 * text.num_hidden_layers * kv_heads * head_bytes(head_dim, bits=16),  # K and V
            kv_bytes_in_8_bits=2 * text.num_hidden_layers * kv_heads * head_bytes(head_dim, bits=8),
            step_bytes=2 * STEP_TOKENS * (6 * text.hidden_size + 3 * _widest(model)),
        )

    def needed_bytes(self, precision: str, context: int, gpus: int = 1) -> int:
        """Of GPU memory: the weights, the KV cache of one conversation of `context` tokens, and room to work in."""
        in_8_bits = self.kv_cache != "none"  # KV_CACHE=auto takes them where memory is short
        return self._bytes(precision, context, in_8_bits) + max(gpus, 1) * self.working_bytes(precision)

    def host_bytes(self, precision: str, context: int) -> int:
        """The same without a GPU, of this computer's memory: what is quantised there is in bfloat16 first."""
        in_8_bits = self.kv_cache not in ("auto", "none")
        return self._bytes("float32" if precision == "float32" else "bfloat16", context, in_8_bits)

    def _bytes(self, precision: str, context: int, in_8_bits: bool) -> int:
        weights = self.linear * BYTES_PER_WEIGHT[precision] + self.other * (4 if precision == "float32" else 2)
        token = self.kv_bytes_in_8_bits if in_8_bits else self.kv_bytes_per_token
        return int(weights + self.adapter_bytes + token * min(context, self.context))

    def working_bytes(self, precision: str) -> int:
        """Of each GPU beside weights and KV cache. Recorded steps have activations of their own."""
        of_int4 = INT4_WORKSPACE_BYTES if precision == "int4" else 0
        return WORKSPACE_BYTES + of_int4 + self.headroom_bytes + 2 * self.step_bytes


def _widest(model: nn.Module) -> int:
    """Numbers per token between the linear layers of a feed-forward layer."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    sizes = [each.in_features for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    return max(sizes, default=0)


def choose_precision(requested: str, size: Size, gpus: Sequence[Gpu]) -> tuple[str, str]:
    """The precision to load in, and why. No GPUs means the CPU.

    requested: a QUANTIZATION, or "float32", which is not offered as a setting: tests compare in it.
    """
    unquantized = str(compute_dtype(gpus)).removeprefix("torch.")
    if requested == "int4" and not gpus:
        raise ModelUnavailable(NO_INT4)
    if requested != "auto":
        return unquantized if requested == "none" else requested, f"QUANTIZATION={requested}."
    if not gpus:
        return "int8", "int8 is fastest on a CPU."
    needed, free = size.needed_bytes(unquantized, size.context, len(gpus)), _free_bytes(gpus)
    why = (
        f"{unquantized} takes {needed / GB:.1f} GB with a full context, and {free / GB:.1f} GB of GPU memory are free."
    )
    if needed <= free:
        return unquantized, why
    return "nf4", f"{why} QUANTIZATION=int4 answers faster; bench.py --accept tells whether it answers as well."


def check_memory(name: str, precision: str, size: Size, gpus: Sequence[Gpu]) -> None:
    """Raise ModelUnavailable if the GPUs together cannot hold the model and a conversation."""
    needed, free = size.needed_bytes(precision, LEAST_CONTEXT_TOKENS, len(gpus)), _free_bytes(gpus)
    if not gpus or needed <= free:
        return
    in_nf4 = size.needed_bytes("nf4", LEAST_CONTEXT_TOKENS, len(gpus))
    smaller = _smaller(precision) if in_nf4 <= free else "Choose a smaller model"
    raise ModelUnavailable(
        f"{name} needs about {needed / GB:.1f} GB of GPU memory in {precision} and {free / GB:.1f} GB are free. "
        f"{smaller}, free some memory, or use a larger GPU."
    )


def _smaller(precision: str) -> str:
    return "Choose a smaller model" if precision in FOUR_BITS else "Set QUANTIZATION=nf4"


@contextmanager
def translate_out_of_memory(name: str, precision: str, needed_bytes: int) -> Iterator[None]:
    """Memory that runs out, a GPU's or this computer's, as a ModelUnavailable with what was needed and left."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("Out of memory: %s", error)
        needed = f"In {precision} it needs about {needed_bytes / GB:.1f} GB in all; "
        if is_out_of_host_memory(error):
            needed = "" if torch.cuda.is_available() else needed  # most of that is the GPU's
            raise ModelUnavailable(
                f"This computer's memory ran out while {name} was loaded. {needed}"
                f"{psutil.virtual_memory().available / GB:.1f} GB were left. "
                "Choose a smaller model, free some memory, or use a computer with more."
            ) from error
        raise ModelUnavailable(
            f"The GPU memory ran out while {name} was loaded. {needed}{_free_bytes(visible_gpus()) / GB:.1f} GB were "
            f"left. {_smaller(precision)}, free some memory, or use a larger GPU."
        ) from error


def choose_device_map(precision: str, size: Size, gpus: Sequence[Gpu]) -> tuple[DeviceMap, dict[int, int] | None]:
    """device_map and max_memory: the CPU, the roomiest GPU if it holds everything, else spread over all of them."""
    if not gpus:
        return {"": "cpu"}, None
    roomiest = max(range(len(gpus)), key=lambda index: gpus[index].free_bytes)
    if len(gpus) == 1 or size.needed_bytes(precision, size.context) <= gpus[roomiest].free_bytes:
        return {"": roomiest}, None
    working = size.working_bytes(precision)
    return "auto", {index: max(0, gpu.free_bytes - working) for index, gpu in enumerate(gpus)}


def _free_bytes(gpus: Sequence[Gpu]) -> int:
    return sum(gpu.free_bytes for gpu in gpus)
