"""The sum over the GPUs of a model, added to the residual stream, and the norm of that: one kernel, in Triton.

Where GPUs reach each other's memory, each writes its part to all others and waits until theirs have come; no library
takes part, and nobody waits for more than what is added up. Where they do not, and for steps of many rows, NCCL adds up
first.

Each row has a place for every rank in the memory of every rank, three times over. An empty number has bits that no part
has, so whatever is there has come: a number is its own flag, and no order between different numbers is relied on. A sum
takes the next of the three, and empties what the sum before it took. That is early enough: a rank writes there again
two sums later, and it begins that sum when the one between them has ended for it, for which it needed a part that this
rank sent after its own sum of now, with all that it emptied. With two there would be no sum between them.

Which of the three comes next each row's own memory says, which a CUDA graph may replay as often as it likes. All ranks
compute the same steps, so it is the same for a row on all of them, whatever rows other steps had. Parts are added in
the order of the ranks, in float32, and rounded once, with the residual stream: all ranks have the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from llama2_chat.kernels.peer_memory import PeerMemory
from llama2_chat.kernels.rank_sum import is_together

# Rows of a step, at most, for which GPUs write to each other's memory. All of them run at once: none waits for a row of
# another GPU that in turn waits for a place to run.
ROWS = 64
EMPTY = tl.constexpr(-0x8000)  # the bits of -0.0 in bfloat16, of which a part is 0.0 instead
TURNS = tl.constexpr(3)


@triton.jit
def _sum_and_norm_kernel(
    parts,
    parts_stride,
    residual,
    residual_stride,
    weight,
    hidden,
    normed,
    boxes,
    turns,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One row. RANKS is 1 where the parts have been added up already; then boxes and turns are None."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < WIDTH
    part = tl.load(parts + row * parts_stride + at, mask=inside, other=0.0)
    before = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if RANKS == 1:
        total = part.to(tl.float32)
    else:
        turn = tl.load(turns + row)
        bits = part.to(tl.int16, bitcast=True)
        bits = tl.where(bits == EMPTY, 0, bits).to(tl.int16)
        box = (turn * ROWS + row) * (RANKS * WIDTH) + at
        for other in tl.static_range(RANKS):
            if other != RANK:
                theirs = tl.multiple_of(tl.load(boxes + other).to(tl.pointer_type(tl.int16)), 16)
                tl.store(theirs + box + RANK * WIDTH, bits, mask=inside)
        mine = tl.multiple_of(tl.load(boxes + RANK).to(tl.pointer_type(tl.int16)), 16)
        emptied = ((turn + TURNS - 1) % TURNS * ROWS + row) * (RANKS * WIDTH) + at
        total = tl.zeros([BLOCK], tl.float32)
        for other in tl.static_range(RANKS):
            if other == RANK:
                arrived = bits
            else:
                tl.store(mine + emptied + other * WIDTH, tl.full([BLOCK], EMPTY, tl.int16), mask=inside)
                arrived = tl.load(mine + box + other * WIDTH, mask=inside, other=0, volatile=True)
                while tl.max((arrived == EMPTY).to(tl.int32)) != 0:
                    arrived = tl.load(mine + box + other * WIDTH, mask=inside, other=0, volatile=True)
            total += arrived.to(tl.bfloat16, bitcast=True).to(tl.float32)
        tl.store(turns + row, (turn + 1) % TURNS)
    rounded = (before + total).to(tl.bfloat16)
    tl.store(hidden + row * WIDTH + at, rounded, mask=inside)
    states = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(states * states) / WIDTH + epsilon)
    tl.store(normed + row * WIDTH + at, (weights * (states * scale)).to(tl.bfloat16), mask=inside)


class Boxes:
    """Where a rank's kernels put their parts, and find those of the others."""

    def __init__(self, width: int, rank: int, addresses: list[int], device: torch.device) -> None:
        self.width, self.rank, self.ranks = width, rank, len(addresses)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.turns = torch.zeros(ROWS, dtype=torch.int32, device=device)

    @staticmethod
    def numbers(width: int, ranks: int) -> int:
        """How many numbers there must be at each address, all of them empty at first."""
        return TURNS.value * ROWS * ranks * width


def add_and_norm(
    part: Tensor, residual: Tensor, weight: Tensor, epsilon: float, boxes: Boxes | None
) -> tuple[Tensor, Tensor]:
    """residual + part, bfloat16 [..., width], with the parts of all other ranks if there are boxes; and its RMSNorm.

    With boxes the kernel ends when all ranks have launched it for as many rows, ROWS at most.
    """
    width = part.shape[-1]
    rows = part.numel() // width
    hidden, normed = part.new_empty(part.shape), part.new_empty(part.shape)
    with torch.cuda.device_of(part):  # Triton launches on the current one
        _sum_and_norm_kernel[(rows,)](
            part,
            part.stride(-2),
            residual,
            residual.stride(-2),
            weight,
            hidden,
            normed,
            boxes and boxes.addresses,
            boxes and boxes.turns,
            epsilon,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            RANK=boxes.rank if boxes else 0,
            RANKS=boxes.ranks if boxes else 1,
            ROWS=ROWS,
            num_warps=16 if width > 2048 else 4,
        )
    return hidden, normed


# ---- Of this process, which computes one model ----

_boxes: Boxes | None = None
_memory: PeerMemory | None = None


def connect(width: int, device: torch.device) -> None:
    """Let sums of few rows go through the memory of the GPUs, where they reach each other. All ranks call this."""
    global _boxes, _memory
    ranks = dist.get_world_size()
    _memory = PeerMemory.connect(Boxes.numbers(width, ranks), EMPTY.value & 0xFFFF, device)
    if _memory is not None:
        _boxes = Boxes(width, dist.get_rank(), _memory.addresses, device)
        row = torch.zeros(1, width, dtype=torch.bfloat16, device=device)
        add_and_norm(row, row, row[0], 1e-5, _boxes)  # compiled now, while nobody waits for an answer
        torch.cuda.synchronize(device)


def disconnect() -> None:
    """Once no other rank computes any more."""
    global _boxes, _memory
    if _memory is not None:
        _memory.close()
    _boxes = _memory = None


@torch.library.custom_op("llama2_chat::sum_and_norm", mutates_args=("part",))
def sum_and_norm(part: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """add_and_norm() over all processes, within together(); elsewhere of this one's part alone. part may be changed."""
    if not is_together():
        return add_and_norm(part, residual, weight, epsilon, None)
    if _boxes is not None and part.numel() <= ROWS * _boxes.width:
        return add_and_norm(part, residual, weight, epsilon, _boxes)
    dist.all_reduce(part)
    return add_and_norm(part, residual, weight, epsilon, None)


@sum_and_norm.register_fake
def _(part: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return part.new_empty(part.shape), part.new_empty(part.shape)
