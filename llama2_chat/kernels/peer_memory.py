"""Memory of each GPU that the GPUs of the other processes write to, where they reach it.

The driver itself lends it, by handles that any process on this computer can open: PyTorch's symmetric memory counts how
often a process met others, and a process that meets new ones would wait for ever.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("llama2_chat")

LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS of cuda.h


class _Handle(ctypes.Structure):
    """CUipcMemHandle of cuda.h."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class PeerMemory:
    """So many numbers of 16 bits on the GPU of each rank, all with these bits at first.

    addresses: of each rank's, by rank, as kernels on this process' GPU read and write them.
    """

    def __init__(self, numbers: int, bits: int, device: torch.device) -> None:
        self._numbers, self._bits, self._device = numbers, bits, device
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._rank = dist.get_rank()
        self.addresses = [0] * dist.get_world_size()

    @classmethod
    def connect(cls, numbers: int, bits: int, device: torch.device) -> PeerMemory | None:
        """None, on all ranks, where one of them cannot reach another's. All call this at the same time."""
        memory = cls(numbers, bits, device)
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # there is a context from here on
            handles = memory._agree(memory._lend)
            # What is written there has to arrive, too: where it does not, a kernel would wait for ever.
            steps = partial(memory._open, handles or []), memory._write, memory._read
            connected = handles is not None and all(memory._agree(step) is not None for step in steps)
            if not connected:
                memory._agree(memory._close_others)  # before any is freed
                memory.close()
        return memory if connected else None

    def close(self) -> None:
        """Free this rank's, once the others have ended."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # the driver frees in a thread that has a context
            self._close_others()
            if self.addresses[self._rank]:
                self._driver.cuMemFree_v2(ctypes.c_uint64(self.addresses[self._rank]))
                self.addresses[self._rank] = 0

    def _close_others(self) -> None:
        for rank, address in enumerate(self.addresses):
            if address and rank != self._rank:
                self._driver.cuIpcCloseMemHandle(ctypes.c_uint64(address))
                self.addresses[rank] = 0

    def _agree(self, act: Callable[[], Any]) -> list[Any] | None:
        """What act() gave on each rank, once all are done; None if it failed on one."""
        try:
            given: Any = act()
        except _Refused as error:
            given = error
        except Exception as error:  # whatever it is, the others must not wait for this rank
            given = _Refused(f"{type(error).__name__}: {error}")
        found: list[Any] = [None] * len(self.addresses)
        dist.all_gather_object(found, given)
        if refused := next((each for each in found if isinstance(each, _Refused)), None):
            log.info("GPUs do not write to each other's memory: %s", refused)
            return None
        return found

    def _lend(self) -> tuple[int, bytes]:
        address, handle = ctypes.c_uint64(), _Handle()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(2 * self._numbers))
        self.addresses[self._rank] = address.value
        self._fill()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return torch.cuda.current_device(), bytes(handle)

    def _open(self, handles: list[tuple[int, bytes]]) -> None:
        for rank, (device, handle) in enumerate(handles):
            if rank == self._rank:
                continue
            if not torch.cuda.can_device_access_peer(torch.cuda.current_device(), device):
                raise _Refused(f"GPU {torch.cuda.current_device()} does not reach GPU {device}")
            address, flags = ctypes.c_uint64(), ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
            self.addresses[rank] = address.value

    def _write(self) -> None:
        for rank, address in enumerate(self.addresses):
            if rank != self._rank:
                word = ctypes.c_uint16(self._rank + 1)
                self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address + 2 * self._rank), ctypes.byref(word), _WORD)
        torch.cuda.synchronize()

    def _read(self) -> None:
        for rank in range(len(self.addresses)):
            word, address = ctypes.c_uint16(), ctypes.c_uint64(self.addresses[self._rank] + 2 * rank)
            self._call("cuMemcpyDtoH_v2", ctypes.byref(word), address, _WORD)
            if rank != self._rank and word.value != rank + 1:
                raise _Refused(f"what rank {rank} wrote did not arrive")
        self._fill()

    def _fill(self) -> None:
        address, bits = ctypes.c_uint64(self.addresses[self._rank]), ctypes.c_ushort(self._bits)
        self._call("cuMemsetD16_v2", address, bits, ctypes.c_size_t(self._numbers))
        torch.cuda.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise _Refused(f"{name} gives error {code}")


_WORD = ctypes.c_size_t(2)


class _Refused(RuntimeError):
    """A GPU, or its driver, does not do this."""
