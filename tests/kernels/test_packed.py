"""Weights in 4 and 8 bits for GPUs against the weights that they stand for; the products only where there is a GPU."""

import pytest
import torch

from llama2_chat.kernels import packed
from llama2_chat.kernels.packed import BITS, GROUP, PackedLinear, compile_products, join_packed, quantize

NF4_ERROR = 0.092  # of bitsandbytes' NF4 with double quantisation, on normal weights
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def unpacked(codes, bits):
    """[N, K] of what is packed, the lowest bits first."""
    lowest_first = codes.contiguous().view(torch.uint8)
    if bits == 4:
        lowest_first = torch.stack([lowest_first & 15, lowest_first >> 4], -1).flatten(1)
    return lowest_first.float()


def dequantized(codes, scales, zero_points, bits):
    """float32 [out, in], of what quantize() returns."""
    zeros = 128 if zero_points is None else unpacked(zero_points.T, 4).T[..., None]
    numbers = unpacked(codes, bits).view(len(codes), scales.shape[1], -1) - zeros
    return (numbers * scales.float()[..., None]).view(len(codes), -1)


def weights_of(layer, bits):
    """What a layer that is not prepared yet stands for."""
    return dequantized(layer.weight, layer.weight_scale, layer.weight_zero_point, bits)


def normal(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)


def relative(found, exact):
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize(("bits", "most"), [(4, NF4_ERROR), (8, 0.01)])
def test_normal_weights_lose_less_than_in_nf4(bits, most):
    weight = normal(256, 1024)
    assert 0.5 * most < relative(dequantized(*quantize(weight, bits), bits), weight) < most


@pytest.mark.parametrize("bits", BITS.values())
def test_the_largest_weight_of_a_group_and_zeros_come_back(bits):
    weight = torch.zeros(64, 2 * GROUP, dtype=torch.bfloat16)
    weight[0, 3] = 0.75
    weight[1, 5] = -0.5
    found = dequantized(*quantize(weight, bits), bits)
    assert torch.equal(found == 0, weight == 0)
    assert torch.allclose(found, weight.float(), rtol=2**-8)  # the scale is a bfloat16


def test_groups_on_one_side_of_zero_take_all_codes_in_4_bits_and_zero_comes_back():
    weight = normal(256, 1024).abs()
    weight[:, ::2] = 0
    found = dequantized(*quantize(weight, 4), 4)
    assert not found[:, ::2].any()
    assert relative(found, weight) < NF4_ERROR / 2


@pytest.mark.parametrize("is_symmetric", [False, True], ids=["AWQ", "GPTQ"])
@pytest.mark.parametrize("group", [64, 128])
def test_what_a_checkpoint_has_rounded_to_4_bits_is_not_rounded_anew(group, is_symmetric):
    # Two thirds as much was lost as at first, since half of a group of 128 seldom spans all of its steps.
    groups = normal(256, 1024, dtype=torch.float32).view(256, -1, group)
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (groups.abs().amax(-1, keepdim=True) / 7 if is_symmetric else (highest - lowest) / 15).half().float()
    zero_points = torch.full_like(scales, 8) if is_symmetric else (-lowest / scales).round()
    codes = ((groups / scales).round() + zero_points).clamp(0, 15)
    rounded = ((codes - zero_points) * scales).flatten(1).bfloat16()
    assert relative(dequantized(*quantize(rounded, 4), 4), rounded) < 0.005  # scales are kept in bfloat16


def test_weights_are_quantised_alike_in_pieces_of_any_size(monkeypatch):
    weight = normal(96, 256)
    whole = quantize(weight, 4)
    monkeypatch.setattr(packed, "AT_ONCE", 7 * 256)
    assert all(map(torch.equal, whole, quantize(weight, 4)))


@needs_gpu
@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize(
    ("out_features", "in_features", "dtype"),
    [(64, 64, torch.bfloat16), (192, 320, torch.float16), (576, 1536, torch.bfloat16)],
)
def test_products_of_any_number_of_rows_equal_the_dequantised_ones(out_features, in_features, bits, dtype):
    layer = PackedLinear.of(normal(out_features, in_features, dtype=dtype, device="cuda"), bits)
    layer.bias = torch.nn.Parameter(normal(out_features, dtype=dtype, device="cuda"), requires_grad=False)
    exact, bias = weights_of(layer, bits), layer.bias.float()
    layer.prepare()
    for rows in (*range(1, 65), 512):
        x = normal(1, rows, in_features, dtype=dtype, device="cuda") * 50
        found = layer(x)
        assert relative(found, x.float() @ exact.T + bias) < 0.01
    assert not layer.locks.any()


@needs_gpu
@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize(("out_features", "in_features"), [(5120, 13824), (576, 1536)])
def test_sums_in_order_come_out_the_same_bit_for_bit(out_features, in_features, bits):
    weight = normal(out_features, in_features, device="cuda")
    layer = PackedLinear.of(weight, bits)
    exact = weights_of(layer, bits)
    layer.prepare()
    compile_products([layer], in_order=(32, 512))
    for rows in (32, 512):
        x = normal(rows, in_features, device="cuda") * 50
        first = layer(x)
        assert relative(first, x.float() @ exact.T) < 0.01
        assert all(torch.equal(layer(x), first) for _ in range(200))
    alike = layer(x[:1].expand(32, -1).contiguous())
    assert (alike == alike[:1]).all()


@needs_gpu
def test_joined_layers_give_what_each_gives_alone():
    weights = [normal(size, 256, device="cuda") for size in (256, 128, 128)]
    x = normal(3, 256, device="cuda")
    joined = join_packed([PackedLinear.of(weight, 4) for weight in weights])
    joined[0].whole.prepare()
    for part, weight in zip(joined, weights, strict=True):
        alone = PackedLinear.of(weight, 4)
        alone.prepare()
        assert relative(part(x), alone(x)) < 0.01
