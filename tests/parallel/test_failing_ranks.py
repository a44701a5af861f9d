"""One model in two processes on the CPU of which one fails: nobody waits for ever, and whoever waits is told why."""

import pytest
import torch
from transformers import LlamaForCausalLM

from llama2_chat.engine.engine import Engine
from llama2_chat.errors import GPU_LOST, ModelUnavailable
from llama2_chat.loading.load import load
from llama2_chat.parallel import RunnerOptions, Workers, processes
from llama2_chat.process import python_command
from tests.parallel.test_ranks import Lost, checkpoint
from tests.support.engines import LONG, letters, start
from tests.support.serving import ignore
from tests.support.small_model import save_model
from tests.support.waiting import until

pytestmark = pytest.mark.slow

TOKENS = 97


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path, vocab_size=TOKENS, num_key_value_heads=2)


@pytest.fixture
def start_workers(folder, monkeypatch):
    """start_workers(failing): those of a model, one of which fails there; what the first loads; what is told of an
    end."""
    started = []

    def start(failing=None):
        if failing:
            monkeypatch.setenv("FAILING", failing)
            monkeypatch.setattr(
                processes, "python_command", lambda _: python_command("tests.support.failing_rank:main")
            )
        first, lost = checkpoint(folder, "2"), Lost()
        started.append(Workers(first, RunnerOptions(), on_lost=lost))
        return started[0], load(first, ignore), lost

    yield start
    started[0].close(timeout_s=0.5)


def test_a_rank_that_fails_while_the_others_wait_for_it_says_why_the_model_cannot_be_had(start_workers):
    # The first rank waited for ever, and the page said that the model was loading.
    workers, loaded, lost = start_workers("joining")
    with pytest.raises(ModelUnavailable, match="memory ran out while"):
        workers.join(loaded)
    assert not lost.told


def test_a_rank_whose_memory_runs_out_in_a_step_ends_all_and_says_why(start_workers, caplog):
    workers, loaded, lost = start_workers("a step")
    engine = Engine(workers.join(loaded), set(), on_lost=lost)
    request, streamer = start(engine, letters("hello"), LONG)
    until(lambda: lost.told)
    engine.lose()  # as the program does when it hears of it
    streamer.rest()
    assert str(request.error) == GPU_LOST
    assert "KV_HEADROOM_GB" in caplog.text


def test_damaged_weights_are_refused_over_several_gpus_as_over_one(folder, start_workers):
    # Whichever process found them first ended, and a supervisor started the server again and again.
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)
    workers, loaded, lost = start_workers()
    runner = workers.join(loaded)
    with pytest.raises(ModelUnavailable, match="scores are no numbers"):
        Engine(runner, set())
    assert not lost.told
    assert workers._workers[0].process.poll() is None
