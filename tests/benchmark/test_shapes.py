"""Benchmarks of a shape keep to the GPUs that they are given, and begin with nothing where there are none."""

import os

import pytest
import torch

from llama2_chat.benchmark import shapes
from llama2_chat.benchmark.shapes import make_checkpoint, measure, use_gpus
from tests.support.small_model import save_tokenizer


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


def test_a_large_shape_is_not_measured_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--shape tiny runs without one"):
        next(measure("13b", "nowhere", None, "auto", 1, None, (1,), False, "1"))


def test_what_a_shape_needs_is_looked_for_before_its_weights_are_written(tmp_path, monkeypatch):
    # 26 GB of them were there when the program ended in a traceback.
    written = []
    monkeypatch.setattr(shapes, "_write_weights", lambda *_: written.append(1))
    with pytest.raises(SystemExit, match=r"--tokenizer .*nowhere cannot be loaded .* HF_TOKEN"):
        make_checkpoint("tiny", str(tmp_path / "nowhere"), tmp_path / "weights")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--checkpoint .*weights cannot be made: Not a directory"):
        make_checkpoint("tiny", str(save_tokenizer(tmp_path, "ab")), tmp_path / "file" / "weights")
    assert not written
