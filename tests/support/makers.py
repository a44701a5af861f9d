"""Layers quantised by the programs that published the formats. How tests/loading/makers.safetensors was made.

    pip install --target MAKERS --no-deps compressed-tensors==0.20.0 loguru auto-gptq==0.7.1    on Python 3.11
    pip download --no-deps --no-binary :all: autoawq==0.2.9, and its folder awq/ into MAKERS too
    PYTHONPATH=MAKERS python tests/support/makers.py tests/loading/makers.safetensors

AutoGPTQ and AutoAWQ no longer import beside today's transformers, so only the files that quantise and pack are run.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import nn

GROUP = 32


def without_init(name):
    """A package whose __init__ is not run, for the sake of the modules in it."""
    package = types.ModuleType(name)
    parent, _, child = name.rpartition(".")
    origins = sys.modules[parent].__path__ if parent else sys.path
    package.__path__ = [str(Path(origin, child)) for origin in origins if Path(origin, child).is_dir()]
    sys.modules[name] = package


def gptq(weight, bits=4, act_order=False):
    import transformers

    transformers.Conv1D = transformers.pytorch_utils.Conv1D  # where it was when AutoGPTQ was written
    torch.cuda.synchronize = lambda: None
    for name in ("auto_gptq", "auto_gptq.quantization", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        if name not in sys.modules:
            without_init(name)
    quantizing = importlib.import_module("auto_gptq.quantization.gptq")
    packing = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    solver = quantizing.GPTQ(linear)
    solver.quantizer.configure(bits, perchannel=True, sym=False)
    inputs = torch.randn(256, weight.shape[1]) * torch.rand(weight.shape[1])  # some matter more: an order to act in
    solver.add_batch(inputs, None)
    scale, zero, g_idx = solver.fasterquant(group_size=GROUP, actorder=act_order)
    layer = packing.QuantLinear(bits, GROUP, weight.shape[1], weight.shape[0], bias=False)
    layer.pack(linear.half(), scale, zero, g_idx)
    stands_for = layer.forward(torch.eye(weight.shape[1]).half()).T  # on a CPU it multiplies with what it unpacks
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, stands_for


def awq(weight):
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.quantize"):
        if name not in sys.modules:
            without_init(name)
    gemm = importlib.import_module("awq.modules.linear.gemm")
    groups = weight.reshape(-1, GROUP)
    # AwqQuantizer.pseudo_quantize_tensor; its file imports models that transformers no longer has.
    scales = (groups.amax(1) - groups.amin(1)).clamp(min=1e-5) / 15
    zeros = (-torch.round(groups.amin(1) / scales)).clamp(0, 15)
    numbers = torch.clamp(torch.round(groups / scales[:, None]) + zeros[:, None], 0, 15)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = ((numbers - zeros[:, None]) * scales[:, None]).reshape(weight.shape)
    scales, zeros = (each.view(weight.shape[0], -1).T.contiguous() for each in (scales, zeros))
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    return parts, gemm.dequantize_gemm(*parts.values(), 4, GROUP).T


def compressed(weight, form, activations=None, **options):
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**options),
        input_activations=QuantizationArgs(num_bits=8, dynamic=True, strategy="token") if activations else None,
    )
    groups = weight.unflatten(1, (-1, options.get("group_size", weight.shape[1])))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    whole = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    parts = compressor.compress(whole, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"]


GROUPS = {"strategy": "group", "group_size": GROUP}
MAKERS = {
    "gptq": gptq,
    "gptq act-order": lambda weight: gptq(weight, act_order=True),
    "gptq 8 bits": lambda weight: gptq(weight, bits=8),
    "awq": awq,
    "int4": lambda weight: compressed(weight, "pack-quantized", num_bits=4, **GROUPS),
    "int4 with zeros": lambda weight: compressed(weight, "pack-quantized", num_bits=4, symmetric=False, **GROUPS),
    "int8": lambda weight: compressed(weight, "int-quantized", True, num_bits=8, strategy="channel"),
    "float8": lambda weight: compressed(weight, "float-quantized", True, num_bits=8, type="float", strategy="channel"),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    tensors = {}
    for maker, make in MAKERS.items():
        parts, stands_for = make(torch.randn(32, 96) / 10)
        tensors |= {f"{maker}/{part}": tensor for part, tensor in parts.items()}
        tensors[f"{maker}/stands for"] = stands_for.half()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[1])
