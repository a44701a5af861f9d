"""The model to train before its weights: files, tokenizer, stop ids and the precision to load it in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama2_chat import prompt
from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading import choose, hub, load
from llama2_chat.loading.adapters import load_adapter
from llama2_chat.loading.choose import Checkpoint, Plan
from llama2_chat.loading.config import read_generation_config
from llama2_chat.loading.disk import translate_parse_errors
from llama2_chat.loading.memory import compute_dtype, visible_gpus
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.named_files import in_home
from llama2_chat.settings import Settings
from llama2_chat.text import first_line
from llama2_chat.training.options import Options


class BaseModel(NamedTuple):
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase  # with the format in which the model will chat
    stop_ids: set[int]

    def format_fingerprint(self) -> str:
        """SHA-256 of what makes ids of messages: the tokenizer and the chat template."""
        template, backend = self.tokenizer.chat_template, getattr(self.tokenizer, "backend_tokenizer", None)
        return hashlib.sha256(f"{template}{backend.to_str() if backend else ''}".encode()).hexdigest()


def fetch_base(model_name: str, chats: bool = True) -> BaseModel:
    """chats: whether it is trained on conversations, and not only on texts, for which a base model stays one.

    Raises ModelUnavailable if there is no such model, or if it cannot be trained on conversations.
    """
    checkpoint = fetch_checkpoint(model_name)
    tokenizer = load_tokenizer(checkpoint)
    prompt.show_calls(tokenizer)  # as the chat does, which then writes and reads calls in the same way
    if chats and prompt.recognise(tokenizer) == prompt.NO_FORMAT:
        raise ModelUnavailable(
            f"{model_name} has no chat template, and its tokenizer does not give Llama 2's ids, so there is no "
            "format to train it in. Choose another model, or put a chat template into its tokenizer_config.json."
        )
    if chats and prompt.recognise(tokenizer) == prompt.LLAMA_2_FORMAT and tokenizer.chat_template is None:
        tokenizer.chat_template = prompt.LLAMA_2_TEMPLATE  # saved with the result: a base model has none
    stop_ids = load.find_stop_ids(tokenizer, read_generation_config(checkpoint.base))
    return BaseModel(checkpoint, tokenizer, stop_ids)


def fetch_checkpoint(model_name: str) -> Checkpoint:
    """The files of a model or an adapter, but not their weights."""
    settings = Settings.read([])
    plan = Plan(model_name, "", "none", in_home(settings.cache_dir), settings.hub_cache_dir)
    return choose.fetch(plan, no_progress)


def go_on_with_adapter(base: BaseModel, options: Options) -> Options:
    """The options with what an adapter that is trained further has already; the same ones for a model.

    Raises ModelUnavailable if it is another kind of adapter, or if all weights are to be trained.
    """
    adapter = base.checkpoint.adapter
    if not adapter:
        return options
    if not options.use_peft:
        raise ModelUnavailable(
            f"{options.model_name} is an adapter: add --use_peft to train it further, or merge it into its base model "
            "to train all weights."
        )
    with translate_parse_errors(adapter):
        config = json.loads((adapter.folder / "adapter_config.json").read_text("utf-8"))
        if config["peft_type"] != "LORA":
            raise ModelUnavailable(f"{options.model_name} is not LoRA but {config['peft_type']}: train its base model.")
        return replace(
            options,
            lora_r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            target_modules=_as_tuple(config["target_modules"]),
            modules_to_save=_as_tuple(config.get("modules_to_save")),
        )


def _as_tuple(names: str | list[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(sorted(names or ()))


def load_for_training(
    checkpoint: Checkpoint, precision: str, device: str | int, divisible: bool = False
) -> PreTrainedModel:
    """The model with its weights; they stay differentiable, whatever it is asked before and between.

    An adapter is beside them, and is what is trained. divisible: as load_base() has it.
    """
    model = load.load_base(checkpoint, precision, device, no_progress, divisible)
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' Linear4bit, on a CPU that has bfloat16: the first step in eval mode would pack its weights
            # for a kernel that has no backward pass, and training would go on with gradients that end there.
            module.support_avx512bf16_for_cpu = False
    if divisible and precision == "nf4":
        _let_bytes_be_copied(model)
    if checkpoint.adapter:
        adapted: Any = load_adapter(model, checkpoint, is_trainable=True)
        return adapted.eval()  # which has all that a model of transformers has
    return model


def _let_bytes_be_copied(model: Any) -> None:
    """Have FSDP bring the parts of 4-bit weights together as bytes: each layer that is divided gets a weight of another
    dtype.

    Parameters of one dtype it copies as numbers, and PyTorch's kernel for it takes bfloat16 through float32 on a GPU:
    codes that read as NaN become another NaN. Parameters of several dtypes it copies as bytes.
    """
    # In float16 mixed precision is on, and turns float32 into it, but not bytes, which PyTorch 2.11 could not divide.
    dtype = torch.float32 if model.dtype is torch.bfloat16 else torch.uint8
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            other = torch.zeros(1, dtype=dtype, device=model.device)
            module.register_parameter("of_another_dtype", torch.nn.Parameter(other, requires_grad=False))


def fetch_weights(checkpoint: Checkpoint, precision: str, merges: bool = False) -> None:
    """Have the base's weights on this disk, to be loaded in this precision, and the adapter's.

    merges: whether an adapter will be merged into the base, which is done in full precision.
    """
    load.measure(checkpoint.base)  # raises what speaks against it before anything is downloaded
    load.bring_base(checkpoint, precision, no_progress)
    if merges:
        load.bring_plain(checkpoint, no_progress)
    if checkpoint.adapter:
        hub.fetch_weights(checkpoint.adapter, no_progress)


def mend_generation_config(model: Any) -> str:
    """Let the model be saved though its generation_config.json is invalid today. Returns what was done, or nothing.

    Copies of Llama 2 have a temperature and no do_sample: they are meant to be sampled from.
    """
    fault = _generation_fault(model.generation_config)
    if not fault:
        return ""
    model.generation_config.do_sample = True
    done = "do_sample was set"
    if _generation_fault(model.generation_config):
        kept = {
            name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        model.generation_config = GenerationConfig(**kept)
        done = "only its token ids were kept"
    return f"The base's generation_config.json is invalid today ({fault}); {done}, so that the result can be saved."


def _generation_fault(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return next((line.strip() for line in str(error).splitlines() if "`" in line), first_line(error))
    return ""


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """What loading is given to report to: downloads draw a bar of their own."""


def base_precision(options: Options) -> str:
    """All weights are trained in float32, for in 16 bits small steps are rounded away."""
    if options.load_in_4bit:
        return "nf4"
    if options.load_in_8bit:
        return "int8"
    return full_precision() if options.use_peft else "float32"


def full_precision() -> str:
    """Of this device: 16 bits, unless it is a CPU that has no instructions for bfloat16."""
    gpus, cpu = visible_gpus(), torch.cpu.get_capabilities()
    if not (gpus or any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))):
        return "float32"
    return str(compute_dtype(gpus)).removeprefix("torch.")
