"""How functions are compiled, and the exponential that they share."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numba
import numpy as np
import pytest
from numba.core import caching

from llama2_chat.kernels import compiled as shared
from llama2_chat.kernels.compiled import MODULES_FOR_FEW, compiled, exp
from llama2_chat.process import python_command


def twice(number):
    return 2 * number


def test_where_nothing_can_be_kept_a_function_is_compiled_nevertheless(monkeypatch):
    # A package that belongs to root, in a container whose user has no home: nothing could be loaded.
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled("int64(int64)")(twice)(4) == 8


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where numba keeps what it compiles. No other process compiles for this one."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(shared, "_compile_aside", Mock())
    return tmp_path


def test_another_process_compiles_at_the_first_start_alone(kept):
    # What LLVM takes of memory for it stayed taken until the server ended.
    compiled("int64(int64)")(twice)
    compiled("int64(int64)")(twice)
    shared._compile_aside.assert_called_once_with()


@pytest.mark.parametrize("trouble", [{"return_value": Mock(returncode=1)}, {"side_effect": OSError(errno.ENOMEM, "")}])
def test_where_no_other_process_can_compile_this_one_does(kept, monkeypatch, trouble):
    monkeypatch.undo()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(kept))
    monkeypatch.setattr(shared.subprocess, "run", run := Mock(**trouble))
    shared._compile_aside.cache_clear()
    assert compiled("int64(int64)")(twice)(4) == 8
    run.assert_called_once()


@pytest.mark.slow
def test_the_other_process_compiles_all_functions_that_there_are(tmp_path):
    sources = Path(shared.__file__).parent.glob("*.py")
    compiling = {file.stem: file.read_text().count("\n@compiled(") for file in sources}
    command = python_command("llama2_chat.kernels.compiled:compile_all")

    def compile_and_count(*names):
        subprocess.run([*command, *names], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, check=True)
        kept = [file.name.split(".")[0] for file in tmp_path.rglob("*.nbi")]
        return {name: kept.count(name) for name in compiling}

    # The first start of whoever has no head that guesses took 20 s longer.
    assert compile_and_count() == compiling | dict.fromkeys(MODULES_FOR_FEW, 0)
    assert compile_and_count(*MODULES_FOR_FEW) == compiling


@pytest.mark.parametrize(
    ("ending", "left"),
    [(".nbi", b""), (".nbi", bytes(300)), (".nbc", bytes(300))],
    ids=["an empty index", "zeros for an index", "zeros for what was compiled"],
)
def test_what_was_kept_and_is_damaged_is_compiled_anew(kept, caplog, ending, left):
    # After a power cut in a first start every other one failed.
    compiled("int64(int64)")(twice)
    for file in kept.rglob(f"*{ending}"):
        file.write_bytes(left)
    assert compiled("int64(int64)")(twice)(4) == 8
    assert "compiled for this start only" in caplog.text
    compiled("int64(int64)")(twice)
    again: Any = compiled("int64(int64)")(twice)
    assert (again(4), sum(again.stats.cache_hits.values())) == (8, 1)


def test_what_was_kept_of_an_earlier_version_of_the_shared_parts_is_not_taken(kept, monkeypatch):
    # After an update of compiled.py alone, functions in other files went on with the old exponential for ever.
    compiled("int64(int64)")(twice)
    monkeypatch.setattr(shared, "VERSION", "another")
    anew: Any = compiled("int64(int64)")(twice)
    assert (anew(4), sum(anew.stats.cache_hits.values())) == (8, 0)


def test_a_full_disk_keeps_nothing_from_being_compiled(kept, caplog, monkeypatch):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", full)
    assert compiled("int64(int64)")(twice)(4) == 8
    assert full.called
    assert "No space left on device" in caplog.text


def test_the_exponential_is_right_to_the_last_bits_and_keeps_nan():
    numbers = np.linspace(-87, 88, 2001, dtype=np.float32)
    from_python: Any = numba.njit(exp.py_func, **shared.OPTIONS)
    found = np.array([from_python(number) for number in numbers])
    np.testing.assert_allclose(found, np.exp(numbers.astype(np.float64)), rtol=2e-7)
    assert np.isnan(from_python(np.float32(np.nan)))
    assert from_python(np.float32(-np.inf)) < 1e-37
