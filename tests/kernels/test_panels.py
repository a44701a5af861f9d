"""Products of bytes by VNNI against sums of whole numbers."""

import numpy as np
import pytest
import torch

from llama2_chat.kernels import compiled

if not compiled.panels_are_fast():
    pytest.skip("not on this processor", allow_module_level=True)

from llama2_chat.kernels.panels import Panels


@pytest.mark.parametrize("rows", [2, 4, 6, 8, 30])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (192, 320), (128, 4096)])
def test_products_of_any_bytes_are_exact(rows, outputs, inputs):
    random = np.random.default_rng(rows)
    codes = random.integers(-127, 128, (outputs, inputs), dtype=np.int8)
    scales = random.random(outputs, dtype=np.float32)
    numbers = random.integers(1, 256, (rows, inputs), dtype=np.uint8)
    codes[0], numbers[0] = 127, 255  # sums as large as they get
    codes[1], numbers[1] = -127, 1
    panels = Panels.of(codes, scales)
    right = (numbers.astype(np.int64) - 128) @ codes.T.astype(np.int64)
    assert (panels.products(numbers) == right.astype(np.float32) * scales).all()
    assert (panels.codes == codes).all()


def test_products_that_threads_share_are_those_of_one(monkeypatch):
    random = np.random.default_rng(0)
    panels = Panels.of(random.integers(-127, 128, (8192, 256), dtype=np.int8), np.ones(8192, np.float32))
    numbers = random.integers(1, 256, (64, 256), dtype=np.uint8)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(panels.products(numbers))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
