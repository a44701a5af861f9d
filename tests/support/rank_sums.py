"""Sums over GPUs in a CUDA graph, each of them checked, while now one rank is late and now another.

A process of its own for each: python -m tests.support.rank_sums RANK RANKS FILE, with a file that does not exist yet.
"""

import random
import sys

import torch
import torch.distributed as dist

from llama2_chat.kernels import sum_and_norm
from llama2_chat.kernels.rank_sum import together

WIDTH, EPSILON = 5120, 1e-5
ROWS = (1, 8, 1, 64, 2, 32, 1, 16)  # of sums one after another
SUMS, REPLAYS = 80, 250


def meet(rank, ranks, file):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(file, ranks)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=device)
    dist.all_reduce(torch.zeros(1, device=device))
    sum_and_norm.connect(WIDTH, device)
    assert sum_and_norm._boxes is not None, "these GPUs do not reach each other's memory"
    return device


def check(rank, ranks, device):
    """Returns how many sums were wrong of SUMS * REPLAYS, and in how many replays the ranks had different bits."""
    rows = [ROWS[index % len(ROWS)] for index in range(SUMS)]
    parts = torch.empty(ranks, sum(rows), WIDTH, dtype=torch.bfloat16, device=device)
    residual, weight = torch.empty_like(parts[0]), torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
    wrong, bits = torch.zeros(2, dtype=torch.int64, device=device)
    late = random.Random(rank)

    def compute(waits):
        for part, before in zip(parts.split(rows, 1), residual.split(rows), strict=True):
            if waits and late.random() < 0.3:
                torch.cuda._sleep(late.randrange(60_000))  # cycles: up to 30 microseconds
            given = part[rank].clone()
            hidden, normed = torch.ops.llama2_chat.sum_and_norm(given, before, weight, EPSILON)
            total = torch.zeros_like(before, dtype=torch.float32)
            for each in part:
                total += each.float()
            exact = (before.float() + total).bfloat16()
            states = exact.float()
            near = states * torch.rsqrt((states * states).mean(-1, keepdim=True) + EPSILON)
            is_near = ((normed.float() - near).abs() <= near.abs() / 128).all()
            wrong.add_(~((hidden == exact).all() & is_near))
            bits.mul_(31).add_(normed.view(torch.int16).sum(dtype=torch.int64))

    generator = torch.Generator(device).manual_seed(0)  # the same numbers on all ranks

    def draw():
        for states in (*parts, residual):
            states.normal_(generator=generator)

    draw()
    with torch.inference_mode(), together():
        compute(waits=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            compute(waits=True)
        different = 0
        for replay in range(REPLAYS):
            draw()
            if replay % 10 == rank:
                torch.cuda._sleep(late.randrange(20_000_000))
            graph.replay()
            if replay % 10 == 9:
                compute(waits=True)  # and some that are not replayed
            all_bits = [torch.zeros_like(bits) for _ in range(ranks)]
            dist.all_gather(all_bits, bits)
            different += len({each.item() for each in all_bits}) > 1
    return wrong.item(), different


def main():
    rank, ranks = map(int, sys.argv[1:3])
    device = meet(rank, ranks, sys.argv[3])
    wrong, different = check(rank, ranks, device)
    print(f"rank {rank}: {wrong} of {SUMS * REPLAYS} sums wrong, {different} of {REPLAYS} replays of different bits")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(bool(wrong or different))


if __name__ == "__main__":
    main()
