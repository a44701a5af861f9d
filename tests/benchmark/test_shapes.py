"""Benchmarks of a shape keep to the GPUs that they are given."""

import os

import pytest

from llama2_chat.benchmark.shapes import use_gpus


@pytest.mark.parametrize(("given", "count", "used"), [(None, 2, "0,1"), ("", 1, "0"), ("3", 1, "3"), ("2,3", 1, "2")])
def test_a_benchmark_measures_the_gpus_that_it_is_given(monkeypatch, given, count, used):
    # Two on one machine, each with a GPU of its own, both measured the first.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is set back
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    use_gpus(count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used
