"""What the calculator takes in time and memory, at worst: attacks on it, and strings that Hypothesis makes.

What is refused counts as what is computed: nobody shall wait for either.
"""

from __future__ import annotations

import time
import tracemalloc
from contextlib import suppress

from llama2_chat.agent.calculator import MAX_CHARACTERS, calculate
from llama2_chat.errors import ChatError

ATTACKS = (
    # Numbers that would fill the memory or take hours.
    "9**9**9",
    "9^9^9^9^9^9^9^9",
    "2**999999999999",
    "(2**996)**(2**996)",
    "10**299*10**299*10**299",
    "(-9)**9**9",
    "1e308*10",
    "1e999999999",
    "9" * 200,
    "99999**99999%",
    "((((9**99)**99)**99)**99)**99",
    "1" + "*9**99" * 30,
    "2**0.5" + "**2" * 60,
    "1.0000000001**1e300",
    "0.5**-1e300",
    # Texts, as Python would repeat, format or nest them.
    "'%1000000000d' % 1",
    "'a' * 10**10",
    "f'{1:1000000000}'",
    "('x' * 1000000) * 1000000",
    "b'a' * 10**9",
    "[0] * 10**10",
    "[[0] * 9999 for x in [0] * 9999]",
    # Ways out of the calculator.
    "__import__('os').system('id')",
    "().__class__.__base__.__subclasses__()",
    "(1).__class__",
    "open('/etc/passwd').read()",
    "(lambda: 0)()",
    "exec('1')",
    "globals()",
    "x := 9**9",
    # What is hard to read.
    "(" * 200,
    "(" * 100 + "1" + ")" * 100,
    "-" * 199 + "1",
    "√" * 199 + "9",
    "1" * 10**6,
    "1+" * 10**6 + "1",
    "1,111" + ",111" * 48,
    "5%+" * 66 + "1",
    "\0" * 100,
    "²" * 200,
)
ALPHABET = "0123456789 .,+-*/^()%√×÷−²eofxpi=~@\"'_[]"


def strings(number: int) -> list[str]:
    """So many different texts that Hypothesis makes, of any characters and of those that a calculator reads."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    found: dict[str, None] = {}
    long = st.text(ALPHABET, min_size=MAX_CHARACTERS // 2, max_size=MAX_CHARACTERS)
    repeated = st.builds(
        lambda text: (text * MAX_CHARACTERS)[:MAX_CHARACTERS], st.text(ALPHABET, min_size=1, max_size=9)
    )
    texts = st.text(max_size=2 * MAX_CHARACTERS) | st.text(ALPHABET, max_size=40) | long | repeated

    @seed(0)
    @settings(max_examples=number, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
    @given(texts)
    def draw(text: str) -> None:
        found[text] = None

    draw()
    return [*found]


def milliseconds(expression: str) -> float:
    """How long it takes, computed or refused; the best of three, because a machine may be busy."""
    took = []
    for _ in range(3):
        started = time.perf_counter()
        _try(expression)
        took.append(time.perf_counter() - started)
    return 1000 * min(took)


def megabytes(expression: str) -> float:
    """How much more memory Python's objects take at worst."""
    tracemalloc.start()
    _try(expression)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def _try(expression: str) -> None:
    with suppress(ChatError):
        calculate(expression)
