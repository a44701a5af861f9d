"""With the embedded model, which is real and small."""

import pytest

from llama2_chat.agent import Agent, Step
from llama2_chat.evaluation.agent_rates import ask, made_up, rates


@pytest.mark.slow
def test_a_small_model_calls_the_calculator_in_valid_steps(chat):
    counted = rates(ask(chat, made_up(5, seed=7), lambda outcome: None))
    assert counted["valid"] == 5
    assert counted["expression_right"] >= 2


@pytest.mark.slow
def test_the_model_is_free_once_an_answer_is_stopped(chat):
    with Agent(chat).ask("What is 12 + 13?") as reply:
        assert isinstance(next(reply), Step)
    with Agent(chat).ask("Good morning!") as reply:
        assert "".join(reply)
    assert chat.occupancy.running == 0
