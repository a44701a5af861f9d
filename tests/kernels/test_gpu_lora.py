"""What adapters add to a narrow step on a GPU, beside what PyTorch's products add; in Triton's interpreter, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")

SCRIPT = r"""
import sys, numpy as np, torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
import triton.language as tl
sys.path.insert(0, {root!r})
from tests.kernels.test_gpu_lora import Case, check_products, check_company

multiply = InterpreterBuilder.create_dot

def floats(states):
    if states.dtype.scalar != tl.bfloat16:
        return states
    return TensorHandle((states.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

# It would multiply the bits of bfloat16 as whole numbers.
InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, floats(a), floats(b), *rest)
torch.inference_mode().__enter__()
for count, rank, inputs, widths, adapted in (
    (4, 16, 300, (70, 33, 33), (True, False, True)),
    (5, 3, 130, (64, 20, 20), (True, True, True)),
    (1, 4, 64, (65,), (True,)),
    (3, 64, 257, (96, 160), (False, True)),
    (5, 30, 64, (40,), (True,)),
):
    for rows in (1, 2, 8, 33, 64):
        check_products(Case(count, rank, inputs, widths, adapted), rows)
for dtype in (torch.float16, torch.bfloat16):
    check_products(Case(4, 16, 600, (130, 64), (True, True), dtype), 8)
for dtype in (torch.float32, torch.float16):
    check_company(Case(4, 16, 300, (70, 33), (True, True), dtype))
print("equal")
"""


class Case:
    """Adapters of layers that have the same input, as the GPU's kernels have them and as PyTorch's products."""

    def __init__(self, count, rank, inputs, widths, adapted, dtype=torch.float32, device="cpu"):
        from llama2_chat.kernels.gpu_lora import GpuLora
        from llama2_chat.kernels.lora import AdapterRows, Lora

        random = torch.Generator().manual_seed(0)
        self.normal = lambda *shape: torch.randn(*shape, generator=random).to(device, dtype)
        self.rows = AdapterRows(count, rank, 1, torch.device(device), dtype)
        self.count, self.inputs, self.widths, self.adapted = count, inputs, widths, adapted
        columns = self.rows.columns
        pairs = [
            (self.normal(columns, inputs) / inputs**0.5, self.normal(columns, width)) if each else None
            for width, each in zip(widths, adapted, strict=True)
        ]
        self.plain = Lora.joined([pair and Lora(pair[0], [pair[1]]) for pair in pairs])
        self.fast = GpuLora.joined([pair and GpuLora(pair[0], [pair[1]], pair[1], rank) for pair in pairs])

    def ask(self, rows):
        """What layers gave, their input, and who takes what."""
        taken = self.rows.taken_by((torch.arange(rows, device=self.rows._numbers.device) * 3 + 1) % (self.count + 1))
        return self.normal(1, rows, sum(self.widths)), self.normal(1, rows, self.inputs), taken

    def added(self, y, x, taken):
        return self.fast.add_to(y.clone(), x, taken, self.widths, self.fast.begin(x, taken))


def check_products(case, rows):
    y, x, taken = case.ask(rows)
    found, expected = case.added(y, x, taken), case.plain.add_to(y, x, taken, case.widths, None)
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[y.dtype]
    torch.testing.assert_close(found, expected, atol=error * expected.abs().max().item(), rtol=error)
    nobodys = taken.adapters == 0
    assert torch.equal(found[:, nobodys], y[:, nobodys])
    changed = (found != y).view(rows, -1).split(case.widths, -1)
    for part, adapted in zip(changed, case.adapted, strict=True):
        assert bool(part[~nobodys].any()) == adapted


def check_company(case):
    """A row's bits are the same alone, at another place, beside others, and beside rows that are not numbers."""
    y, x, taken = case.ask(40)
    expected = case.added(y, x, taken)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(x.device)
    assert torch.equal(
        case.added(y[:, order], x[:, order], case.rows.taken_by(taken.adapters[order])), expected[:, order]
    )
    for row in (0, 17, 39):
        alone = slice(row, row + 1)
        found = case.added(y[:, alone], x[:, alone], case.rows.taken_by(taken.adapters[alone]))
        assert torch.equal(found, expected[:, alone])
    bad = x.clone()
    bad[:, ::2] = torch.nan
    assert torch.equal(case.added(y, bad, taken)[:, 1::2], expected[:, 1::2])


@pytest.mark.slow
def test_kernels_add_to_each_row_what_its_adapter_says_whoever_shares_the_step():
    root = str(Path(__file__).parents[2])
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(root=root)]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "widths", "adapted"),
    [
        (5120, (5120, 5120, 5120), (True, False, True)),
        (5120, (13824, 13824), (True, True)),
        (13824, (5120,), (True,)),
        (300, (70, 33), (True, True)),
    ],
    ids=["query and value", "MLP", "down", "odd sizes"],
)
@torch.inference_mode()
def test_kernels_add_on_this_gpu_what_pytorch_adds(inputs, widths, adapted, dtype):
    case = Case(4, 16, inputs, widths, adapted, dtype, "cuda")
    for rows in (1, 8, 33, 64, 65):
        check_products(case, rows)
    check_company(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [8, 65])
@torch.inference_mode()
def test_a_recorded_step_adds_the_same_beside_its_product(rows):
    """What runs beside the product reads its input, and nothing takes the memory of it or of what it writes."""
    case = Case(4, 16, 5120, (5120, 5120), (True, True), torch.bfloat16, "cuda")
    _, x, taken = case.ask(rows)
    weight = case.normal(5120, 5120)

    def step():
        states = x
        for _ in range(4):  # each with what the one in front gave
            states = states / states.abs().amax()
            begun = case.fast.begin(states, taken)
            base = torch.cat([states @ weight, states @ weight], -1)
            states = case.fast.add_to(base, states, taken, case.widths, begun)[..., 5120:] * 1
        return states

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
