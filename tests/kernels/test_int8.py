"""The 8-bit layer against the layer that it replaces."""

import pytest
import torch

from llama2_chat.kernels.int8 import Int8Linear


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_an_int8_layer_comes_close_to_the_layer_it_replaces(rows):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 128, rows).to(torch.bfloat16).transpose(1, 2)  # strided on purpose
    right, close = linear(x).float(), Int8Linear(linear)(x).float()
    assert (right - close).norm() < 0.01 * right.norm()
