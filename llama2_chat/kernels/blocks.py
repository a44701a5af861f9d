"""One block of all layers of a KV pool, to one piece of memory and back, in a single Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048  # of 8 bytes, per program


@triton.jit(do_not_specialize=["block"])
def _copy_kernel(table, piece, block, UNPACK: tl.constexpr, WORDS: tl.constexpr):
    """WORDS words of one tensor's block, to the piece or from it. table: as BlockPacker has it."""
    row = table + tl.program_id(0) * 3
    size, at = tl.load(row + 1), tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    of_block = tl.load(row).to(tl.pointer_type(tl.int64)) + block * size + at
    of_piece = piece + tl.load(row + 2) + at
    if UNPACK:
        tl.store(of_block, tl.load(of_piece, mask=at < size), mask=at < size)
    else:
        tl.store(of_piece, tl.load(of_block, mask=at < size), mask=at < size)


class BlockPacker:
    """Copies blocks of these tensors of one device, [num_blocks, ...], whose blocks are whole words of 8 bytes and lie
    one after another. On the current stream."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors  # they must live as long as their addresses are known here
        words = [tensor[0].nbytes // 8 for tensor in tensors]
        firsts = [sum(words[:index]) for index in range(len(words))]
        rows = [[t.data_ptr(), size, first] for t, size, first in zip(tensors, words, firsts, strict=True)]
        self._table = torch.tensor(rows, device=tensors[0].device)  # int64 [n, 3]: address, words, first of the piece
        self._grid = len(tensors), triton.cdiv(max(words), WORDS)

    def pack(self, block: int, piece: Tensor) -> None:
        """piece: uint8 [bytes of a block], which takes what is in the block."""
        _copy_kernel[self._grid](self._table, piece.view(torch.int64), block, UNPACK=False, WORDS=WORDS)

    def unpack(self, piece: Tensor, block: int) -> None:
        _copy_kernel[self._grid](self._table, piece.view(torch.int64), block, UNPACK=True, WORDS=WORDS)
