"""Perplexities and their intervals, of losses made by hand."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from llama2_chat.evaluation.perplexity import Measurement, bootstrap_interval


def test_each_token_has_the_same_weight_and_the_interval_holds_the_perplexity():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50, 200)
    found = Measurement("a", "float32", None, "test", np.stack([2.0 * tokens, tokens], 1), 0, 0)
    assert (found.loss, found.interval) == (2.0, pytest.approx((math.exp(2), math.exp(2))))
    wild = replace(found, losses=np.stack([random.gamma(2, 1, 200) * tokens, tokens], 1))
    low, high = wild.interval
    assert low < wild.perplexity < high
    assert bootstrap_interval(wild.losses, wild.losses) == (1.0, 1.0)
    assert replace(found, losses=wild.losses[:1]).interval is None


def test_the_bootstrap_comes_near_to_the_textbook_interval_of_a_mean():
    losses = np.random.default_rng(0).gamma(2, 1, 400)
    reach = 1.96 * losses.std() / 20
    found = bootstrap_interval(np.stack([10 * losses, np.full(400, 10)], 1))  # 10 tokens each
    np.testing.assert_allclose(np.log(found), [losses.mean() - reach, losses.mean() + reach], atol=0.15 * reach)


def test_the_interval_of_very_many_conversations_takes_little_memory():
    losses = np.tile([30.0, 10.0], (20_000, 1))
    tracemalloc.start()
    assert bootstrap_interval(losses) == pytest.approx((math.exp(3), math.exp(3)))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
