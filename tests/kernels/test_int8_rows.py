"""What is compiled for rows between products in 8 bits, against PyTorch, and each row against itself among others."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llama2_chat.kernels.int8_rows import WHOLE, ZERO, Codes

WIDTHS = [7, 64, 97, 1536]


def random_rows(count, width):
    rows = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    rows[:, 3] *= 300  # as a few channels of real activations
    return rows


def decoded(codes):
    """The rows that the bytes stand for, float64."""
    high, low = (part.astype(np.float64) - ZERO for part in np.split(codes.bytes[: 2 * len(codes.rows)], 2))
    return (128 * high + low) * codes.largest[:, None] / WHOLE


def products_of(rows):
    """What joins to these rows: of high bytes 0, of low ones the rows, whose largest numbers are 1."""
    codes = Codes.empty(rows)._replace(largest=np.ones(len(rows), np.float32))
    return codes, torch.from_numpy(np.concatenate([np.zeros_like(rows), rows]))


@pytest.mark.parametrize("width", WIDTHS)
def test_two_bytes_stand_for_each_number_of_a_row_to_15_bits(width):
    rows = random_rows(64, width)
    for count in range(1, 65):
        codes = Codes.of(rows[:count])
        error = np.abs(decoded(codes) - rows[:count]).max(1)
        assert (error <= codes.largest / WHOLE * 0.501).all()
        assert (codes.largest == np.abs(rows[:count]).max(1)).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_compiled_computes_what_pytorch_computes(width):
    rows, weight = random_rows(33, width), np.linspace(0.5, 2, width, dtype=np.float32)
    norm = F.rms_norm(torch.from_numpy(rows), (width,), torch.from_numpy(weight), 1e-5).numpy()
    np.testing.assert_allclose(Codes.normed(rows, weight, 1e-5).rows, norm, rtol=1e-5)

    both = np.concatenate([rows, rows[::-1] * 20], 1)
    codes, products = products_of(both)
    gate, up = torch.from_numpy(both).chunk(2, 1)
    np.testing.assert_allclose(codes.gated(products).rows, F.silu(gate) * up, rtol=2e-6, atol=1e-30)
    np.testing.assert_array_equal(codes.joined(products), both)
    hidden = np.ones_like(both)
    codes.add_to(hidden, products)
    np.testing.assert_array_equal(hidden, both + 1)


@pytest.mark.parametrize("head_dim", [10, 72])  # halves of 5, and of two vectors and 4
def test_rotary_positions_are_given_to_the_first_heads_alone(head_dim):
    rows, half = random_rows(5, 4 * head_dim), head_dim // 2
    angles = np.linspace(-3, 3, 5 * head_dim, dtype=np.float32).reshape(5, head_dim)
    codes, products = products_of(rows)
    cos, sin = np.cos(angles), np.sin(angles)
    states = rows.reshape(5, 4, head_dim)
    rotated = np.concatenate([-states[..., half:], states[..., :half]], -1)
    expected = states * cos[:, None] + rotated * sin[:, None]
    turned = codes.turned(products, cos, sin, 3)
    np.testing.assert_allclose(turned[:, :3], expected[:, :3], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(turned[:, 3], states[:, 3])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_is_the_same_bit_for_bit_among_any_number_of_others(width):
    rows, weight = random_rows(300, 2 * width), np.linspace(0.5, 2, 2 * width, dtype=np.float32)

    def computed(some):
        codes, products = products_of(some)
        yield from (Codes.normed(some, weight, 1e-5), codes.gated(products), Codes.of(some))

    together = [*computed(rows)]
    for count in (1, 2, 8, 9, 33, 299):
        for few, all_rows in zip(computed(rows[:count]), together, strict=True):
            assert few.rows.tobytes() == all_rows.rows[:count].tobytes()
            assert decoded(few).tobytes() == decoded(all_rows)[:count].tobytes()


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(spoiled):
    # Else a fault of the model would go unnoticed, and its keys would stay in the cache for whoever begins alike.
    rows = random_rows(3, 128)
    expected = Codes.of(rows)
    rows[1, 100] = spoiled
    codes = Codes.of(rows)
    joined = codes.joined(torch.ones(6, 16))
    assert not np.isfinite(joined[1]).any()
    assert np.isfinite(joined[[0, 2]]).all()
    assert (codes.bytes[[0, 2, 3, 5]] == expected.bytes[[0, 2, 3, 5]]).all()
    assert not np.isfinite(Codes.normed(rows, np.ones(128, np.float32), 1e-5).rows[1]).all()
    ones, products = products_of(rows)
    assert not np.isfinite(ones.gated(products).rows[1]).all()


def test_a_row_of_zeros_stays_one():
    assert not decoded(Codes.of(np.zeros((2, 64), np.float32))).any()
