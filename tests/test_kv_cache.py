"""Which KV_CACHE is taken where."""

import pytest

from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.kv_codes import SCALES
from llama2_chat.kv_cache import SCALE_BYTES, choose_format, enough_tokens, head_bytes

A10G, L4, H100 = (8, 6), (8, 9), (9, 0)


def test_about_twice_the_tokens_fit():
    assert SCALES.itemsize == SCALE_BYTES
    assert head_bytes(128, bits=16) / head_bytes(128, bits=8) == pytest.approx(2, abs=0.04)


@pytest.mark.parametrize(
    ("asked", "gpus", "room", "found"),
    [
        ("auto", [], 1_000, None),
        ("auto", [H100], 32 * 1024, None),
        ("auto", [H100], 32 * 1024 - 1, "int8"),
        ("auto", [A10G], 1_000, "int8"),
        ("none", [A10G], 1_000, None),
        ("int8", [H100], 10**6, "int8"),
        ("fp8", [L4, H100], 10**6, "fp8"),
        ("fp8", [], 0, "fp8"),
    ],
)
def test_auto_takes_int8_where_memory_is_short_and_what_is_named_is_taken(asked, gpus, room, found):
    assert choose_format(asked, gpus, room, enough_tokens(max_batch=32, context_length=4096)) == found


def test_fp8_on_a_gpu_that_has_none_is_refused_with_what_does_as_well():
    with pytest.raises(ModelUnavailable, match=r"compute capability 8\.9 or higher\. Set KV_CACHE=int8"):
        choose_format("fp8", [H100, A10G], 0, 0)


def test_short_conversations_are_enough_where_the_model_has_no_longer_ones():
    assert enough_tokens(max_batch=8, context_length=512) == 8 * 512
