"""How functions on arrays of numbers are compiled for the CPU, by numba, and the parts that several of them have.

Only where a model is on the CPU are they imported. They are compiled, or read from the disk, when they are imported,
for arrays of just the kinds that their signatures name, so nobody's request waits for a compiler. At the first start
another process compiles them: what LLVM takes for it, some 0.07 GB, it never gives back.

Nothing here may depend on how many rows there are: each is computed by itself, in an order that its width alone
decides. So numba's `fastmath` is given to sums of one row alone, and products are added by fma(), which rounds once.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from llama2_chat.process import python_command

log = logging.getLogger("llama2_chat")

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Part of a compiled function. Called and not inlined, it would count who refers to each array, by atomic instructions.
# It must not be called from Python, which would end the process: to compile how would take a tenth of the time.
PART: dict[str, Any] = OPTIONS | {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
part = njit(**PART)
# The same, which may add up one row in any order, always the same.
row_sum = njit(**PART, fastmath={"reassoc", "contract", "nsz"})

# In the name under which a compiled function is kept: numba looks at the function's own file alone, and would go on
# with what an earlier version of a part in another file has become in it.
VERSION = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]
MODULES = "block_attention", "cpu_sampling", "int8_rows"  # that have compiled functions
MODULES_WITH_VNNI = "panels", "llama_layers"  # that have some, too, are imported only where it is, and import those
MODULES_FOR_FEW = ("llama_head",)  # the same, and compiled only once they are needed

_is_aside = False  # whether this is a process that compiles for another

LOG2_E = np.float32(1.44269504)
LN_2 = np.float32(0.693359375)  # a number of few bits, and what is left
LN_2_REST = np.float32(-2.12194440e-4)
LEAST, MOST = np.float32(-87), np.float32(88)  # whose exponentials float32 has

LANES = 16  # numbers of a vector; a processor that has none so long takes several
FETCHED = 64  # bytes that processors fetch at once
VECTOR = ir.VectorType(ir.FloatType(), LANES)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for arguments of these kinds, and keep what came of it on the disk for later starts."""

    def compile_one(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = f"{function.__name__}_{VERSION}"
        try:
            kept = njit(cache=True, **OPTIONS)(function)
        except RuntimeError as error:  # there is no folder for it
            log.debug("%s is compiled at each start: %s", function.__name__, error)
            return njit(signature, **OPTIONS)(function)
        if not [*Path(kept.stats.cache_path).glob(f"*.{function.__qualname__}-*.nbi")]:
            name = function.__module__.rpartition(".")[2]
            _compile_aside(*(each for each in MODULES_FOR_FEW if each == name))
        try:
            kept.compile(signature)
        except Exception as error:  # the disk is full, or what was kept there is damaged
            log.warning("%s is compiled for this start only: %s", function.__name__, error)
            with suppress(OSError):
                kept.recompile()  # forgets what was kept
            return njit(signature, **OPTIONS)(function)
        kept.disable_compile()  # of other kinds
        return kept

    return compile_one


@cache
def _compile_aside(*names: str) -> None:
    """Have another process compile what is not kept yet. What it leaves undone this one does. names: as there."""
    if _is_aside:
        return
    command = [*python_command(f"{__name__}:compile_all"), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        log.debug("No other process compiles: %s", error)
        return
    if done.returncode:
        log.debug("Another process could not compile: %s", done.stderr)


def compile_all() -> None:
    """Compile the functions of the modules that arguments name, or of those that every model needs, and keep what came
    of it: the work of such another process."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as processes:
        if names := sys.argv[1:]:
            list(processes.map(_compile_module, names))
            return
        list(processes.map(_compile_module, MODULES))
        if panels_are_fast():
            list(processes.map(_compile_module, MODULES_WITH_VNNI))


def _compile_module(name: str) -> None:
    global _is_aside
    _is_aside = True
    importlib.import_module(f"{__package__}.{name}")


@cache
def panels_are_fast() -> bool:
    """Whether this processor has AVX-512 VNNI, by which panels.py multiplies, and numba compiles for it; but no AMX,
    with which oneDNN reads prompts faster."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return False
    features = binding.get_host_cpu_features()
    return features.get("avx512vnni", False) and not features.get("amx-int8", False)


def in_all_lanes(builder: Any, number: Any) -> Any:
    """A vector that has a number of 32 bits LANES times."""
    index = ir.IntType(32)
    one = builder.insert_element(ir.VectorType(number.type, LANES)(ir.Undefined), number, index(0))
    return builder.shuffle_vector(one, one, ir.VectorType(index, LANES)([0] * LANES))


def fetch(builder: Any, address: Any) -> None:
    """Have what lies there, FETCHED bytes of any memory or none, fetched to the second cache while others are computed.

    A processor that multiplies much of each number reads too few ahead by itself.
    """
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, second, data = number(0), number(2), number(1)
    builder.call(prefetch, [builder.bitcast(address, byte), to_read, second, data])


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float32 that has these bits, uint32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def bits_of(context: Any, number: Any) -> Any:
    """The bits of a float32, as uint32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@part
def ordinal(number):
    """A whole number, int32, that is larger where the float32 is: of whole ones LLVM compares many at once."""
    bits = np.int32(bits_of(number))
    return np.int32(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)))


@part
def of_ordinal(order):
    """The float32 whose ordinal it is."""
    return float_of(np.uint32(order ^ ((order >> 31) & np.int32(0x7FFFFFFF))))


@part
def exp(x):
    """e ** x, float32. Source of the polynomial: Cephes' expf. Of NaN it is NaN."""
    x = MOST if x > MOST else LEAST if x < LEAST else x
    whole = np.rint(x * LOG2_E)
    x = fma(-whole, LN_2_REST, fma(-whole, LN_2, x))
    y = fma(np.float32(1.9875691500e-4), x, np.float32(1.3981999507e-3))
    y = fma(y, x, np.float32(8.3334519073e-3))
    y = fma(y, x, np.float32(4.1665795894e-2))
    y = fma(y, x, np.float32(1.6666665459e-1))
    y = fma(y, x, np.float32(5.0000001201e-1))
    y = fma(y, x * x, x + np.float32(1))
    return y * float_of(np.uint32((np.int32(whole) + 127) << 23))
