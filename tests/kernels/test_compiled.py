"""How functions are compiled, and the exponential that they share."""

import numpy as np
from numba.core import caching

from llama2_chat.kernels.compiled import compiled, exp


def twice(number):
    return 2 * number


def test_where_nothing_can_be_kept_a_function_is_compiled_nevertheless(monkeypatch):
    # A package that belongs to root, in a container whose user has no home: nothing could be loaded.
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled("int64(int64)")(twice)(4) == 8


def test_the_exponential_is_right_to_the_last_bits_and_keeps_nan():
    numbers = np.linspace(-87, 88, 2001, dtype=np.float32)
    found = np.array([exp(number) for number in numbers])
    np.testing.assert_allclose(found, np.exp(numbers.astype(np.float64)), rtol=2e-7)
    assert np.isnan(exp(np.float32(np.nan)))
    assert exp(np.float32(-np.inf)) < 1e-37
