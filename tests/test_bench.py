"""What the benchmark promises: a table, and one line of JSON that programs can read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes on two quiet cores
def test_the_benchmark_ends_with_a_line_of_json(chat):  # the embedded model is here when `chat` is
    run = subprocess.run([sys.executable, BENCH], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    figures = json.loads(last)
    assert len(table) == len(figures)
    assert figures["decode, ours, tokens/s"] > 0
    assert figures["perplexity, int8"] > 1
