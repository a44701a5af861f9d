"""Sums through memory that processes share, in Triton's interpreter: the ranks are processes, which really wait.

The interpreter rounds to bfloat16 otherwise than a GPU does; tests/parallel/test_gpus.py asks for every bit.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")

SCRIPT = r"""
import os, random, signal, sys, time, torch
sys.path.insert(0, {root!r})
from llama2_chat.kernels import sum_and_norm
from llama2_chat.kernels.rank_sum import together
from llama2_chat.kernels.sum_and_norm import EMPTY, ROWS, Boxes, add_and_norm

STEPS = (1, 64, 3, *(1, 2) * 25, 7, 64, 1)  # rows: those of one step go on where those of another ended
EPSILON = 1e-5

def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()

def expected(parts, residual, weight):
    hidden = residual.float() + sum(part.float() for part in parts)
    states = hidden.bfloat16().float()
    return hidden, weight.float() * states * torch.rsqrt((states * states).mean(-1, keepdim=True) + EPSILON)

def compute(rank, ranks, width, memories, found):
    boxes = Boxes(width, rank, [memory.data_ptr() for memory in memories], torch.device("cpu"))
    for step, rows in enumerate(STEPS):
        part = numbers(100 * step + rank, 1, rows, width)
        part[0, 0, :5] = -0.0  # whose bits mean that nothing has come
        part[0, -1, 5] = torch.inf if rank == 0 and step == 2 else 0
        time.sleep(random.random() / 50 if step % 10 == 0 else 0)
        given = add_and_norm(part, numbers(step + 1, 1, rows, width), numbers(0, width), EPSILON, boxes)
        for place, states in zip(found[step], given):
            place.copy_(states)

def check(ranks, width):
    memories = [torch.full((Boxes.numbers(width, ranks),), EMPTY.value, dtype=torch.int16) for _ in range(ranks)]
    found = [torch.zeros(ranks, 2, 1, rows, width).bfloat16().share_memory_() for rows in STEPS]
    memories = [memory.share_memory_() for memory in memories]
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            signal.alarm(100)  # who waits for what never comes ends, too
            random.seed(rank)
            compute(rank, ranks, width, memories, [each[rank] for each in found])
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    for step, rows in enumerate(STEPS):
        parts = [numbers(100 * step + rank, 1, rows, width) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            part[0, 0, :5] = 0
            part[0, -1, 5] = torch.inf if rank == 0 and step == 2 else 0
        wanted = expected(parts, numbers(step + 1, 1, rows, width), numbers(0, width))
        for states, right in zip(found[step][0], wanted):
            torch.testing.assert_close(states.float(), right, atol=1e-2, rtol=2e-2, equal_nan=True)
        assert all(torch.equal(each.view(torch.int16), found[step][0].view(torch.int16)) for each in found[step])

check(2, 64)
check(3, 40)
check(4, 33)

# The operator: of one process alone, and within together() after another sum, where steps have many rows.
part, residual, weight = numbers(1, 1, 70, 48), numbers(2, 1, 70, 48), numbers(3, 48)
sum_and_norm.dist.all_reduce = lambda part: part.mul_(2)
sum_and_norm._boxes = Boxes(48, 0, [0, 0], torch.device("cpu"))  # nothing may be written there
alone = torch.ops.llama2_chat.sum_and_norm(part, residual, weight, EPSILON)
for states, right in zip(alone, expected([part], residual, weight)):
    torch.testing.assert_close(states.float(), right, atol=1e-2, rtol=2e-2)
with together():
    both = torch.ops.llama2_chat.sum_and_norm(part.clone(), residual, weight, EPSILON)
for states, right in zip(both, expected([part, part], residual, weight)):
    torch.testing.assert_close(states.float(), right, atol=1e-2, rtol=2e-2)
print("equal")
"""


@pytest.mark.slow
def test_ranks_add_up_through_each_others_memory_however_long_one_lets_others_wait():
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.stdout == "equal\n", run.stderr
