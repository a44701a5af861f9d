"""Keys and values in 8 bits: a code for each number, and for each token and head the scale that its codes stand in.

What is kept of a token depends on its own numbers alone, in whatever chunk and company it was computed. kv_cells.py
does the same in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the codes
SCALES = torch.bfloat16  # codes are chosen for the scale as it is rounded, so its own rounding costs nothing
SMALLEST = 1e-30  # that a token's largest number is taken for, so that zeros have a scale


def encode(states: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of keys or values, [..., head_dim], and their scales, [...]. NaN and infinity stay: in the scale."""
    states = states.float()
    scales = (states.abs().amax(-1).clamp(min=SMALLEST) / LARGEST[codes]).to(SCALES)
    found = (states / scales.float()[..., None]).clamp(-LARGEST[codes], LARGEST[codes])
    return (found.round() if codes == torch.int8 else found).to(codes), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, [..., head_dim], that these codes and scales, [...], stand for."""
    return (codes.float() * scales.float()[..., None]).to(dtype)
