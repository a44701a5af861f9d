"""What adapters add to linear layers: each row what its own adapter says, whoever shares the step and in 8 bits too."""

import pytest
import torch

from llama2_chat.kernels import lora
from llama2_chat.kernels.lora import AdapterRows, Int8Lora, Lora, LoraWeights, stack

IN, OUT, RANK = 128, 192, 4
TAKEN = [2, 0, 1, 3, 1, 0, 2, 3, 3]


def random_adapter(scale=1.0):
    return LoraWeights("random", {"layer": (scale * torch.randn(RANK, IN), torch.randn(OUT, RANK))})


@pytest.fixture
def adapters():
    torch.manual_seed(0)
    return [random_adapter(), random_adapter(scale=100), random_adapter(scale=0.01)]


def added(kind, adapters, taken, x):
    rows = AdapterRows(len(adapters), RANK, Int8Lora.MULTIPLE, x.device, torch.float32)
    stacked = stack(adapters, "layer", RANK, rows.columns)
    layer = Int8Lora.of(*stacked) if kind is Int8Lora else Lora(stacked[0], [stacked[1]])
    with rows.taking(taken):
        return layer(x, rows.taken.mask.to(torch.bfloat16))[0].float()


def expected(adapters, taken, x):
    nothing = torch.zeros(OUT)
    pairs = [adapters[number - 1].layers["layer"] if number else None for number in taken]
    return torch.stack([pair[1] @ (pair[0] @ row) if pair else nothing for pair, row in zip(pairs, x, strict=True)])


@pytest.mark.parametrize(("kind", "error"), [(Lora, 1e-5), (Int8Lora, 0.04)])
def test_each_row_gets_what_its_adapter_says_in_8_bits_whatever_stands_beside_it(adapters, kind, error):
    x = torch.randn(len(TAKEN), IN)
    for found, right in zip(added(kind, adapters, TAKEN, x), expected(adapters, TAKEN, x), strict=True):
        assert (found - right).norm() <= error * right.norm()


def test_a_processor_that_rounds_other_numbers_of_rows_otherwise_gets_blocks_of_one_size(adapters, monkeypatch):
    x = torch.randn(len(TAKEN), IN)
    at_once = added(Int8Lora, adapters, TAKEN, x)
    monkeypatch.setattr(lora, "int8_rows_are_alike", lambda threads: False)
    in_blocks = added(Int8Lora, adapters, TAKEN, x)
    assert torch.equal(in_blocks[2:3], added(Int8Lora, adapters, TAKEN[2:3], x[2:3]))
    assert (in_blocks - at_once).norm() < 0.01 * at_once.norm()


@pytest.mark.parametrize("kind", [Lora, Int8Lora])
def test_a_layer_that_sees_other_rows_than_the_step_has_is_told(adapters, kind):
    with pytest.raises(RuntimeError):
        added(kind, adapters, TAKEN, torch.randn(len(TAKEN) - 1, IN))
