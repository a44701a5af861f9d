"""Guesses that a model makes change no answer either, and are those that it would make alone."""

import copy
from types import SimpleNamespace

import pytest
import torch

from llama2_chat.engine.drafts import LEAST_TIMED, PAUSE, Confidence, Drafts, Guess, GuessCost
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import LikelyTokens
from llama2_chat.engine.speculation import Speculation
from llama2_chat.kernels.compiled import panels_are_fast
from llama2_chat.loading.quantize import quantize_int8
from llama2_chat.training.draft_training import new_head
from llama2_chat.types import SamplingParams
from tests.engine import test_exact
from tests.engine.test_speculation import KINDS, VOCABULARY, answers, explode, prompt
from tests.support.drafts import guess_always, random_head, random_model
from tests.support.engines import Ids, answer, running, start

DRAFTS = {
    "head": random_head,
    "head of few tokens": lambda model: random_head(model, vocabulary=torch.arange(0, VOCABULARY, 2)),
    "head as it is trained here": lambda model: new_head(model, [], 0).to(model.dtype).eval().requires_grad_(False),
    "head that others wrote": lambda model: random_head(model, bias=False, input_norm=True),
    "small model": lambda model: random_model(VOCABULARY),
    "the model itself": copy.deepcopy,
}


@pytest.fixture
def obstinate(monkeypatch):
    guess_always(monkeypatch)


def compare(model, kind, prompts):
    """Asserts equal answers of an engine whose model guesses and one without guesses."""
    limit = len(prompts)
    draft = DRAFTS[kind](model)
    with (
        running(model, queue_limit=limit, speculate=False) as plain,
        running(model, queue_limit=limit, max_batch=3, draft=draft) as guessing,
    ):
        for settings in KINDS:
            drafted = guessing.occupancy.drafted
            assert answers(guessing, prompts, settings) == answers(plain, prompts, settings), settings
            assert guessing.occupancy.drafted > drafted, settings


@pytest.mark.parametrize("kind", DRAFTS)
def test_each_kind_of_answer_is_the_same_with_a_models_guesses_and_without(tiny_llama, obstinate, kind):
    compare(tiny_llama, kind, [prompt(number) for number in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head as it is trained here", "small model"])
def test_200_prompts_have_the_same_answers_with_a_models_guesses_and_without(tiny_llama, obstinate, kind):
    compare(tiny_llama, kind, [prompt(number) for number in range(200)])


def test_a_model_that_is_the_served_one_guesses_all_of_it(tiny_llama, obstinate, monkeypatch):
    # In a batch, over several blocks, behind a prompt that is found in the KV cache, and when memory is short.
    monkeypatch.setattr(Drafts, "look_up", lambda *_: [])
    prompts = [[n, *range(70)] for n in (1, 1, 2)]
    long = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
    with running(tiny_llama, tokens=512, max_batch=2, draft=copy.deepcopy(tiny_llama)) as engine:
        chunks = []
        verify = engine.runner.verify
        monkeypatch.setattr(engine.runner, "verify", lambda step: chunks.extend(step) or verify(step))
        for ids in prompts:
            with engine.paused():
                started = [start(engine, ids, long), start(engine, ids[:5], long)]
            for _, streamer in started:
                streamer.rest()
        assert len(chunks) > 40
        assert all(chunk.draft == chunk.request.ids[chunk.start + 1 : chunk.end] for chunk in chunks)
        counted = engine.occupancy
        assert counted.drafted_by_model == counted.accepted_by_model == counted.drafted > 40


def test_a_model_that_cannot_guess_costs_nobody_an_answer(tiny_llama, obstinate, caplog):
    with running(tiny_llama, speculate=False) as engine:
        expected, _ = answer(engine, [1, 2, 3])
    broken, lost = random_head(tiny_llama), random_head(tiny_llama)
    lost.fc.weight.fill_(torch.nan)
    broken.layers[0].mlp.forward = explode
    for head in (lost, broken):
        with running(tiny_llama, draft=head) as engine:
            said, request = answer(engine, [1, 2, 3])
            assert said == expected
            assert request.drafts is not None  # text that comes again is guessed as before
    assert request.confidence is None


def test_a_model_that_guesses_for_an_engine_hears_no_other(tiny_llama):
    with running(tiny_llama, draft=random_head(tiny_llama)):
        assert tiny_llama.model._forward_hooks
    assert not tiny_llama.model._forward_hooks


def in_8_bits(model, **kinds):
    head = random_head(model, **kinds)
    quantize_int8(head)
    return head


def trained_here(model):
    head = new_head(model, [], 0).requires_grad_(False)
    head.load_state_dict(random_head(model, config=head.config, input_norm=True).float().state_dict())
    quantize_int8(head)
    return head.eval()


@pytest.mark.skipif(not panels_are_fast(), reason="not on this processor")
@pytest.mark.parametrize("least", [0, 0.1])
@pytest.mark.parametrize(
    "kind",
    [
        trained_here,
        lambda model: in_8_bits(model, bias=False),
        lambda model: in_8_bits(model, vocabulary=torch.arange(0, 128, 2), num_hidden_layers=2),
    ],
    ids=["as it is trained here", "that others wrote", "of few tokens and two layers"],
)
def test_a_head_in_one_call_guesses_what_it_does_step_by_step(monkeypatch, kind, least):
    # In company, behind a prompt in several chunks, and after tokens that others' guesses or none were right about.
    guess_always(monkeypatch, least)
    prompts, params = [[n, *range(40 * n)] for n in (1, 2)], SamplingParams(seed=1, max_new_tokens=40)

    def made(net):
        model, told = test_exact.in_int8(128), {}
        with test_exact.running(model, draft=kind(model), longest_chunk=64, speculate=net is not None) as engine:
            assert net is None or type(engine.runner._drafter._net).__name__ == net
            draft = engine.runner.draft

            def listening(requests, *limits):
                guesses = draft(requests, *limits)
                for request, of_one in zip(requests, guesses, strict=True):
                    told[request.prompt_tokens, request.answer_tokens] = of_one
                return guesses

            engine.runner.draft = listening
            with engine.paused():
                started = [start(engine, ids, params) for ids in prompts]
            return [streamer.rest() for _, streamer in started], told

    said, told = made("CompiledHeadNet")
    monkeypatch.setattr("llama2_chat.engine.cpu_draft.in_one_call", lambda net, pool: net)
    said_by_steps, by_steps = made("HeadNet")
    assert said == said_by_steps == made(None)[0]
    assert told.keys() == by_steps.keys()
    for place, guesses in told.items():
        assert [guess.id for guess in guesses] == [guess.id for guess in by_steps[place]]
        for one, other in zip(guesses, by_steps[place], strict=True):
            assert one.chance == pytest.approx(other.chance, rel=1e-2)
    assert {len(guesses) for guesses in told.values()} >= ({1, 2} if least else {3})


def test_memory_for_conversations_counts_what_the_guessing_model_keeps(tiny_llama):
    with (
        running(tiny_llama, tokens=1280, context_length=128, max_batch=16) as plain,
        running(tiny_llama, tokens=1280, context_length=128, max_batch=16, draft=random_head(tiny_llama)) as engine,
    ):
        assert engine.runner.kv_bytes <= plain.runner.kv_bytes
        assert engine.runner.num_blocks < plain.runner.num_blocks


# ---- Which guesses a model makes, and how many ----


def test_guesses_reckon_with_the_penalty_of_what_was_said_and_of_each_other():
    likely = LikelyTokens(torch.tensor([[True, False, False]] * 2), torch.tensor([[2.0], [1.0]]))
    logits, both = torch.tensor([[3.0, 2.0, 1.8]] * 2), torch.tensor([0, 1])
    assert likely.choose(logits, both)[0].tolist() == [1, 0]
    best, chances = likely.choose(logits, both)
    assert best.tolist() == [2, 0]
    penalised = torch.tensor([[1.5, 1.0, 1.8], [3.0, 2.0, 1.8]])
    assert torch.allclose(chances, penalised.softmax(-1).amax(-1))


def test_what_a_guess_costs_is_told_by_the_clock_once_it_is_known():
    cost, now = GuessCost(0.1), 0.0
    for step in range(LEAST_TIMED + 1):
        assert cost.cost == 0.1
        cost.made(now, now + 2 * 3, guesses=2)  # 3 s each
        cost.computed()
        now += 6 + (100 if step == 1 else 10)  # others were read meanwhile, once
    assert cost.cost == 3 / 10
    cost.made(now, now, guesses=0)
    cost.computed()
    cost.made(now + 1000, now + 1006, guesses=2)  # nothing was guessed before it, so nobody knows how long a step took
    assert cost.cost == 3 / 10


def test_what_a_guess_costs_is_told_by_single_steps_also_where_guesses_are_rare(tiny_llama, obstinate):
    # After each guess came 25 steps until the next, which counted as one: a guess seemed to cost 25 times less.
    cost, now = GuessCost(0.1), 0.0
    for steps in [1] * (LEAST_TIMED + 1) + [PAUSE + 1] * 20:
        cost.made(now, now + 3, guesses=1)
        now += 3 + 10 * steps
        for _ in range(steps):
            cost.computed()
    assert cost.cost == 3 / 10
    with running(tiny_llama, draft=random_head(tiny_llama)) as engine:
        engine.runner.draft_tokens = 0
        said, _ = answer(engine, [1, 2, 3])
        assert engine.runner._guess_cost._computed == len(said) - 1


def test_what_a_cpu_guesses_is_what_other_devices_do():
    torch.manual_seed(0)
    logits, rows = torch.randn(3, 200), torch.tensor([2, 0, 3])
    seen, repetition = torch.rand(4, 200) > 0.5, torch.tensor([[1.1], [1.3], [1.0], [2.0]])
    pushed = torch.where(logits > 0, logits / repetition[rows], logits * repetition[rows])
    chances = torch.where(seen[rows], pushed, logits).softmax(-1)
    best, chance = LikelyTokens(seen, repetition).choose(logits, rows)
    assert best.tolist() == chances.argmax(-1).tolist()
    torch.testing.assert_close(chance, chances.amax(-1))


def test_no_guess_is_made_behind_some_that_hardly_come_true(tiny_llama, monkeypatch):
    for least, most in ((0.0, 3), (1e9, 1)):
        guess_always(monkeypatch, least)
        with running(tiny_llama, draft=random_head(tiny_llama)) as engine:
            lengths = []
            draft = engine.runner.draft

            def listening(requests, *limits, draft=draft, lengths=lengths):
                made = draft(requests, *limits)
                lengths.append(len(made[0]))
                return made

            monkeypatch.setattr(engine.runner, "draft", listening)
            answer(engine, [1, 2, 3])
            assert max(lengths) == most


def test_guesses_that_come_true_get_longer_and_wrong_ones_stop():
    good, bad = Confidence(), Confidence()
    for _ in range(30):
        good.judge(3, 3)
        bad.judge(3, 0)
    assert good.length(7, cost=0.1) == 7
    assert good.length(7, cost=1) == 0
    assert bad.length(7, cost=0.1) == 0


def test_guesses_go_on_as_long_as_the_next_one_comes_true_as_often_as_it_costs():
    often, seldom = Confidence(), Confidence()
    for _ in range(30):
        often.judge(3, 3)
        seldom.judge(1, 0.25)
    assert often.least(0.2) == pytest.approx(0.2, rel=0.1)
    assert seldom.least(0.2) == pytest.approx(0.2 / 0.25, rel=0.2)


def test_of_a_models_guesses_those_are_checked_that_pay_for_it():
    request = Request([1, 2], SamplingParams(), Ids(), 99, torch.empty(99), drafts=Drafts(), slot=0)
    drafted = [[Guess(50, 0.9), Guess(51, 0.5), Guess(52, 0.05)], [Guess(50, 0.05)]]
    runner = SimpleNamespace(
        row_cost=0.1, draft_tokens=8, pipelined=False, draft_cost=0.2, draft=lambda *_: drafted.pop(0)
    )
    drafted[:] = [[each] for each in drafted]
    speculation = Speculation(runner, SimpleNamespace(grow=lambda *_: True), None)
    (chunk,) = speculation.chunks([request])
    assert chunk.draft == [50, 51]
    before = request.confidence.chance
    assert speculation.chunks([request]) == []
    assert request.confidence.chance < before  # of guesses that are hardly ever worth a look no more are made


def test_whoever_stopped_guessing_tries_again_now_and_then():
    wrong = Confidence()
    for _ in range(30):
        wrong.judge(3, 0)
    assert [wrong.length(7, cost=0.1) for _ in range(PAUSE + 1)] == [0] * PAUSE + [1]
    wrong.judge(1, 1)
    assert wrong.length(7, cost=0.1) == 0


def test_text_that_comes_again_goes_before_a_model_only_where_it_is_likelier():
    request = Request([1, 2, 3, 9, 1, 2], SamplingParams(), Ids(), 99, torch.empty(99), drafts=Drafts(), slot=0)
    drafted = [[Guess(50, 0.9)], [Guess(60, 0.9)]]
    runner = SimpleNamespace(
        row_cost=0.1, draft_tokens=8, pipelined=False, draft_cost=0.2, draft=lambda *_: [drafted.pop()]
    )
    speculation = Speculation(runner, SimpleNamespace(grow=lambda *_: True), None)
    (chunk,) = speculation.chunks([request])
    assert (chunk.draft, chunk.by_model) == ([60], True)
    for _ in range(30):
        request.confidence.judge(3, 0)
    (chunk,) = speculation.chunks([request])
    assert (chunk.draft, chunk.by_model) == ([3, 9], False)


def test_a_model_that_stopped_guessing_tries_again_also_where_tokens_are_in_flight():
    request = Request([1, 2], SamplingParams(), Ids(), 99, torch.empty(99), drafts=Drafts(), slot=0)
    runner = SimpleNamespace(
        row_cost=0.1, draft_tokens=8, pipelined=True, draft_cost=0.2, draft=lambda *_: [[Guess(60, 0.9)]]
    )
    speculation = Speculation(runner, SimpleNamespace(grow=lambda *_: True), SimpleNamespace(deliver=lambda: None))
    for _ in range(30):
        request.confidence.judge(3, 0)
    assert [len(speculation.chunks([request])) for _ in range(PAUSE + 1)] == [0] * PAUSE + [1]
