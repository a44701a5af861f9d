"""Checkpoints that come quantised, as the plain weights that they stand for.

Whoever made them rounded each linear layer to few bits; here each is multiplied out again, tensor by tensor, for
unpack.py to write down. No answer depends on a kernel that one format needs.
The layouts are those that AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek-V3 and bitsandbytes publish.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.disk import Files
from llama2_chat.text import first_line

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where column i of eight lies among the nibbles of its int32, lowest first
PLAIN = (torch.float32, torch.float16, torch.bfloat16)
# What a rule of GPTQ's "dynamic" may say of some layers. A rule that begins with "-:" leaves them as they are.
DYNAMIC = {"bits", "group_size", "desc_act", "sym", "mse", "damp_percent", "damp_auto_increment"}
READABLE_BITS = {2, 4, 8}  # that fill an int32 without a rest
# What stands beside the weights and changes none of them: scales of activations and of a quantised KV cache.
OF_ACTIVATIONS = ("input", "output", "q", "k", "v")
IGNORED = {
    "inv_freq",
    "activation_scale",
    *(f"{name}_{part}" for name in OF_ACTIVATIONS for part in ("scale", "zero_point")),
}

Parts = Mapping[str, Tensor]  # of one layer, by the last part of their names
Config = Mapping[str, Any]  # the quantization_config of config.json


def quantization_of(config: Any) -> Config | None:
    """The quantization_config of a model's configuration; None if it comes in plain weights."""
    own: Any = getattr(config, "quantization_config", None)
    return (own if isinstance(own, dict) else own.to_dict()) if own else None


def comes_in_nf4(config: Any) -> bool:
    """Whether a model's weights come in NF4 by bitsandbytes."""
    quantization = quantization_of(config) or {}
    return bool(quantization.get("load_in_4bit")) and quantization.get("bnb_4bit_quant_type") == "nf4"


def check_readable(files: Files, quantization: Config) -> None:
    """Raise ModelUnavailable, by name, for a format that nothing here can read."""
    method = method_of(quantization)
    if any(not name.endswith(".safetensors") for name in files.weights()):
        raise ModelUnavailable(
            f"{files} comes quantised by {method} in pickles. Choose a copy in safetensors, or the original weights."
        )
    if method not in READERS:
        raise ModelUnavailable(
            f"{files} comes quantised by {method}, which this program cannot read. It reads {', '.join(READERS)}. "
            "Choose one of these, or the original weights."
        )
    try:
        layout, bits = _layout(method, quantization), _bits(method, quantization)
        _fp8_block(quantization)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelUnavailable(
            f"The quantization_config in the config.json of {files} makes no sense ({first_line(error)}). Choose "
            "another copy, or the original weights."
        ) from error
    known = layout in LAYOUTS.get(method, ("plain",)) and len(bits) == 1 and bits <= READABLE_BITS
    if not known or not _rules_are_known(quantization) or quantization.get("transform_config"):
        raise ModelUnavailable(
            f"{files} comes quantised by {method} in a layout that this program cannot read "
            f"({layout}, {', '.join(map(str, sorted(bits)))} bits). Choose another, or the original weights."
        )


def _layout(method: str, quantization: Config) -> str:
    if method == "awq":
        return str(quantization.get("version", "gemm")).lower()
    layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "plain").lower()
    if method == "compressed-tensors" and any(each.get("strategy") == "block" for each in _weights(quantization)):
        return layout if layout != "pack-quantized" and _block_size(quantization) else "blocks"
    return layout


def _bits(method: str, quantization: Config) -> set[int]:
    """Of all that is quantised: a model may mix several."""
    if method == "compressed-tensors":
        return {int(each["num_bits"]) for each in _weights(quantization)}
    if method in ("gptq", "awq"):
        return {int(quantization.get("bits", quantization.get("w_bit", 4)))} | ({4} if method == "awq" else set())
    return {8}


def _rules_are_known(quantization: Config) -> bool:
    """Whether what GPTQ's "dynamic" changes for some layers shows in the shapes of their tensors, or in no number."""
    rules = quantization.get("dynamic")
    if not rules:
        return True
    if method_of(quantization) != "gptq" or not isinstance(rules, dict):
        return False
    return all(
        isinstance(rule, dict) and rule.keys() <= DYNAMIC and rule.get("bits", 4) in READABLE_BITS
        for rule in rules.values()
    )


def _weights(quantization: Config) -> list[Config]:
    """How compressed-tensors has rounded the weights of each group of layers; some groups round activations only."""
    groups = (quantization.get("config_groups") or {}).values()
    return [group["weights"] for group in groups if group.get("weights")]


def _block_size(quantization: Config) -> tuple[int, int] | None:
    """Rows and columns of the blocks in which compressed-tensors has rounded all that it has; None if it has not."""
    sizes = {str(each.get("block_structure")) for each in _weights(quantization)}
    found = re.findall(r"\d+", sizes.pop()) if len(sizes) == 1 else []  # "[128, 128]", or "128x128" as it once was
    return (int(found[0]), int(found[1])) if len(found) == 2 else None


def _fp8_block(quantization: Config) -> tuple[int, int]:
    """Rows and columns of the blocks that share a scale, where FP8 has one for each block."""
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


def method_of(quantization: Config) -> str:
    method = quantization.get("quant_method", quantization.get("method"))
    return str(getattr(method, "value", method or ("bitsandbytes" if _is_bitsandbytes(quantization) else "unknown")))


def _is_bitsandbytes(quantization: Config) -> bool:
    return bool(quantization.get("load_in_8bit") or quantization.get("load_in_4bit"))


def plain_tensors(
    files: Files, quantization: Config, dtype: torch.dtype, expected: Container[str]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the plain model, in `dtype`, one layer at a time. expected: names it has."""
    places = {}
    for file in files.weights():
        with safe_open(files.folder / file, "pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file))
    method = method_of(quantization)
    layers: dict[str, dict[str, str]] = {}  # prefix -> last part of the name -> name
    for name in places:
        prefix, part = _split(name)
        layers.setdefault(prefix, {})[part] = name
    for prefix, names in layers.items():
        parts = {part: _read(files, places[name], name) for part, name in names.items() if part not in IGNORED}
        bias = parts.pop("bias", None)
        if not parts and bias is None:
            continue
        weight = READERS[method](parts, quantization) if parts else None
        if weight is None:
            raise ModelUnavailable(
                f"{files} holds tensors of {prefix} that do not belong to {method} as it is published: "
                f"{', '.join(sorted(parts))}. Choose another copy of the model, or the original weights."
            )
        yield f"{prefix}.weight", weight.to(dtype)
        # AutoGPTQ writes zeros where the model has no bias.
        if bias is not None and (f"{prefix}.bias" in expected or bool(bias.any())):
            yield f"{prefix}.bias", bias.to(dtype)


def _split(name: str) -> tuple[str, str]:
    """Layer and part: bitsandbytes hangs its parts below the weight, as in "q_proj.weight.absmax"."""
    prefix, found, part = name.partition(".weight.")
    return (prefix, f"weight.{part}") if found else (name.rpartition(".")[0], name.rpartition(".")[2])


def _read(files: Files, file: str, name: str) -> Tensor:
    with safe_open(files.folder / file, "pt") as opened:
        return opened.get_tensor(name)


# ---- One layer of each format: [out, in] in float32, a plain weight as it is, or None for what does not belong ----


def _plain(parts: Parts) -> Tensor | None:
    """A weight that was left as it is; a float8 without its scale is none."""
    weight = parts.get("weight")
    return weight if weight is not None and len(parts) == 1 and weight.dtype in PLAIN else None


def _bitsandbytes(parts: Parts, quantization: Config) -> Tensor | None:
    import bitsandbytes

    # Releases before 0.45 saved a model that a GPU had run in tiles of that GPU, of which weight_format is the number.
    if int(parts.get("weight_format", 0)):
        return None
    if set(parts) - {"weight_format"} == {"weight", "SCB"}:  # int8 by rows, 127 is the row's largest
        return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127)
    if set(parts) == {"weight"}:
        return _plain(parts)
    if not any(part.startswith("weight.quant_state.bitsandbytes__") for part in parts):
        return None
    state = {part.removeprefix("weight."): tensor for part, tensor in parts.items() if part != "weight"}
    quant_state = bitsandbytes.functional.QuantState.from_dict(state, torch.device("cpu"))
    return bitsandbytes.functional.dequantize_4bit(parts["weight"], quant_state).float()


def _fp8(parts: Parts, quantization: Config) -> Tensor | None:
    weight = parts.get("weight")
    scale = next((parts[name] for name in ("weight_scale_inv", "weight_scale") if name in parts), None)
    if weight is None or len(parts) > 2:
        return None
    if scale is None:
        return _plain(parts)
    if weight.dtype in PLAIN:  # multiplied out already, or not: nothing says which
        return None
    scale = scale.float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(1, 1)
    if scale.dim() == 2 and scale.shape != (weight.shape[0], 1):
        size = _fp8_block(quantization)
        return weight.float() * _spread(scale, size, weight) if _are_blocks(scale, size, weight) else None
    return weight.float() * scale.reshape(-1, 1)


def _are_blocks(scale: Tensor, size: tuple[int, int], weight: Tensor) -> bool:
    """Whether there is just one scale for each block of a weight, the last of which may be smaller."""
    return min(size) > 0 and scale.shape == tuple(-(-whole // of) for whole, of in zip(weight.shape, size, strict=True))


def _spread(scale: Tensor, size: tuple[int, int], weight: Tensor) -> Tensor:
    """The scale of each number of a weight, of one scale per block."""
    (rows, columns), (height, width) = size, weight.shape
    return scale.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]


def _groups(columns: int, scales: Tensor, sizes: Iterable[Any], told: Tensor | None) -> Tensor | None:
    """The group of each column of a weight, int64 [columns]; None if nothing says it.

    scales: [groups, out]. sizes: columns of a group, as config.json has them. told: the same as this, where the file
    holds it.
    """
    count = len(scales)
    if told is not None:
        fits = told.shape == (columns,) and int(told.min()) >= 0 and int(told.max()) < count
        return told.long() if fits else None
    fitting = [size for size in sizes if isinstance(size, int) and size > 0 and -(-columns // size) == count]
    if not fitting and columns % count:
        return None
    return torch.arange(columns) // (fitting[0] if fitting else columns // count)


def _gptq(parts: Parts, quantization: Config) -> Tensor | None:
    if set(parts) == {"weight"}:
        return _plain(parts)
    if not {"qweight", "qzeros", "scales"} <= set(parts) <= {"qweight", "qzeros", "scales", "g_idx"}:
        return None
    scales = parts["scales"].float()  # [groups, out]
    bits = 32 * parts["qzeros"].shape[1] // scales.shape[1]  # of this layer: "dynamic" may say otherwise than "bits"
    if bits not in READABLE_BITS:
        return None
    values, zeros = _unpack(parts["qweight"].T, bits).T, parts["qzeros"]  # [in, out]
    if _layout("gptq", quantization) != "gptq_v2":
        # The first version wrote one less of each, all of an int32 at once: what is below 0 borrows from its neighbour.
        zeros = zeros + sum(1 << shift for shift in range(0, 32, bits))
    zeros = _unpack(zeros, bits)[:, : scales.shape[1]]
    groups = _groups(len(values), scales, [quantization.get("group_size")], parts.get("g_idx"))
    if groups is None or zeros.shape != scales.shape:
        return None
    return (scales[groups] * (values - zeros[groups])).T


def _awq(parts: Parts, quantization: Config) -> Tensor | None:
    if set(parts) == {"weight"}:
        return _plain(parts)
    if set(parts) != {"qweight", "qzeros", "scales"}:
        return None
    scales = parts["scales"].float()  # [groups, out]
    values, zeros = (_in_order(_unpack(parts[name], 4)) for name in ("qweight", "qzeros"))  # [in, out], [groups, out]
    groups = _groups(len(values), scales, [quantization.get("group_size", quantization.get("q_group_size"))], None)
    if groups is None or zeros.shape != scales.shape:
        return None
    return (scales[groups] * (values - zeros[groups])).T


def _in_order(values: Tensor) -> Tensor:
    return values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1)


def _compressed_tensors(parts: Parts, quantization: Config) -> Tensor | None:
    if set(parts) == {"weight"}:
        return _plain(parts)
    known = {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"}
    if not set(parts) <= known or "weight_scale" not in parts:
        return None
    if "weight" in parts and parts["weight"].dtype in PLAIN:  # multiplied out already, or not: nothing says which
        return None
    if "weight" in parts:
        values = parts["weight"].float()
        zeros = parts["weight_zero_point"].float() if "weight_zero_point" in parts else None
    else:
        (bits,) = _bits("compressed-tensors", quantization)
        middle = 2 ** (bits - 1)
        values = _unpack(parts["weight_packed"], bits)[:, : int(parts["weight_shape"][1])] - middle
        zeros = None
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"]
            is_packed = zeros.dtype == torch.int32
            zeros = _unpack(zeros.T, bits).T[: values.shape[0]] - middle if is_packed else zeros.float()
    scales = parts["weight_scale"].float()
    if (size := _block_size(quantization)) and scales.dim() == 2:
        if not _are_blocks(scales, size, values):
            return None
        zeros = torch.zeros_like(scales) if zeros is None else zeros
        return _spread(scales, size, values) * (values - _spread(zeros, size, values))
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales  # [out, groups], or one for all
    told = parts.get("weight_g_idx")
    if told is not None and bool((told < 0).any()):  # it was not needed
        told = None
    groups = _groups(values.shape[1], scales.T, [each.get("group_size") for each in _weights(quantization)], told)
    if groups is None:
        return None
    zeros = torch.zeros_like(scales) if zeros is None else zeros.reshape(scales.shape)
    return scales[:, groups] * (values - zeros[:, groups])


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """float32 [rows, columns * 32 / bits] of int32 [rows, columns]: the lowest bits are the first number."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1).float()


READERS: dict[str, Callable[[Parts, Config], Tensor | None]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
LAYOUTS = {
    "awq": ("gemm",),
    "gptq": ("plain", "gptq", "gptq_v2"),
    "fp8": ("plain", "e4m3", "e5m2"),
    "compressed-tensors": ("plain", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
}
