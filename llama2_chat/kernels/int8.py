"""A linear layer in 8 bits for the CPU: integers times integers, whose sums do not depend on who shares a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama2_chat.kernels.shared_product import SharedProduct

if TYPE_CHECKING:
    from llama2_chat.kernels.int8_rows import Codes
    from llama2_chat.kernels.panels import Panels

FEW_ROWS = 16  # of bytes: up to 8 tokens
PANEL = 32  # outputs of Panels
ZERO = 128  # of bytes without a sign: VNNI takes these, and oneDNN has fast kernels without AMX for them alone


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers with one scale per output channel.

    What comes in becomes integers, too (int8_rows.py). Sums of integers are exact in any order, so a row comes out the
    same, bit for bit, alone and among others, whichever kernel adds it up.
    """

    MULTIPLE = 64  # of in_features: _weight_int8pack_mm reads past the end of a row of any other length
    precision = "int8"

    weight: Tensor  # int8 [out, in], or as Panels or oneDNN keep it for their products
    scale: Tensor  # float32 [out], of a weight times an activation
    bias: Tensor | None  # float32 [out]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()  # [out, in]
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        codes = (weight / scale[:, None]).round().to(torch.int8)
        scale /= 127 * 128
        self.panels = _panels(codes, scale)
        packed = self.panels is None and packed_products_are_exact()
        if self.panels is not None:
            codes = torch.from_numpy(self.panels.weights)
        self.register_buffer("weight", _packed(codes) if packed else codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Where Python finds them at once: looking for buffers of a module takes as long as a small product.
        zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self._packed = (self.weight, self.scale, zero_points) if packed else None
        self._bias = self.bias

    @property
    def codes(self) -> Tensor:
        """The weights as integers, int8 [out, in]."""
        if self.panels is not None:
            return torch.from_numpy(self.panels.codes)
        return self.weight.to_dense().t() if self.weight.is_mkldnn else self.weight

    def forward(self, x: Tensor) -> Tensor:
        from llama2_chat.kernels.int8_rows import Codes  # compiled, which nobody needs without such layers

        rows = x.detach().reshape(-1, self.in_features).float()
        codes = Codes.of(rows.contiguous().numpy())
        y = torch.from_numpy(codes.joined(self.products(codes)))
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def products(self, codes: Codes) -> Tensor:
        """float32 [rows of bytes, out], of the bytes of rows [n, in]; what the rows are multiplied to joins them."""
        if self.panels is not None:
            products = torch.from_numpy(self.panels.products(codes.bytes))
        elif self._packed is not None:
            products = _packed_product(torch.from_numpy(codes.bytes), *self._packed)
        else:
            rows = torch.from_numpy(codes.bytes).sub(ZERO).view(torch.int8)
            products = self._sums(rows).float().mul_(self.scale)
        if self._bias is not None:
            codes.add_to_products(products, self._bias)
        return products

    def _sums(self, rows: Tensor) -> Tensor:
        """rows @ weight.T of int8 [rows, in], in integers, or rounded to bfloat16 where only floats are fast."""
        if int_mm_is_exact():
            return torch._int_mm(rows, self.weight.t())
        if len(rows) <= FEW_ROWS and self._float32_is_exact:
            return torch._weight_int8pack_mm(
                rows.bfloat16(), self.weight, torch.ones_like(self.scale, dtype=torch.bfloat16)
            )
        dtype = torch.float32 if self._float32_is_exact else torch.float64
        return F.linear(rows.to(dtype), self.weight.to(dtype)).bfloat16()

    @cached_property
    def _float32_is_exact(self) -> bool:
        """Whether no sum on the way can outgrow the whole numbers that float32 has."""
        return 127 * int(self.weight.abs().sum(1, dtype=torch.int64).max()) < 2**24


class JoinedInt8Linear(Int8Linear):
    """One of several layers that are given the same input one after another: the first computes for all of them.

    It has no weights of its own.
    """

    def __init__(self, whole: Int8Linear, start: int, end: int, shared: SharedProduct) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, end - start
        self._whole = [whole]  # in a list, so that it is no module of this one
        self._shared, self._start, self._end = shared, start, end

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.part(x, self._start, self._end)

    @property
    def whole(self) -> Int8Linear:
        """All of them, side by side."""
        return self._whole[0]

    def products(self, codes: Codes) -> Tensor:
        """Of all of them."""
        return self._whole[0].products(codes)


def join_int8(linears: Sequence[nn.Linear]) -> list[JoinedInt8Linear]:
    """Int8 layers for these, which have the same input and all a bias or none: one product instead of several."""
    ends = list(accumulate(linear.out_features for linear in linears))
    whole = nn.Linear(linears[0].in_features, ends[-1], linears[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if linears[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    joined = Int8Linear(whole)
    shared = SharedProduct(joined.forward, ends[-1])
    return [JoinedInt8Linear(joined, start, end, shared) for start, end in zip([0, *ends], ends, strict=False)]


def _panels(codes: Tensor, scale: Tensor) -> Panels | None:
    """Weights, int8 [out, in], with the scale of each output, where this processor multiplies them fast as panels."""
    from llama2_chat.kernels.compiled import panels_are_fast  # which imports a compiler

    if codes.shape[0] % PANEL or not panels_are_fast():
        return None
    from llama2_chat.kernels.panels import Panels  # compiled for nothing less

    return Panels.of(codes.numpy(), scale.numpy())


def _packed(codes: Tensor) -> Tensor:
    """Weights, int8 [out, in], as oneDNN reads them at once; to_dense() gives their transpose back."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def _packed_product(rows: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
    """(rows - ZERO) @ packed, times a scale for each column: float32. rows: uint8 [rows, in]; zero_points: zeros."""
    return torch.ops.onednn.qlinear_pointwise.default(
        rows, 1.0, ZERO, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def packed_products_are_exact() -> bool:
    """Whether oneDNN has fast products for packed weights that lose nothing.

    On x86 without VNNI it adds pairs of products in 16 bits; elsewhere it multiplies unsigned bytes in plain loops.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    rows = torch.full((64, 64), ZERO + 127, dtype=torch.uint8)
    scale, zero_points = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    products = (_packed_product(rows[:count], _packed(largest), scale, zero_points) for count in (1, 2, 8, 16, 64))
    return all(bool((product == 64 * 127**2).all()) for product in products)


@cache
def int_mm_is_exact() -> bool:
    """Whether torch._int_mm loses nothing: on x86 without VNNI, oneDNN adds pairs of products in 16 bits."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(largest[:rows], largest) == 64 * 127**2).all()) for rows in (1, 8, 64))
