"""Linear layers in 4 and 8 bits for CUDA GPUs: quantising them, and products that read the packed weights.

The products are humming-kernels', which compiles them for the card at hand when it first meets a shape, and keeps them
in HUMMING_CACHE_DIR. It needs compute capability 7.5, the compiler that PyTorch for CUDA comes with, and headers that
requirements.txt adds to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama2_chat.kernels.shared_product import SharedProduct

BITS = {"int4": 4, "int8": 8}
GROUP = 64  # weights that share a scale in 4 bits; in 8 bits an output channel shares one
SCHEMAS = {  # by bits, as humming-kernels is told of them
    4: {"quant_method": "humming", "dtype": "uint4", "group_size": GROUP, "has_zero_point": True},
    8: {"quant_method": "humming", "dtype": "uint8"},
}
MULTIPLE = 64  # of in_features and of out_features
PADDED_MULTIPLE = 128  # to which the kernels get them filled up
# How large the range of a group may be, for what its weights span: smaller, since what is cut off may be less than what
# all others gain; and larger, so that they span so many steps of 15: as half of a group of 128 that was rounded before,
# which loses nothing more.
RANGES = (*(1 - 0.025 * step for step in range(17)), *(15 / steps for steps in range(14, 7, -1)))
AT_ONCE = 1 << 24  # weights that are quantised at a time, in float32
QUANTIZED = "weight", "weight_scale", "weight_zero_point"  # of a layer, in the order of quantize()


class Quantized(NamedTuple):
    """A weight [out, in] in so many bits."""

    codes: Tensor  # int32 [out, in * bits / 32], lowest bits first, each a number from 0 on
    scales: Tensor  # in the weight's dtype, [out, in / GROUP] in 4 bits and [out, 1] in 8
    zero_points: Tensor | None  # int32 [out * 4 / 32, in / GROUP]: the code of 0. None in 8 bits, where it is 128


def quantize(weight: Tensor, bits: int) -> Quantized:
    """A weight [out, in] in bfloat16 or float16; in 4 bits both are multiples of MULTIPLE."""
    rows_of = _in_4_bits if bits == 4 else _in_8_bits
    pieces = [rows_of(rows) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    codes, scales, *zero_points = (torch.cat(each) for each in zip(*pieces, strict=True))
    packed_zeros = _packed(zero_points[0].T, 4).T.contiguous() if zero_points else None
    return Quantized(_packed(codes, bits), scales, packed_zeros)


def _in_4_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to 15 for the range of each group, whatever side of 0 it is on; 0 has a code of its own. Codes from
    -8 to 7 lose as much by their error, and more by what a model then says (docs/measured.md)."""
    N, K = weight.shape
    groups = weight.float().view(N, -1, GROUP)
    lowest, highest = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: list[Tensor] = []
    for wide in RANGES:
        scales = _scale((highest - lowest) * wide / 15, weight.dtype)
        zero_points = (-lowest * wide / scales).round_().clamp_(0, 15)
        codes = (groups / scales).round_().add_(zero_points).clamp_(0, 15)
        error = ((codes - zero_points) * scales).sub_(groups).square_().sum(-1, keepdim=True)
        tried = [error, codes, scales, zero_points]
        best = [torch.where(error < best[0], new, old) for new, old in zip(tried, best, strict=True)] if best else tried
    _, codes, scales, zero_points = best
    return codes.view(N, K).to(torch.uint8), scales[..., 0].to(weight.dtype), zero_points[..., 0].to(torch.uint8)


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    # There is a code more below zero than above: the largest weight, whatever its sign, becomes the lowest.
    rows = weight.float()
    scales = _scale(rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) / -128, weight.dtype)
    codes = (rows / scales).round_().clamp_(-128, 127) + 128
    return codes.to(torch.uint8), scales.to(weight.dtype)


def _scale(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be kept, in float32; 1 for weights that are all zero."""
    scale = exact.to(dtype).float()
    return torch.where(scale == 0, 1.0, scale)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] -> int32 [N, K * bits / 32]."""
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.flatten().view(torch.int32).view(len(codes), -1)


class PackedLinear(nn.Linear):
    """A linear layer in so many bits: as quantize() makes it until prepare(), and then as the kernels read it.

    Made without weights, on the meta device.
    """

    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    locks: Tensor  # int32, with which the parts of a product find out who comes last; zero before and after

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.bits = bits
        self.kernel = self.tuning = ""  # what prepare() and compile_products() say of it to humming-kernels, as JSON
        groups = in_features // GROUP if bits == 4 else 1
        codes = torch.empty(out_features, in_features * bits // 32, dtype=torch.int32, device="meta")
        scales = torch.empty(out_features, groups, dtype=dtype, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("weight_zero_point", None)
        if bits == 4:
            zero_points = torch.empty(out_features // 8, groups, dtype=torch.int32, device="meta")
            self.weight_zero_point = nn.Parameter(zero_points, requires_grad=False)

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> PackedLinear:
        """A layer without a bias, for the weights [out, in] of one in bfloat16 or float16, on their device."""
        packed = cls(weight.shape[1], weight.shape[0], False, bits, weight.dtype)
        for name, tensor in zip(QUANTIZED, quantize(weight, bits), strict=True):
            setattr(packed, name, tensor if tensor is None else nn.Parameter(tensor, requires_grad=False))
        return packed

    @staticmethod
    def suits(linear: nn.Module) -> bool:
        """Whether a layer can be one of these."""
        return type(linear) is nn.Linear and not (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE)

    @property
    def precision(self) -> str:
        return f"int{self.bits}"

    def prepare(self) -> None:
        """Bring the weights into the order in which this GPU's kernels read them."""
        _let_the_compiler_find_its_library()
        from humming.schema import HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        tensors = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        if self.weight_zero_point is not None:
            tensors["zero_point"] = self.weight_zero_point.data
        if self.bias is not None:
            tensors["bias"] = self.bias.data.to(self.weight_scale.dtype)
        schema: Any = HummingWeightSchema.from_config(SCHEMAS[self.bits])
        with torch.cuda.device(self.weight.device):
            config, tensors = prepare_and_transform_humming_tensors(
                tensors,
                self.out_features,
                self.in_features,
                schema,
                pad_n_to_multiple=PADDED_MULTIPLE,
                pad_k_to_multiple=PADDED_MULTIPLE,
                has_bias=self.bias is not None,
                torch_dtype=self.weight_scale.dtype,
                device=self.weight.device,
            )
        for name, tensor in tensors.items():
            name = "weight_zero_point" if name == "zero_point" else name
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("locks", torch.zeros(2048, dtype=torch.int32, device=self.weight.device), persistent=False)
        self.kernel = config.to_str()

    def forward(self, input: Tensor) -> Tensor:
        states = self.weight, self.weight_scale, self.weight_zero_point, self.bias, self.locks
        return torch.ops.llama2_chat.packed_linear(input, *states, self.kernel, self.tuning, self.out_features)


class JoinedPackedLinear(nn.Module):
    """One of several layers that are given the same input one after another: the first computes for all of them."""

    def __init__(self, whole: PackedLinear, start: int, end: int, shared: SharedProduct) -> None:
        super().__init__()
        self.whole = whole  # of all of them, side by side
        self.in_features, self.out_features = whole.in_features, end - start
        self._shared, self._start, self._end = shared, start, end

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.part(x, self._start, self._end)


def join_packed(linears: Sequence[PackedLinear]) -> list[JoinedPackedLinear]:
    """Layers for these, which have the same input and are not prepared yet: one product instead of several."""
    first, ends = linears[0], list(accumulate(linear.out_features for linear in linears))
    whole = PackedLinear(first.in_features, ends[-1], first.bias is not None, first.bits, first.weight_scale.dtype)
    for name in (name for name in (*QUANTIZED, "bias") if getattr(first, name) is not None):
        joined = torch.cat([getattr(linear, name).data for linear in linears])
        setattr(whole, name, nn.Parameter(joined, requires_grad=False))
    shared = SharedProduct(whole.forward, ends[-1])
    return [JoinedPackedLinear(whole, start, end, shared) for start, end in zip([0, *ends], ends, strict=False)]


def compile_products(linears: Sequence[PackedLinear], in_order: Sequence[int] = ()) -> None:
    """Compile what prepared layers need, the kernels of each shape beside those of the others: it takes seconds each.

    in_order: numbers of rows, rising. With so many at most, a sum comes out the same, bit for bit, whenever it is asked
    for; else its parts are added as they get ready.
    """
    from humming.kernel.humming import HummingKernel

    shapes = {linear.kernel: linear for linear in linears}
    tunings = {kernel: _in_order(linear, in_order) if in_order else "" for kernel, linear in shapes.items()}
    for linear in linears:
        linear.tuning = tunings[linear.kernel]
    needed = {(linear.kernel, linear.tuning, linear.weight.device) for linear in linears}
    with ThreadPoolExecutor(max(1, len(needed))) as threads:
        list(threads.map(lambda each: HummingKernel.prepare_kernels(each[0], None, each[1] or None, each[2]), needed))


@cache
def _let_the_compiler_find_its_library() -> None:
    """It runs as a program of its own, and NVRTC from a wheel looks for its second library where the system's are."""
    from humming.utils.nvrtc import get_nvrtc_library_path

    places = [str(Path(get_nvrtc_library_path()).parent), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, places))


def _in_order(linear: PackedLinear, rows: Sequence[int]) -> str:
    """The library's own tuning for so many rows, but of what it calls stream-K only as much as keeps the order.

    Its blocks take turns at a tile of the output while there are three or fewer of them, so none may be given less than
    half of a tile; and they write it themselves, without the unit that adds in any order.
    """
    from humming.tune import get_heuristics_config

    layer, device = json.loads(linear.kernel), linear.weight.device
    intervals, fewer = [], 0
    layer.pop("sublayer_name", None)
    for most in rows:
        tuning = dict(get_heuristics_config(layer, most, device=device))
        height, width, _ = tuning["block_shape"]
        tiles = -(-most // height) * (layer["shape_n"] // width)
        tuning["use_tma_c"] = False
        most_sms = tuning.get("num_sms") or torch.cuda.get_device_properties(device).multi_processor_count
        tuning["num_sms"] = max(1, min(most_sms, 2 * tiles // tuning.get("num_ctas_per_sm", 1)))
        intervals.append([fewer, most, tuning])
        fewer = most
    intervals[-1][1] = 1 << 30
    return json.dumps(intervals)


@torch.library.custom_op("llama2_chat::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    locks: Tensor,
    kernel: str,
    tuning: str,
    out_features: int,
) -> Tensor:
    """x @ W.T + bias, of [..., in]: [..., out_features]. What is known of W, and the kernel, as PackedLinear.prepare()
    makes them.

    A custom operator, so that torch.compile takes it as it is. To it nothing changes: the locks are left as they were.
    """
    from humming.ops import humming_gemm

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    states = {"weight": weight, "weight_scale": scale, "zero_point": zero_point, "bias": bias, "locks": locks}
    y = humming_gemm(layer_config=kernel, tuning_config=tuning or None, inputs=rows, **states)
    return y.view(*x.shape[:-1], out_features)


@packed_linear.register_fake
def _(x, weight, scale, zero_point, bias, locks, kernel, tuning, out_features):
    return x.new_empty(*x.shape[:-1], out_features)
