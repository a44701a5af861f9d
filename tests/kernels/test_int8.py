"""The 8-bit layer against the layer that it replaces, and against itself among other rows."""

import pytest
import torch

from llama2_chat.kernels import compiled, int8
from llama2_chat.kernels.int8 import Int8Linear, join_int8


@pytest.fixture(params=["panels", "packed", "integers", "no VNNI"])
def exact_integers(request, monkeypatch):
    """A processor on which integer products are exact, as far as this one's are, or one on which they are not."""
    vnni = compiled.panels_are_fast() and request.param == "panels"
    monkeypatch.setattr(compiled, "panels_are_fast", lambda: vnni)
    packed = int8.packed_products_are_exact() and request.param in ("panels", "packed")
    exact = int8.int_mm_is_exact() and request.param != "no VNNI"
    monkeypatch.setattr(int8, "packed_products_are_exact", lambda: packed)
    monkeypatch.setattr(int8, "int_mm_is_exact", lambda: exact)


def random_linear(in_features, out_features, bias=True):
    return torch.nn.Linear(in_features, out_features, bias).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.usefixtures("exact_integers")
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_an_int8_layer_comes_close_to_the_layer_it_replaces(rows):
    torch.manual_seed(0)
    linear = random_linear(128, 48)
    x = torch.randn(2, 128, rows).to(torch.bfloat16).transpose(1, 2)  # strided on purpose
    right, close = linear(x).float(), Int8Linear(linear)(x).float()
    assert (right - close).norm() < 0.01 * right.norm()


@pytest.mark.usefixtures("exact_integers")
@pytest.mark.parametrize("in_features", [128, 4096])
def test_a_row_comes_out_the_same_bit_for_bit_among_any_number_of_others(in_features):
    # Where a prompt was found in the cache other products computed it, and the same seed gave another text.
    torch.manual_seed(0)
    layer = Int8Linear(random_linear(in_features, 96))
    x = torch.randn(70, in_features).to(torch.bfloat16)
    x[:, 3] *= 300  # as a few channels of real activations
    alone = torch.cat([layer(row[None]) for row in x])
    for rows in (2, 8, 9, 33, 70):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@pytest.mark.usefixtures("exact_integers")
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 7), (192, 97), (1536, 128)])
def test_any_number_of_rows_of_any_width_comes_close_to_float32_and_each_row_out_as_alone(in_features, out_features):
    torch.manual_seed(0)
    linear = random_linear(in_features, out_features)
    layer, x = Int8Linear(linear), torch.randn(512, in_features)
    x[3] = 0
    right, all_rows = torch.nn.functional.linear(x, linear.weight.float(), linear.bias.float()), layer(x)
    assert (right - all_rows).norm() < 0.01 * right.norm()
    for rows in range(1, 65):
        assert torch.equal(layer(x[:rows]), all_rows[:rows])


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 7), (192, 128), (4096, 192)])
def test_processors_that_lose_nothing_give_the_same_bits_however_they_keep_weights(
    in_features, out_features, monkeypatch
):
    if not int8.packed_products_are_exact() or not int8.int_mm_is_exact():
        pytest.skip("not on this processor")
    torch.manual_seed(0)
    linear, x = random_linear(in_features, out_features), torch.randn(200, in_features)
    fastest = Int8Linear(linear)
    monkeypatch.setattr(compiled, "panels_are_fast", lambda: False)
    packed = Int8Linear(linear)
    monkeypatch.setattr(int8, "packed_products_are_exact", lambda: False)
    plain = Int8Linear(linear)
    assert packed.weight.is_mkldnn
    for each in (fastest, packed):
        assert torch.equal(each.codes, plain.weight)
        for rows in (1, 2, 8, 9, 200):
            assert torch.equal(each(x[:rows]), plain(x[:rows]))


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_compute_what_each_computes_alone(bias):
    torch.manual_seed(0)
    linears = [random_linear(128, width, bias) for width in (64, 32, 32)]
    joined = join_int8(linears)
    for _ in range(2):
        x = torch.randn(2, 5, 128).to(torch.bfloat16)
        for one, linear in zip(joined, linears, strict=True):
            assert torch.equal(one(x), Int8Linear(linear)(x))
    assert torch.equal(joined[2](x), Int8Linear(linears[2])(x))  # asked out of turn
