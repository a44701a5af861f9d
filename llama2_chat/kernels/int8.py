"""A linear layer in 8 bits for the CPU, which decodes nearly twice as fast as in 16: it reads half the bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers with one scale per output channel.

    Decoding reads all weights for each token and is as fast as memory: half the bytes, nearly twice the tokens.
    """

    MULTIPLE = 64  # of in_features: the kernel reads whole vectors, and past the end of a row of any other length
    ROWS_MULTIPLE = 32
    ROWS_PACKED = 8  # tokens at once; above, as in prefill, a bfloat16 matrix product is faster

    weight: Tensor  # int8 [out, in]
    scale: Tensor  # [out], in the dtype of what comes in
    bias: Tensor | None

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
            # oneDNN keeps a program for each number of rows it has met, 0.65 MB each: it shall meet few.
            padded = F.pad(rows, (0, 0, 0, -len(rows) % self.ROWS_MULTIPLE))
            y = F.linear(padded, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
            return y[: len(rows)].view(*x.shape[:-1], self.out_features)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
