"""Models in 4 and 8 bits on GPUs: quantised while their weights are read, without calibration, and kept in the cache.

transformers asks PackedQuantizer for each weight, on the GPU: no model has to be anywhere in 16 bits as a whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.packed import BITS, MULTIPLE, QUANTIZED, PackedLinear, join_packed, quantize
from llama2_chat.loading.disk import (
    Files,
    check_free_space,
    digest,
    in_gb,
    remove_copies,
    source_digest,
    state_digest,
)
from llama2_chat.loading.memory import DeviceMap, Gpu, compute_dtype
from llama2_chat.loading.parts import Part
from llama2_chat.loading.quantize import TOGETHER
from llama2_chat.loading.read import UNREADABLE, read_model
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

METHOD = "llama2_chat"  # as config.json of a copy in the cache says
VERSION = 3  # of how weights are quantised and written: older copies are made anew
LEAST_CAPABILITY = (7, 5)


def why_not_packed(gpus: Sequence[Gpu]) -> str | None:
    """Why there are no products in int4 and int8 on these GPUs; None if there are. Compiles a kernel at first."""
    if any(gpu.capability < LEAST_CAPABILITY for gpu in gpus):
        return "a GPU here is older than compute capability 7.5"
    try:
        weight = torch.eye(MULTIPLE, device="cuda", dtype=compute_dtype(gpus))
        tried = PackedLinear.of(weight, BITS["int4"])
        tried.prepare()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.warning("humming-kernels, which int4 and int8 need, does not work here", exc_info=True)
        return f"humming-kernels does not work here ({first_line(error)})"
    return None


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """precision: one of kernels.packed.BITS."""

    def __init__(self, precision: str, **kwargs: Any) -> None:
        self.quant_method: Any = METHOD
        self.precision = precision


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    requires_calibration = False
    quantization_config: PackedConfig

    @property
    def _bits(self) -> int:
        return BITS[self.quantization_config.precision]

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._is_spread = isinstance(device_map, str)  # over several GPUs, by the sizes of the layers

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        # On a single GPU this is only asked for the memory that transformers takes in one piece beforehand. Of that
        # nothing could be given back when finish_packed() has put the weights elsewhere: 5 GB for the 13B.
        if isinstance(get_module_from_name(model, param_name)[0], PackedLinear) and not self._is_spread:
            return 0
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedLinear) and name == "weight" and not self.pre_quantized

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        left_out = self.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or []))
        for name, linear in list(model.named_modules()):
            if PackedLinear.suits(linear) and should_convert_module(name, left_out):
                packed = PackedLinear(
                    linear.in_features, linear.out_features, linear.bias is not None, self._bits, model.dtype
                )
                model.set_submodule(name, packed)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._bits)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        ((name, values),) = input_dict.items()
        quantized = quantize(values[0] if isinstance(values, list) else values, self.bits)
        names = (name.removesuffix("weight") + each for each in QUANTIZED)
        return {name: tensor for name, tensor in zip(names, quantized, strict=True) if tensor is not None}


def finish_packed(model: nn.Module) -> None:
    """Make a model that was loaded in a PackedConfig ready to compute: what has the same input becomes one product.

    Weights in their new order take the place of those in the old one: a small GPU has no room for both.
    """
    # A list of all modules would keep the weights that are replaced, 8.8 GB of the 13B in int8, to the end.
    for parent in [module for module in model.modules() if any(map(_is_packed, module.children()))]:
        packed = {name: child for name, child in parent.named_children() if _is_packed(child)}
        layers: list[PackedLinear] = []
        for names in TOGETHER:
            if all(name in packed for name in names):
                parts = join_packed([packed.pop(name) for name in names])
                layers.append(parts[0].whole)
                for name, part in zip(names, parts, strict=True):
                    setattr(parent, name, part)
        layers += packed.values()
        for layer in layers:
            layer.prepare()
            torch.cuda.empty_cache()  # else the next weights would lie in pieces of memory too large for them


def _is_packed(module: nn.Module) -> TypeGuard[PackedLinear]:
    return type(module) is PackedLinear


# ---- Kept for the next start ----


def packed_copy(files: Files, precision: str, cache_dir: Path) -> Files | None:
    """The model as save_packed() has kept it, if it has and the original is still the same."""
    folder = _folder(files, precision, cache_dir)
    return Files(folder) if folder.is_dir() else None


def save_packed(model: PreTrainedModel, files: Files, precision: str, cache_dir: Path) -> Files | None:
    """Keep a model that was loaded in a PackedConfig and is not finished. None, with a line in the log, if it cannot
    be kept."""
    folder = _folder(files, precision, cache_dir)
    staging, source = folder.with_suffix(".staging"), folder.name.partition("-")[0]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{source}.lock")):
            if not folder.is_dir():  # else another program has kept it meanwhile
                remove_copies(folder.parent, source, f"{files} in {precision}")
                size = sum(tensor.nbytes for tensor in model.state_dict().values())
                remedy = "set CACHE_DIR to a folder on a larger disk"
                check_free_space(f"A copy of {files} in {precision}", size, folder.parent, remedy)
                model.save_pretrained(staging)
                staging.rename(folder)
                log.info("%s in %s is kept for the next start: %s, %s", files, precision, folder, in_gb(size))
        return Files(folder)
    except (OSError, SafetensorError, ModelUnavailable) as error:
        shutil.rmtree(staging, ignore_errors=True)
        log.warning("%s will be quantised at each start, as no copy in %s was kept: %s", files, precision, error)
        return None


def _folder(files: Files, precision: str, cache_dir: Path) -> Path:
    source = digest(f"{source_digest(files)} {precision}")
    return cache_dir / "packed" / f"{source}-{state_digest(files, VERSION)}"


def read_packed(
    files: Files,
    precision: str,
    cache_dir: Path,
    dtype: torch.dtype,
    device_map: DeviceMap,
    max_memory: dict[int, int] | None,
    part: Part | None = None,
) -> PreTrainedModel:
    """From the copy in cache_dir, which is made if there is none: what quantising leaves behind in the memory of a GPU
    is gone by then. Without room for a copy it has to do without.

    part: what of the model, of which there is a copy by itself; None for all of it.
    """
    kept = precision if part is None else f"{precision}, {part}"
    if copy := packed_copy(files, kept, cache_dir):
        try:
            return read_model(copy, dtype, None, device_map, max_memory)
        except (ModelUnavailable, *UNREADABLE) as error:
            if is_out_of_memory(error):
                raise
            log.warning("%s is damaged and made anew", copy, exc_info=True)
            shutil.rmtree(copy.folder, ignore_errors=True)
    model = read_model(files, dtype, PackedConfig(precision), device_map, max_memory, part)
    copy = save_packed(model, files, kept, cache_dir)
    if copy is None:
        return model
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return read_model(copy, dtype, None, device_map, max_memory)
