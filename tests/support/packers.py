"""Linear layers in the layouts of other programs, packed as these publish them and not as this project reads them.

Each gives the tensors of one layer, by the last part of their names, and the plain weight that they stand for.
packed() makes a whole model of them.
"""

import json
import shutil

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, WQLinear_GEMM.from_linear: the column in each nibble


def nibbles(numbers, order=range(8)):
    """int32 [rows, columns / 8] of 4-bit numbers [rows, columns]."""
    packed = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        packed |= numbers[:, column::8].long() << (4 * nibble)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def bytes_of(numbers):
    packed = torch.zeros(numbers.shape[0], numbers.shape[1] // 4, dtype=torch.int64)
    for place in range(4):
        packed |= numbers[:, place::4].long() << (8 * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def rounded(weight, group_size, bits, symmetric=False):
    """Numbers [in, out], their zeros and scales [groups, out]."""
    groups = weight.T.unflatten(0, (-1, group_size))  # [groups, size, out]
    low, high = groups.amin(1), groups.amax(1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = (high - low) / (2**bits - 1)
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(1, 2**bits - 1)
    numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    return numbers.flatten(0, 1), zeros, scales


def gptq(weight, bits=4, act_order=False, version=1):
    """AutoGPTQ, QuantLinear.pack: rows of inputs packed downwards, zeros less one."""
    order = torch.randperm(weight.shape[1]) if act_order else torch.arange(weight.shape[1])
    numbers, zeros, scales = rounded(weight[:, order], 32, bits)
    g_idx = torch.empty(weight.shape[1], dtype=torch.int32)
    g_idx[order] = (torch.arange(weight.shape[1]) // 32).to(torch.int32)
    numbers = numbers[order.argsort()]  # the inputs in their own order again
    plain = ((numbers - zeros[g_idx.long()]) * scales[g_idx.long()]).T
    pack = nibbles if bits == 4 else bytes_of
    qzeros = pack(zeros - 1 if version == 1 else zeros)
    return {"qweight": pack(numbers.T).T, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}, plain


def awq(weight):
    numbers, zeros, scales = rounded(weight, 32, 4)
    groups = torch.arange(weight.shape[1]) // 32
    plain = ((numbers - zeros[groups]) * scales[groups]).T
    return {"qweight": nibbles(numbers, AWQ_ORDER), "qzeros": nibbles(zeros, AWQ_ORDER), "scales": scales}, plain


def fp8_blocks(weight, size=16, scale="weight_scale_inv"):
    """DeepSeek-V3: float8 and what to multiply each block with. scale: its name there."""
    rows, columns = (-(-length // size) for length in weight.shape)
    scales = torch.empty(rows, columns)
    packed = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    plain = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            block = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            scales[row, column] = weight[block].abs().max() / 448
            packed[block] = (weight[block] / scales[row, column]).to(torch.float8_e4m3fn)
            plain[block] = packed[block].float() * scales[row, column]
    return {"weight": packed, scale: scales}, plain


def fp8_channels(weight):
    scales = weight.abs().amax(1, keepdim=True) / 448
    packed = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": scales, "input_scale": torch.ones(1)}, packed.float() * scales


def packed_int4(weight):
    """compressed-tensors, pack-quantized: signed numbers lifted by 8, packed along the inputs."""
    numbers, _, scales = rounded(weight, 32, 4, symmetric=True)
    plain = ((numbers - 8) * scales.repeat_interleave(32, 0)).T
    shape = torch.tensor(weight.shape)
    return {"weight_packed": nibbles(numbers.T), "weight_scale": scales.T.contiguous(), "weight_shape": shape}, plain


def int8_channels(weight):
    """compressed-tensors, int-quantized."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scales).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scales}, numbers * scales


def packed(folder, source, pack, quantization):
    """The model in `source`, its linear layers packed, and as transformers has what they stand for."""
    shutil.copytree(source, folder)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = tensors.pop(f"model.{name}.weight")
                parts, stands_for = pack(weight)
                tensors |= {f"model.{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
                module.weight.copy_(stands_for)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, dtype="float32", quantization_config=quantization)
    return model.eval()


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
