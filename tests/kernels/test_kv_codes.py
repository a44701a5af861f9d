"""Keys and values in 8 bits: what is kept of them."""

import pytest
import torch

from llama2_chat.kernels.kv_codes import CODES, decode, encode


def states(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)


def test_int8_is_off_by_half_a_step_at_most_and_fp8_by_a_sixteenth():
    x = states(50, 3, 64)
    largest = x.abs().amax(-1, keepdim=True)
    off = (decode(*encode(x, torch.int8), torch.float32) - x).abs()
    assert (off / largest).max() < 0.5 / 126  # a scale is rounded to 8 bits
    off = (decode(*encode(x, CODES["fp8"]), torch.float32) - x).abs()
    assert (off / x.abs().maximum(largest / 448 * 2**-6)).max() < 1 / 15


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_what_is_kept_of_a_token_depends_on_its_own_numbers_alone(codes):
    x = states(7, 3, 64)
    together = encode(x, codes)
    for token in range(7):
        for whole, alone in zip(together, encode(x[token], codes), strict=True):
            assert torch.equal(whole[token].float(), alone.float())


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_zeros_stay_zeros_and_what_is_no_number_is_seen_in_the_scale(codes):
    x = torch.zeros(4, 64)
    x[1, 5], x[2, 6], x[3] = torch.nan, torch.inf, 1e30
    found, scales = encode(x, codes)
    assert scales.isfinite().tolist() == [True, False, False, True]
    assert decode(found, scales, torch.float32)[0].eq(0).all()
    assert decode(found, scales, torch.float32)[3].allclose(x[3], rtol=0.01)
