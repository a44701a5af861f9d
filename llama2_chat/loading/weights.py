"""Which model, in what precision, and loading it: weights and tokenizer come out, ready to run.

choose, fetch, load_tokenizer and load are called in this order; between the last two the caller may still refuse a
tokenizer before gigabytes are downloaded. Whatever goes wrong on the way is a ModelUnavailable with a sentence. Nothing
here knows prompts, decoding or the page; getting the files is download.py's work.
"""

from __future__ import annotations

import ctypes
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading import download
from llama2_chat.loading.download import Files, Progress
from llama2_chat.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

LLAMA_2 = "meta-llama/Llama-2-13b-chat-hf"
GB = 1_000_000_000
HEADROOM_BYTES = 1 * GB  # per GPU: the CUDA context, kernels' workspace, the activations of a chunk of prefill
FULL = ("float32", "bfloat16", "float16")  # the precisions of unquantised weights
CONTEXT_AT_LEAST = 4_096  # tokens of KV cache that must fit; models with longer windows may run with part of theirs
ZERO_GPU = (
    "ZeroGPU is not supported: it lends a GPU for one function call, and this program keeps its model on one. "
    "Choose other hardware in the Space's settings."
)


@dataclass(frozen=True)
class Plan:
    """Which model to load and where it comes from. The folders are known once it is fetched."""

    model_id: str  # what log and page call it: a Hub id, a folder, or the embedded model's name
    why: str
    quantization: str
    cache_dir: Path
    hub_cache_dir: Path | None = None
    base_model: str | None = None  # overrides what an adapter names
    base: Files | None = None
    adapter: Files | None = None

    @property
    def embedded(self) -> bool:
        return self.model_id == download.EMBEDDED


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and how it got there in words."""

    model: PreTrainedModel
    precision: str  # "bfloat16", "float16", "int8", "nf4", or the checkpoint's own, such as "gptq"
    device: str  # "cpu", "cuda:0", "2 x cuda"
    why: str


@dataclass(frozen=True)
class Gpu:
    """What the choice of a precision needs to know about one GPU."""

    free_bytes: int
    capability: tuple[int, int] = (8, 0)


def gpus() -> list[Gpu]:
    """The visible CUDA GPUs, with what this process may still take of each."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        # set_per_process_memory_fraction does not show in what the driver calls free.
        allowed = torch.cuda.get_per_process_memory_fraction(index) * total - torch.cuda.memory_reserved(index)
        found.append(Gpu(int(min(free, allowed)), torch.cuda.get_device_capability(index)))
    return found


# ---- Which model ----


def choose(settings: Settings, has_gpu: bool | None = None) -> Plan:
    """The model that the settings ask for, or else the best one this machine can reach. May ask the Hub."""
    plan = Plan(
        download.EMBEDDED,
        "",
        settings.quantization,
        settings.cache_dir.expanduser(),
        settings.hub_cache_dir,
        settings.base_model,
    )
    if settings.zero_gpu:
        log.warning("%s", ZERO_GPU)
    if settings.model_id:
        _refuse_known_base(settings.model_id)
        return replace(plan, model_id=settings.model_id, why="MODEL_ID asks for this model.")
    if settings.zero_gpu:
        return replace(plan, why=ZERO_GPU)
    if not (torch.cuda.is_available() if has_gpu is None else has_gpu):
        return replace(plan, why="Llama 2 needs a CUDA GPU, and there is none here.")
    try:
        download.check_reachable(LLAMA_2, cache_dir=plan.hub_cache_dir)
    except ModelUnavailable as error:
        return replace(plan, why=f"This is the small model instead of Llama 2: {error}")
    return replace(plan, model_id=LLAMA_2, why="There is a CUDA GPU and Llama 2 can be reached.")


def _refuse_known_base(model_id: str) -> None:
    """Base models carry no template. Those people reach for by mistake are refused by name, before any download."""
    llama = re.fullmatch(r"(meta-llama/Llama-2-\d+b)(-hf|-chat)?", model_id, re.IGNORECASE)
    code = re.fullmatch(r"((?:codellama|meta-llama)/CodeLlama-\d+b)(-Python)?(-hf)?", model_id, re.IGNORECASE)
    if llama or code:
        chat = f"{llama[1]}-chat-hf" if llama else f"{code[1]}-Instruct-hf"
        raise ModelUnavailable(f"{model_id} is not a chat model that transformers can load. Set MODEL_ID={chat}.")


def fetch(plan: Plan, progress: Progress) -> Plan:
    """The plan with its folders: configuration and tokenizer are there; of the weights only the embedded model's."""
    if plan.embedded:
        return replace(plan, base=Files(download.embedded_folder(plan.cache_dir, progress, _convert_gguf)))
    files = download.small_files(plan.model_id, progress, plan.hub_cache_dir)
    if not (files.folder / "adapter_config.json").is_file():
        return replace(plan, base=_transformers_model(files))
    with download.unreadable(files):
        named = json.loads((files.folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    base = plan.base_model or named
    if not base:
        raise ModelUnavailable(f"The adapter {plan.model_id} does not name its base model. Set BASE_MODEL to it.")
    if base == download.EMBEDDED:
        return replace(fetch(replace(plan, model_id=base), progress), model_id=plan.model_id, adapter=files)
    try:
        return replace(
            plan, base=_transformers_model(download.small_files(base, progress, plan.hub_cache_dir)), adapter=files
        )
    except ModelUnavailable as error:
        raise ModelUnavailable(
            f"The base model of the adapter {plan.model_id}: {error} BASE_MODEL overrides it."
        ) from error


def _transformers_model(files: Files) -> Files:
    if not (files.folder / "config.json").is_file():
        raise ModelUnavailable(
            f"{files} holds no config.json, so it is not a model in the format of transformers. Choose another model."
        )
    return files


def _convert_gguf(folder: Path, name: str, target: Path) -> None:
    try:
        # dequantize=True, or the result refuses save_pretrained.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
    except (ImportError, SafetensorError) as error:  # the package gguf is missing; the disk is full
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelUnavailable(f"The small model {download.EMBEDDED} could not be converted: {reason}") from error


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer and template, if it has them, else those of the model."""
    files = plan.base
    if plan.adapter and any(
        (plan.adapter.folder / f"tokenizer{end}").is_file() for end in ("_config.json", ".json", ".model")
    ):
        files = plan.adapter
    with _told(files):
        return AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False)


# ---- In what precision ----


@dataclass(frozen=True)
class Size:
    """What a model weighs, known from its configuration before any weights are here."""

    linear: int  # parameters in linear layers: the part that int8 and NF4 shrink
    other: int  # embeddings, output head, norms
    context: int  # tokens
    kv_bytes_per_token: int
    own_bytes: int | None = None  # of the weights, when the checkpoint brings its own quantisation

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Size:
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
        )
        text = config.get_text_config()
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            linear=linear,
            other=sum(parameter.numel() for parameter in model.parameters()) - linear,
            context=getattr(text, "max_position_embeddings", CONTEXT_AT_LEAST),
            kv_bytes_per_token=2 * text.num_hidden_layers * kv_heads * head_dim * 2,  # K and V, 2 bytes each
        )

    def needed(self, precision: str, context: int) -> int:
        """Bytes of GPU memory for the weights, the KV cache of one conversation of `context` tokens, and headroom."""
        # NF4 with double quantisation: 4 bits, and per 64 weights 8 bits of scale, themselves scaled per 256.
        width = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 0.516}
        if self.own_bytes is not None:
            weights = self.own_bytes
        else:
            weights = self.linear * width[precision] + self.other * (4 if precision == "float32" else 2)
        return int(weights + self.kv_bytes_per_token * min(context, self.context) + HEADROOM_BYTES)


def measure(files: Files) -> tuple[Size, str | None]:
    """What the model will weigh, and the quantisation that its checkpoint brings, if any. Needs no weights."""
    with _told(files):
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        size = Size.of(config)
    own = _own_quantization(config)
    return (replace(size, own_bytes=sum(files.weights().values())) if own else size), own


def check_whole(files: Files, stem: str = "model") -> None:
    """Raise ModelUnavailable if a file of weights is here but cut off or a Git LFS pointer. Reads only its header."""
    with _told(files):
        for name in files.weights(stem):
            if name.endswith(".safetensors") and (files.folder / name).is_file():
                with safe_open(files.folder / name, "pt"):
                    pass


def choose_precision(asked: str, own: str | None, size: Size, gpus: Sequence[Gpu]) -> tuple[str, str]:
    """The precision to load in, and why. No GPUs means the CPU.

    asked: a QUANTIZATION, or "float32", which is not offered as a setting: tests compare in it.
    own: the quantisation that the checkpoint brings.
    """
    full = str(full_precision(gpus)).removeprefix("torch.")
    if own:
        return own, f"It comes quantised with {own}, and stays so."
    if asked != "auto":
        return full if asked == "none" else asked, f"QUANTIZATION={asked}."
    if not gpus:
        return "int8", "int8 is fastest on a CPU."
    needed, free = size.needed(full, size.context), sum(gpu.free_bytes for gpu in gpus)
    why = f"{full} takes {needed / GB:.1f} GB with a full context, and {free / GB:.1f} GB of GPU memory are free."
    return (full if needed <= free else "nf4"), why


def check_memory(name: str, precision: str, size: Size, gpus: Sequence[Gpu]) -> None:
    """Raise ModelUnavailable if the GPUs together cannot hold the model and a conversation."""
    needed, free = size.needed(precision, CONTEXT_AT_LEAST), sum(gpu.free_bytes for gpu in gpus)
    if gpus and needed > free:
        smaller = size.own_bytes is None and size.needed("nf4", CONTEXT_AT_LEAST) <= free and precision != "nf4"
        raise ModelUnavailable(
            f"{name} needs about {needed / GB:.1f} GB of GPU memory in {precision} and {free / GB:.1f} GB are free. "
            f"{'Set QUANTIZATION=nf4' if smaller else 'Choose a smaller model'}, free some memory, or use a larger GPU."
        )


def place(precision: str, size: Size, gpus: Sequence[Gpu]) -> tuple[str | dict[str, str | int], dict[int, int] | None]:
    """device_map and max_memory: the CPU, the roomiest GPU if it holds everything, else spread over all of them."""
    if not gpus:
        return {"": "cpu"}, None
    roomiest = max(range(len(gpus)), key=lambda index: gpus[index].free_bytes)
    if len(gpus) == 1 or size.needed(precision, size.context) <= gpus[roomiest].free_bytes:
        return {"": roomiest}, None
    return "auto", {index: max(0, gpu.free_bytes - HEADROOM_BYTES) for index, gpu in enumerate(gpus)}


# ---- Loading ----


def load(plan: Plan, progress: Progress) -> Loaded:
    """Download the weights if they are not here, after checking that they will fit, and load them."""
    files, found = plan.base, gpus()
    size, own = measure(files)
    precision, why = choose_precision(plan.quantization, own, size, found)
    check_memory(plan.model_id, precision, size, found)
    download.fetch_weights(files, progress)
    if plan.adapter:
        download.fetch_weights(plan.adapter, progress, "adapter_model")
    progress("load", 0, 0)
    with _told(files, precision):
        model = _load(files, precision, own, size, found)
    if plan.adapter:
        # In 4 or 8 bits merging would round the change away: there it stays apart.
        merge = precision in FULL or (precision == "int8" and not found)
        with _told(plan.adapter, precision):
            adapted = adapt(model, plan, precision)
            model = adapted.merge_and_unload() if merge else adapted.get_base_model()
    if precision == "int8" and not found:
        quantize_int8(model)
    if precision == "nf4" and found:
        speed_up_nf4(model)
    model.eval().requires_grad_(False)
    return Loaded(model, precision, _device(model), f"{plan.why} {why}")


def load_base(plan: Plan, precision: str, device: str | int, progress: Progress) -> PreTrainedModel:
    """The model without its adapter, whole on one device, to be trained or merged rather than served.

    precision: one of FULL, or "nf4" or "int8" by bitsandbytes, with the full precision of the device around it.
    """
    files, found = plan.base, gpus()
    if own := measure(files)[1]:
        raise ModelUnavailable(f"{files} comes quantised with {own}. Choose the original weights to train or merge.")
    download.fetch_weights(files, progress)
    full = full_precision(found)
    config = {"nf4": nf4(full), "int8": BitsAndBytesConfig(load_in_8bit=True)}.get(precision)
    with _told(files, precision):
        return _read(files, getattr(torch, precision) if precision in FULL else full, config, {"": device})


def adapt(model: PreTrainedModel, plan: Plan, precision: str) -> PeftModel:
    """The base model, loaded in this precision, with the plan's adapter beside its weights."""
    from peft import PeftModel

    with _told(plan.adapter, precision):
        vocabulary = len(load_tokenizer(plan))
        if vocabulary > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocabulary)
        adapted = PeftModel.from_pretrained(model, plan.adapter.folder)
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelUnavailable(
            f"{plan.adapter} is a prompt, not LoRA or a similar adapter, and cannot be used. Choose another."
        )
    return adapted


def full_precision(gpus: Sequence[Gpu]) -> torch.dtype:
    """bfloat16 where every GPU computes in it, as CPUs do; float16 on the older ones."""
    return torch.bfloat16 if all(gpu.capability >= (8, 0) for gpu in gpus) else torch.float16


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _load(files: Files, precision: str, own: str | None, size: Size, found: Sequence[Gpu]) -> PreTrainedModel:
    device_map, max_memory = place(precision, size, found)
    full = full_precision(found)
    dtype, config = torch.float32 if precision == "float32" else full, None
    if not own and precision == "nf4":
        config = nf4(full)
    elif not own and precision == "int8" and found:
        config, dtype = BitsAndBytesConfig(load_in_8bit=True), torch.float16  # it computes in float16 and would cast
    model = _read(files, dtype, config, device_map, max_memory)
    if isinstance(device_map, dict):
        remove_hook_from_module(model, recurse=True)  # they move inputs between devices, and there is only one
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) and found:
        raise torch.OutOfMemoryError("some layers did not fit on the GPUs")
    return model


def _read(
    files: Files,
    dtype: torch.dtype,
    config: BitsAndBytesConfig | None,
    device_map: str | dict[str, str | int],
    max_memory: dict[int, int] | None = None,
) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        files.folder,
        dtype=dtype,
        quantization_config=config,
        device_map=device_map,
        max_memory=max_memory,
        trust_remote_code=False,  # None would ask at the terminal
        output_loading_info=True,
    )
    if lost := sorted(report["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise ValueError(f"{len(lost)} tensors are missing, such as {lost[0]}")
    return model


def _own_quantization(config: PreTrainedConfig) -> str | None:
    """ "gptq", "awq", ...: the method of the checkpoint's own quantisation, if it has one."""
    own = getattr(config, "quantization_config", None)
    own = own if own is None or isinstance(own, dict) else own.to_dict()
    return own and str(getattr(own.get("quant_method"), "value", own.get("quant_method") or "its own quantisation"))


def _device(model: PreTrainedModel) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    return str(devices.pop()) if len(devices) == 1 else f"{len(devices)} x cuda"


# What transformers, safetensors, tokenizers and peft raise at a file that is not what it should be.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@contextmanager
def _told(files: Files, precision: str = "") -> Iterator[None]:
    """What the libraries raise while reading `files`, as a sentence; the log keeps the original."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = sum(gpu.free_bytes for gpu in gpus())
        raise ModelUnavailable(
            f"The GPU memory ran out while loading {files} in {precision} ({free / GB:.1f} GB were left). "
            "Set QUANTIZATION=nf4, free some memory, or use a larger GPU."
        ) from error
    except MemoryError as error:
        raise ModelUnavailable(_loading_sentence(files, "not enough memory")) from error
    except ImportError as error:
        log.warning("Loading %s: %s", files, error)
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelUnavailable(f"{files} needs a package that is missing or does not work here: {reason}") from error
    except UNREADABLE as error:
        log.warning("Loading %s failed", files, exc_info=True)
        raise ModelUnavailable(_loading_sentence(files, str(error))) from error


def _loading_sentence(files: Files, error: str) -> str:
    if "trust_remote_code" in error:
        return f"{files} needs Python code of its own, which this program does not run. Choose another model."
    if "Unrecognized" in error or "model type" in error or "does not recognize this architecture" in error:
        return f"{files} is not a causal language model that this version of transformers knows. Choose another model."
    if "size mismatch" in error:
        return f"The weights of {files} do not fit their model. An adapter needs its own base: check BASE_MODEL."
    if "CUDA" in error:
        return f"The GPU reported an error while loading {files}. See the log, and whether nvidia-smi works here."
    if "t allocate memory" in error or "not enough memory" in error:
        return f"The memory ran out while loading {files}. Choose a smaller model or a machine with more."
    if "bitsandbytes" in error.lower() or "bnb" in error.lower():
        return f"bitsandbytes does not work here, so {files} cannot be quantised. Set QUANTIZATION=none."
    if files.repo:
        return (
            f"A file of {files} is damaged. Remove {files.folder.parents[1]} and start again to download it once more."
        )
    return f"A file in {files} is damaged, missing or not what its name says. Copy or save the model there once more."


# ---- int8 on a CPU ----


def quantize_int8(model: nn.Module) -> None:
    """Turn the linear layers of a bfloat16 model on the CPU into Int8Linear, one at a time to spare memory."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.in_features % Int8Linear.MULTIPLE == 0:
                setattr(parent, name, Int8Linear(child))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else what was not converted keeps the whole file mapped
    with suppress(AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what converting needed stays with the process otherwise, 0.3 GB


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers with one scale per output channel.

    Decoding reads all weights for each token and is as fast as memory: half the bytes, nearly twice the tokens.
    """

    MULTIPLE = 64  # of in_features: the kernel reads whole vectors and past the end of any other row, silently
    ROWS_MULTIPLE = 32
    ROWS_PACKED = 8  # tokens at once; above, as in prefill, a bfloat16 matrix product is faster

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()  # [out, in]
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).to(linear.weight.dtype)
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()  # [..., in] -> [rows, in]; the kernel ignores strides
        if len(rows) > self.ROWS_PACKED:
            # oneDNN keeps a program for each number of rows it has met, 0.65 MB a piece: it meets few.
            padded = F.pad(rows, (0, 0, 0, -len(rows) % self.ROWS_MULTIPLE))
            y = F.linear(padded, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
            return y[: len(rows)].view(*x.shape[:-1], self.out_features)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


# ---- NF4 on a GPU ----


def speed_up_nf4(model: nn.Module) -> None:
    """Let bitsandbytes' layers take a few tokens at once through kernels.nf4's nf4_linear, on the same weights."""
    try:
        from bitsandbytes.nn import Linear4bit

        from llama2_chat.kernels import nf4  # noqa: F401 - registers the operator; needs Triton
    except ImportError:
        return

    class Nf4Linear(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.llama2_chat.nf4_linear(
                x, self.packed, self.absmax, self.code, self.absmax_scale, self.offset, self.out_features
            )

    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if type(module) is not Linear4bit or module.bias is not None or not state.nested:
            continue
        if (state.quant_type, state.blocksize, state.dtype) == ("nf4", 64, torch.bfloat16):
            buffers = {"packed": module.weight.data, "absmax": state.absmax, "code": state.state2.code}
            buffers |= {"absmax_scale": state.state2.absmax, "offset": state.offset}
            for name, tensor in buffers.items():
                module.register_buffer(name, tensor, persistent=False)
            module.__class__ = Nf4Linear
