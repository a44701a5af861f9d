"""How the processes of one model find each other; with models they do in test_ranks.py."""

import sys
from subprocess import Popen

import pytest

from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.disk import Files
from llama2_chat.loading.parts import Part
from llama2_chat.parallel import RunnerOptions, Workers, joining
from tests.support.loading import refusal
from tests.support.serving import ignore
from tests.support.waiting import until


@pytest.mark.parametrize("seconds", [0, 600])
def test_whoever_waits_for_gpus_that_do_not_reach_each_other_is_told_what_to_do(seconds, caplog):
    with joining._warning_after(seconds):
        if not seconds:
            until(lambda: caplog.records)
    told = "have not reached each other for 0 seconds" in caplog.text and "NCCL_P2P_DISABLE=1" in caplog.text
    assert told == (seconds == 0)


def test_more_than_two_gpus_promise_no_text_that_is_the_same_every_time(tmp_path):
    def start(parts):
        checkpoint = Checkpoint("any", "", "none", Files(tmp_path), tmp_path, part=Part(0, parts))
        Workers(checkpoint, RunnerOptions(deterministic=True), ignore).close()

    assert refusal(start, 4).startswith("DETERMINISTIC=1 works on one GPU or on two")


def test_where_one_process_cannot_be_started_no_other_is_left_behind(tmp_path, monkeypatch):
    started = []

    def start(*args, **options):
        if started:
            raise OSError("Resource temporarily unavailable")
        started.append(Popen(*args, **options))
        return started[0]

    reading = [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"]
    monkeypatch.setattr("llama2_chat.parallel.processes.python_command", lambda function: reading)
    monkeypatch.setattr("llama2_chat.parallel.processes.subprocess.Popen", start)
    checkpoint = Checkpoint("any", "", "none", Files(tmp_path), tmp_path, part=Part(0, 3))
    with pytest.raises(OSError, match="temporarily"):
        Workers(checkpoint, RunnerOptions(), ignore)
    assert started[0].poll() is not None
