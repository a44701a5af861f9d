"""Memory of the host for blocks that made room in the KV pool: what is in them comes back by copy, and is not computed
again. Which block is where is prefix_cache's to know.

On a GPU the copies run beside the steps, on two streams of their own, one for each direction. A step waits for a copy
only if it writes to its block; that a block has come back is asked for before a step reads it. Pinning gigabytes takes
seconds, so there pages come while answers are given already.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from llama2_chat.text import first_line

log = logging.getLogger("llama2_chat")

# Pinned at once, at most: what is pinned is rounded up to a power of two, and until it is, no step is launched.
SLAB_BYTES = 2**28


class HostStore:
    """Pages, each for one block of all layers.

    tensors: all that keeps a block, [num_blocks, ...], on one device or several; a block in them is one piece.
    most_bytes: of memory that the pages take; fewer if the system does not give so much.
    """

    def __init__(self, tensors: Sequence[Tensor], most_bytes: int) -> None:
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        of_devices = [[tensor for tensor in tensors if tensor.device == device] for device in devices]
        self._page_bytes = sum(tensor[0].nbytes for tensor in tensors)
        pages = most_bytes // self._page_bytes
        self._parts: list[_Part] = []
        try:
            for each in of_devices if pages else ():
                self._parts.append(_GpuPart(each, pages) if each[0].is_cuda else _Part(each, pages))
        except RuntimeError as error:  # no memory, on the GPU or of the host
            log.warning("Conversations that leave the GPU are not kept in memory: %s", first_line(error))
            self._parts = []
        self._closed = threading.Event()
        self._filling = threading.Thread(target=self._fill, name="host pages", daemon=True)
        self._filling.start()
        if not any(tensor.is_cuda for tensor in tensors):
            self.wait_for_pages()

    @property
    def num_pages(self) -> int:
        """So far."""
        return min((part.num_pages for part in self._parts), default=0)

    def wait_for_pages(self) -> None:
        """Until there are no more to come."""
        self._filling.join()

    def close(self) -> None:
        """No more pages come from now on."""
        self._closed.set()
        self.wait_for_pages()

    def _fill(self) -> None:
        for part in self._parts:
            for _ in part.fill():
                if self._closed.is_set():
                    return
        if pages := self.num_pages:
            log.info("%.1f GB of memory keep %d blocks that leave the GPU", pages * self._page_bytes / 1e9, pages)

    def save(self, block: int, page: int) -> None:
        for part in self._parts:
            part.save(block, page)

    def restore(self, page: int, block: int) -> None:
        for part in self._parts:
            part.restore(page, block)

    def settle(self, blocks: Iterable[int]) -> None:
        """Let what is computed from now on wait until these may be read and written."""
        for part in self._parts:
            part.settle(blocks)

    def are_arriving(self, blocks: Sequence[int]) -> bool:
        return any(part.are_arriving(blocks) for part in self._parts)

    def wait(self) -> None:
        """Until the next block that is on its way has arrived, if there is one."""
        for part in self._parts:
            part.wait()


class _Part:
    """What one device has of the blocks, and its pages. This one's device is the host itself: a copy ends at once."""

    def __init__(self, tensors: Sequence[Tensor], pages: int) -> None:
        self._tensors, self._pages = tensors, pages
        self._page_bytes = sum(tensor[0].nbytes for tensor in tensors)
        self._per_slab = self._pages_per_slab()
        self._slabs: list[Tensor] = []  # uint8 [pages of a slab, page_bytes] each

    @property
    def num_pages(self) -> int:
        return len(self._slabs) * self._per_slab

    def fill(self) -> Iterator[None]:
        """Take memory for all pages, slab by slab; less if there is no more."""
        for _ in range(self._pages // self._per_slab):
            try:
                self._slabs.append(self._new_slab())
            except RuntimeError as error:
                got = self.num_pages * self._page_bytes / 1e9
                log.warning("Memory for conversations that leave the GPU ends at %.1f GB: %s", got, first_line(error))
                return
            yield

    def _pages_per_slab(self) -> int:
        return self._pages

    def _new_slab(self) -> Tensor:
        return torch.empty(self._per_slab, self._page_bytes, dtype=torch.uint8)

    def _page(self, page: int) -> Tensor:
        return self._slabs[page // self._per_slab][page % self._per_slab]

    def _pieces(self, piece: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each tensor its block, and where that is in a piece of memory for all of them; both as bytes."""
        blocks = [tensor[block].view(-1).view(torch.uint8) for tensor in self._tensors]
        return zip(blocks, piece.split([len(each) for each in blocks]), strict=True)

    def _pack(self, block: int, piece: Tensor) -> None:
        for source, target in self._pieces(piece, block):
            target.copy_(source)

    def _unpack(self, piece: Tensor, block: int) -> None:
        for target, source in self._pieces(piece, block):
            target.copy_(source)

    def save(self, block: int, page: int) -> None:
        self._pack(block, self._page(page))

    def restore(self, page: int, block: int) -> None:
        self._unpack(self._page(page), block)

    def settle(self, blocks: Iterable[int]) -> None:
        pass

    def are_arriving(self, blocks: Sequence[int]) -> bool:
        return False

    def wait(self) -> None:
        pass


class _Packer(Protocol):
    def pack(self, block: int, piece: Tensor) -> None: ...
    def unpack(self, piece: Tensor, block: int) -> None: ...


class _GpuPart(_Part):
    """A block is packed into one piece of GPU memory, and that is copied to a pinned page, or the other way round."""

    def __init__(self, tensors: Sequence[Tensor], pages: int) -> None:
        super().__init__(tensors, pages)
        device = tensors[0].device
        self._device, self._packer = device, _packer(tensors)
        self._outgoing, self._incoming = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving, self._coming = (
            torch.empty(self._page_bytes, dtype=torch.uint8, device=device) for _ in range(2)
        )
        # After them whatever else touches this block, or page, may begin.
        self._block_events: dict[int, torch.cuda.Event] = {}
        self._page_events: dict[int, torch.cuda.Event] = {}
        self._arriving: dict[int, torch.cuda.Event] = {}  # blocks that come from the host, in this order

    def _pages_per_slab(self) -> int:
        slab_bytes = min(SLAB_BYTES, 1 << (self._pages * self._page_bytes).bit_length() - 1)
        return max(slab_bytes // self._page_bytes, 1)

    def _new_slab(self) -> Tensor:
        return torch.empty(self._per_slab, self._page_bytes, dtype=torch.uint8, pin_memory=True)

    def _pack(self, block: int, piece: Tensor) -> None:
        self._packer.pack(block, piece) if self._packer else super()._pack(block, piece)

    def _unpack(self, piece: Tensor, block: int) -> None:
        self._packer.unpack(piece, block) if self._packer else super()._unpack(piece, block)

    def save(self, block: int, page: int) -> None:
        computed = self._now()
        with torch.cuda.stream(self._outgoing):
            self._wait_for(computed, self._block_events.get(block))
            self._pack(block, self._leaving)
            self._block_events[block] = self._now()
            self._wait_for(self._page_events.get(page))
            self._page(page).copy_(self._leaving, non_blocking=True)
            self._page_events[page] = self._now()
        self._arriving.pop(block, None)

    def restore(self, page: int, block: int) -> None:
        computed = self._now()
        self._arriving.pop(block, None)
        with torch.cuda.stream(self._incoming):
            self._wait_for(self._page_events.get(page))
            self._coming.copy_(self._page(page), non_blocking=True)
            self._page_events[page] = self._now()
            self._wait_for(computed, self._block_events.get(block))
            self._unpack(self._coming, block)
            self._block_events[block] = self._arriving[block] = self._now()

    def _now(self) -> torch.cuda.Event:
        """After all that the current stream has been asked for."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait_for(self, *events: torch.cuda.Event | None) -> None:
        stream = torch.cuda.current_stream(self._device)
        for event in events:
            if event is not None:
                stream.wait_event(event)

    def settle(self, blocks: Iterable[int]) -> None:
        if self._block_events:
            self._wait_for(*(self._block_events.pop(block, None) for block in blocks))

    def are_arriving(self, blocks: Sequence[int]) -> bool:
        for block, event in [*self._arriving.items()]:
            if not event.query():
                break
            del self._arriving[block]
        return not self._arriving.keys().isdisjoint(blocks)

    def wait(self) -> None:
        for event in self._arriving.values():
            event.synchronize()
            return


def _packer(tensors: Sequence[Tensor]) -> _Packer | None:
    """One kernel for all tensors; None where there is no Triton."""
    with suppress(ImportError):
        from llama2_chat.kernels.blocks import BlockPacker

        packer = BlockPacker(tensors)
        piece = torch.zeros(sum(tensor[0].nbytes for tensor in tensors), dtype=torch.uint8, device=tensors[0].device)
        packer.pack(0, piece)  # compiles; block 0 is padding
        packer.unpack(piece, 0)
        return packer
    return None
