"""One model in two processes on the CPU: it answers as in one, and no process outlives the other."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama2_chat.engine.engine import Engine
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.errors import GPU_LOST
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import divided, load
from llama2_chat.parallel import RunnerOptions, Workers
from tests.support.engines import CPU, GREEDY, LONG, SEEDED, Stairs, answer, letters, start
from tests.support.loading import asking_for
from tests.support.serving import ignore
from tests.support.small_model import save_model
from tests.support.waiting import until

pytestmark = pytest.mark.slow

TOKENS = 512
PROMPTS = [letters(text) for text in ("hello", "a longer one " * 6, "a longer one " * 5 + "and", "x" * 64)]
SETTINGS = (replace(GREEDY, logprobs=3), replace(SEEDED, repetition_penalty=1.3, top_k=0, max_new_tokens=12))

SERVER = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from llama2_chat.settings import Settings
from llama2_chat.types import SamplingParams
from model import ChatModel
chat = ChatModel(Settings.read(sys.argv[1:])).load()
answering = chat.stream_completion([1, 2, 3], SamplingParams(max_new_tokens=500, ignore_eos=True))
print(chat.state, chat.status.device, *(worker.process.pid for worker in chat._workers._workers), sep="|", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = {"vocab_size": 97, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": TOKENS}
    return save_model(folder, **shape, attention_bias=True)


def checkpoint(folder, parts):
    plan = choose(asking_for(folder, quantization="none", tensor_parallel=parts))
    return divided(replace(fetch(plan, ignore), quantization="float32"))


@pytest.fixture(scope="module")
def whole(folder):
    model = load(checkpoint(folder, "1"), ignore).model
    engine = Engine(build_runner(model, lambda: {CPU: 0}, TOKENS, speculate=False), set())
    yield engine
    engine.close()


class Lost:
    told = False

    def __call__(self):
        self.told = True


@pytest.fixture(scope="module")
def divided_model(folder):
    """An engine over two processes, the process that is not this one, and whether its end has been told."""
    lost, first = Lost(), checkpoint(folder, "2")
    workers = Workers(first, RunnerOptions(), on_lost=lost)
    engine = Engine(workers.join(load(first, ignore)), set(), on_lost=lost)
    yield engine, workers._workers[0].process, lost
    engine.close()
    workers.close()


def test_two_processes_answer_as_one_does_until_one_of_them_ends(whole, divided_model):
    engine, process, lost = divided_model
    answers_are_the_same(whole, engine)
    readers_come_and_go(whole, engine)
    assert not lost.told
    request, streamer = start(engine, letters("go on"), LONG)
    streamer.next()
    process.kill()
    streamer.rest()
    assert str(request.error) == GPU_LOST
    until(lambda: lost.told)


def answers_are_the_same(whole, engine):
    for params in SETTINGS:
        for ids in PROMPTS:
            (expected, alone), (found, request) = answer(whole, ids, params), answer(engine, ids, params)
            assert found == expected
            assert [each.logprob for each in request.logprobs] == pytest.approx(
                [each.logprob for each in alone.logprobs], abs=1e-4
            )
    assert answer(engine, PROMPTS[2])[1].cached_tokens == 64


def readers_come_and_go(whole, engine):
    """More of them than there are slots, of whom some leave and one keeps to a grammar."""
    asked = [(ids, replace(SEEDED, seed=seed)) for seed, ids in enumerate(PROMPTS * 3)]
    started = [start(engine, *each) for each in asked]
    stairs = start(engine, [5], SEEDED, Stairs(5))[1]
    for request, streamer in started[::3]:
        streamer.next()
        engine.cancel(request)
    found = [streamer.rest() for index, (_, streamer) in enumerate(started) if index % 3]
    assert found == [answer(whole, *each)[0] for index, each in enumerate(asked) if index % 3]
    assert len(stairs.rest()) == SEEDED.max_new_tokens
    until(lambda: not engine.occupancy.running)


def test_a_killed_process_ends_the_server_with_75_and_a_killed_server_leaves_none_behind(folder):
    root = str(Path(__file__).parents[2])
    arguments = ["--model-id", str(folder), "--quantization", "none", "--tensor-parallel", "2"]
    command = [sys.executable, "-c", SERVER, root, *arguments]
    one, other = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    with one, other:
        (state, device, of_one), (*_, of_other) = (each.stdout.readline().split("|") for each in (one, other))
        assert (state, device) == ("ready", "2 x cpu")
        os.kill(int(of_one), signal.SIGKILL)
        assert one.wait(60) == 75
        os.kill(other.pid, signal.SIGKILL)
        until(lambda: has_ended(int(of_other)))


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
