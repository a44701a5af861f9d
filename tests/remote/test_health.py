"""Which servers are healthy, how that is found out, and how soon it is noticed."""

from dataclasses import replace

import pytest

from llama2_chat.remote import RemoteModel, faults
from tests.support.odd_server import HEAD, LAST, event, status, words
from tests.support.remote import HELLO, OFTEN, behind, read, wait_until_healthy
from tests.support.waiting import until


def test_a_probe_is_a_real_completion(settings, odd):
    """A server may list its models, and call itself healthy, while its GPU is gone."""
    odd.probe = status(500, {"error": "CUDA"})
    with behind(settings, odd) as model:
        assert (model.state, model.status.error) == ("failed", faults.FAILED)
        odd.probe = words("Hi")
        until(lambda: model.state == "ready")
        assert read(model)[0] == "Hello!"


def test_a_suspect_is_probed_at_once_and_others_answer_until_the_probe_has_ended(settings, odd, other):
    odd.answer = status(502, "")
    with behind(settings, odd, other) as model:
        wait_until_healthy(model)
        before, odd.probe = odd.probed, [0.5, *words("Hi")]
        assert [read(model)[0] for _ in range(3)] == ["Hello!"] * 3
        assert len(odd.requests) == 1
        odd.answer = words("Back.")
        until(lambda: read(model)[0] == "Back.")
        assert odd.probed == before + 1


def test_a_question_that_makes_a_server_fail_takes_it_away_from_nobody_else(settings, odd):
    """Whoever repeated such a question kept everybody else out for as long as the server took to give a token."""
    odd.probe = [0.5, *words("Hi")]
    odd.answer = lambda question: status(500, "") if question["messages"] == HELLO else words("Well.")
    with behind(settings, odd) as model:
        assert str(read(model)[1]) == faults.FAILED
        assert read(model, [{"role": "user", "content": "How are you?"}])[0] == "Well."


def test_a_failed_server_is_back_when_it_answers_again(settings, odd, other):
    good = odd.probe
    odd.answer = odd.probe = status(500, "")
    with behind(settings, odd, other) as model:
        until(lambda: model.faults)
        assert model.faults == [(odd.url[7:], faults.FAILED)]
        until(lambda: "1 of 2 servers cannot answer now" in model.status.why)
        assert read(model)[0] == "Hello!"
        assert not odd.requests
        odd.answer, odd.probe = words("Back."), good
        wait_until_healthy(model)
        assert read(model)[0] == "Back."
        until(lambda: model.status.device == "2 servers")


def test_a_server_that_loads_its_model_is_waited_for_as_one_here(settings, odd):
    odd.probe = status(503, {"error": {"message": "Loading model"}})
    with behind(settings, odd) as model:
        assert (model.state, model.status.phase) == ("loading", "connect")
        odd.probe = words("Hi")
        until(lambda: model.state == "ready")
        assert read(model)[0] == "Hello!"


@pytest.mark.slow
def test_an_idle_server_is_probed_now_and_then_and_a_busy_one_is_not(settings, odd):
    odd.answer = [HEAD, *[event("a"), 0.1] * 25, event(finish="stop"), LAST]
    with behind(settings, odd, timeouts=replace(OFTEN, idle_s=2)) as model:
        before = odd.probed
        assert read(model)[0] == "a" * 25
        assert odd.probed == before
        until(lambda: odd.probed >= before + 2)


def test_without_a_name_the_only_model_is_taken_and_of_several_none(settings, odd):
    with behind(settings, odd) as model:
        assert (model.status.model, model.context_length) == ("odd", 4096)
    odd.models.append({"id": "even"})
    with behind(settings, odd) as model:
        assert "The server has odd, even." in model.status.error
    with behind(settings, odd, inference_model="even") as model:
        assert (model.state, model.context_length) == ("ready", 0)
        read(model)
    assert odd.requests[0]["model"] == "even"


def test_a_server_that_does_not_list_its_models_may_have_one_that_is_named(settings, odd):
    odd.models = status(500, "")
    with behind(settings, odd) as model:
        assert model.status.error == faults.NO_LIST
    with behind(settings, odd, inference_model="even") as model:
        assert model.state == "ready"


def test_a_server_without_top_k_is_asked_without_it_and_the_page_says_so(settings, odd):
    refusal = status(422, {"detail": "Unexpected fields in the request: {'top_k', 'repetition_penalty'}"})
    odd.steps, steps = (lambda line, body: refusal if b'"top_k"' in body else steps(line, body)), odd.steps
    with behind(settings, odd) as model:
        assert read(model)[0] == "Hello!"
        assert "Top-k and repetition penalty have no effect" in model.status.why


def test_one_look_probes_every_server_and_starts_nothing(settings, odd, other):
    other.probe = status(401, {})
    model = RemoteModel(replace(settings, inference_url=f"{odd.url},{other.url}")).probe()
    assert (odd.probed, other.probed, model.state) == (1, 1, "ready")
    assert model.faults == [(other.url[7:], faults.WRONG_KEY)]
