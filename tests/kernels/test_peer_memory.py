"""How ranks agree on whether their GPUs write to each other's memory, with shared memory in place of a GPU's driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import ctypes, mmap, os, signal, sys, torch
import torch.distributed as dist
from contextlib import nullcontext
sys.path.insert(0, {root!r})
from llama2_chat.kernels import peer_memory
from llama2_chat.kernels.peer_memory import PeerMemory

trouble, folder = sys.argv[1:]
RANKS, NUMBERS, BITS = 3, 50, 0x8000
memories = [mmap.mmap(-1, 2 * NUMBERS) for _ in range(RANKS)]  # at the same addresses in all processes
addresses = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in memories]

class Driver:
    # Whatever trouble there is, rank 1 has it.
    def __init__(self, rank):
        self.rank, self.freed, self.closed = rank, [], []
        self.has = trouble if rank == 1 else ""

    def cuMemAlloc_v2(self, address, size):
        address._obj.value = addresses[self.rank]
        return 2 if self.has == "no memory" else 0

    def cuIpcGetMemHandle(self, handle, address):
        handle._obj.reserved[0] = self.rank
        return 801 if self.has == "no handle" else 0

    def cuIpcOpenMemHandle_v2(self, address, handle, flags):
        assert flags.value == 1
        address._obj.value = addresses[handle.reserved[0]]
        return 217 if self.has == "not opened" else 0

    def cuMemsetD16_v2(self, address, bits, numbers):
        ctypes.memmove(address.value, bits.value.to_bytes(2, "little") * numbers.value, 2 * numbers.value)
        return 0

    def cuMemcpyHtoD_v2(self, to, source, size):
        if self.has != "lost":
            ctypes.memmove(to.value, ctypes.addressof(source._obj), size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to, source, size):
        ctypes.memmove(ctypes.addressof(to._obj), source.value, size.value)
        return 0

    def cuMemFree_v2(self, address):
        self.freed.append(address.value)

    def cuIpcCloseMemHandle(self, address):
        self.closed.append(address.value)

def run(rank):
    dist.init_process_group("gloo", store=dist.FileStore(folder + "/meeting", RANKS), rank=rank, world_size=RANKS)
    driver = Driver(rank)
    peer_memory.ctypes.CDLL = lambda name: driver
    torch.cuda.device, torch.cuda.synchronize = lambda device: nullcontext(), lambda: None
    torch.cuda.current_device = lambda: rank
    torch.cuda.can_device_access_peer = lambda mine, other: not (driver.has == "no access" and other == 2)
    memory = PeerMemory.connect(NUMBERS, BITS, torch.device("cpu"))
    assert (memory is None) == (trouble != "none")
    if memory:
        assert memory.addresses == addresses
        assert memories[rank][:] == BITS.to_bytes(2, "little") * NUMBERS
        dist.barrier()
        memory.close()
    had = [] if driver.has == "no memory" else [addresses[rank]]
    assert driver.freed == had
    assert addresses[rank] not in driver.closed
    opened = trouble in ("none", "lost")
    assert not opened or sorted(driver.closed) == sorted(set(addresses) - {{addresses[rank]}})
    dist.barrier()

children = []
for rank in range(RANKS):
    if not (child := os.fork()):
        signal.alarm(60)
        run(rank)
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["none", "no memory", "no handle", "no access", "not opened", "lost"])
def test_all_gpus_write_to_each_others_memory_or_none_does(trouble, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(root=str(Path(__file__).parents[2]))]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([*command, trouble, str(tmp_path)], capture_output=True, text=True, env=env, timeout=100)
    assert run.stdout == "agreed\n", run.stderr
