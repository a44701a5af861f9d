"""What a process is told of the computer before it computes."""

import os

import pytest

from llama2_chat.process import share_cores


@pytest.fixture
def environment(monkeypatch):
    """Of a process on a computer with 16 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "environ", {})
    return os.environ


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("200000 100000", "2"), ("250000 100000", "2"), ("50000 100000", "1"), ("max 100000", None), ("", None)],
)
def test_no_more_threads_compute_than_a_container_has_cores(environment, tmp_path, limit, threads):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    share_cores(tmp_path)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("limit", ["1600000 100000", "6400000 100000", None])
def test_where_a_container_has_all_cores_or_there_is_none_pytorch_decides(environment, tmp_path, limit):
    if limit:
        (tmp_path / "cpu.max").write_text(limit)
    share_cores(tmp_path)
    assert "OMP_NUM_THREADS" not in environment


def test_whoever_names_a_number_of_threads_has_it(environment, tmp_path):
    (tmp_path / "cpu.max").write_text("200000 100000")
    environment["OMP_NUM_THREADS"] = "8"
    share_cores(tmp_path)
    assert environment["OMP_NUM_THREADS"] == "8"
