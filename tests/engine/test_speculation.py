"""Guesses change no answer: with and without them each request gets the same tokens, whatever it asks for."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llama2_chat.benchmark.speculation import TASKS
from llama2_chat.engine.drafts import Drafts, Guess
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.request import Request
from llama2_chat.engine.speculation import Speculation
from llama2_chat.types import SamplingParams
from tests.engine.test_exact import MODELS, Listening, prompt_of
from tests.engine.test_exact import running as running_any
from tests.support.engines import Ids, Stairs, answer, running, start

VOCABULARY = 97
KINDS = {
    "greedy": {"temperature": 0, "repetition_penalty": 1},
    "seeded": {"temperature": 1, "top_k": 5, "stop_token_ids": (5, 50)},
    "penalties": {
        **{"temperature": 0.5, "top_k": 0, "repetition_penalty": 1.1, "presence_penalty": 0.2},
        **{"frequency_penalty": 0.1, "min_tokens": 9, "stop_token_ids": (5, 50), "logit_bias": ((11, 2.0),)},
    },
    "grammar": {"temperature": 1, "top_p": 1},
    "logprobs": {"temperature": 1, "top_k": 3, "logprobs": 4},
}


def prompt(number):
    """Text that comes again, in some prompts with changes."""
    drawn = random.Random(number)
    text = drawn.choices(range(VOCABULARY), k=drawn.randint(2, 30))
    again = [drawn.randrange(VOCABULARY) if drawn.random() < 0.05 * (number % 3) else id for id in text]
    return [*text, *again, *text][: drawn.randint(3, 90)]


def answers(engine, prompts, kind):
    """Of each prompt its answer, why it ended, and what was told of its likelihood."""
    started = []
    for number, ids in enumerate(prompts):
        params = SamplingParams(**KINDS[kind], seed=number, max_new_tokens=18)
        grammar = Stairs(ids[-1], steps=number % 25 + 1) if kind == "grammar" else None
        started.append(start(engine, ids, params, grammar))
    return [(streamer.rest(), request.finish_reason, request.logprobs) for request, streamer in started]


def sure(ids):
    return [Guess(id, 1.0) for id in ids]


class Planted:
    """In place of Drafts: what an answer will say, with one guess of five changed."""

    of_model = None

    def __init__(self, prompt_tokens, answer):
        self._prompt_tokens, self._answer, self._random = prompt_tokens, answer, random.Random(0)

    def look_up(self, ids, most, forced=()):
        following = self._answer[len(ids) - self._prompt_tokens + len(forced) :][:most]
        return sure(id if self._random.random() < 0.8 else (id + 1) % VOCABULARY for id in following)


def plant(engine, answers):
    """From now on these are the guesses at the answers to these prompts."""

    def planted(request, room):
        if type(request.drafts) is Drafts:
            request.drafts = Planted(request.prompt_tokens, answers[tuple(request.ids[: request.prompt_tokens])])
        return Speculation._guess(speculation, request, room)

    speculation = engine._speculation
    speculation._guess = planted


def compare(model, prompts):
    """Asserts equal answers of an engine that guesses and one that does not; some guesses are right and some wrong."""
    limit = len(prompts)
    with running(model, queue_limit=limit) as plain, running(model, queue_limit=limit, max_batch=3) as guessing:
        plain.runner.draft_tokens = 0
        for kind in KINDS:
            before, expected = guessing.occupancy, answers(plain, prompts, kind)
            plant(guessing, {tuple(ids): said for ids, (said, *_) in zip(prompts, expected, strict=True)})
            assert answers(guessing, prompts, kind) == expected, kind
            after = guessing.occupancy
            assert 0 < after.accepted - before.accepted < after.drafted - before.drafted, kind
        assert plain.occupancy.drafted == 0


def test_each_kind_of_answer_is_the_same_with_guesses_and_without(tiny_llama):
    compare(tiny_llama, [prompt(number) for number in range(16)])


class Pipelined:
    """A runner whose next step may be launched while the tokens of the last are in flight, as on a GPU."""

    pipelined = True

    def __init__(self, runner):
        self._runner = runner

    def __getattr__(self, name):
        return getattr(self._runner, name)


def test_guesses_change_no_answer_where_the_newest_token_is_in_flight(tiny_llama, monkeypatch):
    monkeypatch.setattr("tests.support.engines.Engine", lambda runner, *args: Engine(Pipelined(runner), *args))
    compare(tiny_llama, [prompt(number) for number in range(5)])


@pytest.mark.slow
def test_200_prompts_have_the_same_answers_of_each_kind_with_guesses_and_without(tiny_llama):
    compare(tiny_llama, [prompt(number) for number in range(200)])


@pytest.mark.parametrize("model", MODELS)
def test_the_logits_of_checked_tokens_are_those_of_tokens_that_are_computed_one_by_one(model):
    # Also where another number of keys is multiplied, from 64, 128 and 256 tokens on.
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=12)
    prompts = [[first, *prompt_of(length, seed=1)] for first, length in enumerate((1, 57, 57, 122, 250))]
    with running_any(MODELS[model](), max_batch=3) as engine:
        heard, said = [], {}
        for guessing in (False, True):
            engine.runner.draft_tokens = 8 if guessing else 0
            if guessing:
                plant(engine, said)
            listening = Listening(engine)
            with engine.paused():
                started = [start(engine, ids, params) for ids in prompts]
            for (_, streamer), ids in zip(started, prompts, strict=True):
                said[tuple(ids)] = streamer.rest()
            heard.append([torch.stack(listening.heard[request]) for request, _ in started])
            engine.runner.sample = listening._sample
        assert all(torch.equal(*each) for each in zip(*heard, strict=True))
        assert 0 < engine.occupancy.accepted < engine.occupancy.drafted
        assert engine.occupancy.drafted_by_model == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_embedded_model_says_the_same_with_guesses_and_without(chat):
    runner = chat.serving.engine.runner
    most, before = runner.draft_tokens, chat.occupancy
    for messages, params in TASKS.values():
        for changed in ({}, {"temperature": 0.7, "seed": 1, "repetition_penalty": 1.1}):
            said = []
            for runner.draft_tokens in (most, 0):
                with chat.stream_reply(messages, replace(params, **changed, max_new_tokens=40)) as reply:
                    said.append("".join(reply))
            assert said[0] == said[1]
    runner.draft_tokens = most
    assert chat.occupancy.accepted > before.accepted


# ---- What guesses must not spoil ----

UNSAID = 96
SAID = SamplingParams(seed=3, temperature=1, max_new_tokens=40, logit_bias=((UNSAID, -100.0),))


class Wrong(Planted):
    """Two that come true, then a token that nobody ever says."""

    def look_up(self, ids, most, forced=()):
        following = self._answer[len(ids) - self._prompt_tokens :]
        return sure([*following[:2], UNSAID, UNSAID][:most] if len(ids) % 7 == 0 else [])


def explode(*_):
    raise RuntimeError("odd")


@pytest.mark.parametrize(
    "effect",
    [lambda hidden, bad: torch.where(bad[..., None], torch.nan, hidden), explode],
    ids=["not numbers", "error"],
)
def test_a_wrong_guess_that_cannot_be_computed_harms_nobody(tiny_llama, effect, monkeypatch, caplog):
    prompts = [[n, n + 1, n + 2] for n in range(3)]
    with running(tiny_llama, speculate=False) as engine:
        expected = [answer(engine, ids, SAID)[0] for ids in prompts]

    def spoil(_, args, output):
        bad = args[0] == UNSAID
        return effect(output, bad) if bad.any() else None

    monkeypatch.setattr("tests.engine.test_speculation.Planted", Wrong)
    handle = tiny_llama.model.embed_tokens.register_forward_hook(spoil)
    try:
        with running(tiny_llama) as engine:
            plant(engine, {tuple(ids): said for ids, said in zip(prompts, expected, strict=True)})
            with engine.paused():
                started = [start(engine, ids, SAID) for ids in prompts]
            assert [streamer.rest() for _, streamer in started] == expected
            assert {request.finish_reason for request, _ in started} == {"length"}
            assert any(request.drafts is None for request, _ in started)
            assert engine.runner.are_finite([*range(engine.runner.num_blocks)])
            assert engine.occupancy.kv_tokens == 0
    finally:
        handle.remove()


def test_whoever_leaves_while_guesses_come_true_gets_no_more_and_leaves_the_others_alone(tiny_llama):
    prompts = [[n, n + 1, n + 2] for n in range(2)]
    with running(tiny_llama, speculate=False) as engine:
        expected = [answer(engine, ids, SAID)[0] for ids in prompts]
    with running(tiny_llama) as engine:
        plant(engine, {tuple(ids): said for ids, said in zip(prompts, expected, strict=True)})

        class Leaving(Ids):
            left = 5

            def put(self, value):
                super().put(value)
                self.left -= 1
                if not self.left:
                    engine.cancel(leaving)

        reader = Leaving()
        with engine.paused():
            leaving = engine.submit(prompts[0], SAID, reader)
            _, neighbour = start(engine, prompts[1], SAID)
        assert (reader.rest(), leaving.finish_reason) == (expected[0][:5], "cancelled")
        assert neighbour.rest() == expected[1]


def test_nothing_is_guessed_where_it_is_switched_off(tiny_llama):
    for speculate in (True, False):
        with running(tiny_llama, speculate=speculate) as engine:
            answer(engine, [1, 2, 3] * 9, SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=60))
            assert bool(engine.occupancy.drafted) is speculate


# ---- The guesses ----


def ids_of(guesses):
    return [guess.id for guess in guesses]


def test_what_followed_the_longest_repeat_is_guessed():
    drafts = Drafts()
    ids = [1, 2, 3, 4, 50, 60, 70, 80, 90, 9, 2, 3, 4, 51, 61, 1, 2, 3, 4]
    assert ids_of(drafts.look_up(ids, 4)) == [50, 60, 70, 80]
    assert ids_of(drafts.look_up(ids, 2)) == [50, 60]
    assert drafts.look_up([*ids, 7], 8) == []


def test_a_repeat_that_reaches_the_end_goes_round():
    assert ids_of(Drafts().look_up([7, 8, 9, 7, 8, 9], 4)) == [7, 8, 9, 7]


def test_the_guesses_go_on_behind_those_that_a_grammar_forces():
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    assert ids_of(Drafts().look_up(ids, 4, forced=[2, 3, 4])) == [5, 6, 7, 8]
    assert Drafts().look_up(ids, 8) == []


def test_a_guess_is_the_likelier_the_more_ids_stood_alike_before_and_less_likely_behind_others():
    first = []
    for alike in range(2, 12):
        text = range(100, 100 + alike)
        chances = [guess.chance for guess in Drafts().look_up([1, *text, 50, 51, 52, 2, *text], 3)]
        assert chances == sorted(chances, reverse=True)
        first.append(chances[0])
    assert first == sorted(first)
    assert 0 < first[0] < first[-1] < 1


def test_an_answer_tells_how_likely_its_own_text_comes_again_also_where_nothing_was_guessed():
    text = [*range(30)]
    again = [*text, *text, *text]
    never = [*text, *(id for n in range(25) for id in (n, n + 1, 90 + n)), 5, 6]
    learned = []
    for ids in (again, never):
        drafts = Drafts()
        drafts.look_up(text, 1)
        learned.append(drafts.look_up(ids, 1)[0].chance / Drafts().look_up(ids, 1)[0].chance)
    assert learned[0] > 1.1
    assert learned[1] < 0.5


def test_it_makes_no_difference_how_many_ids_come_at_once():
    drawn = random.Random(0)
    for _ in range(50):
        ids = [drawn.randrange(4) for _ in range(60)]
        one_by_one, at_once = Drafts(), Drafts()
        for length in range(1, 60):
            one_by_one.look_up(ids[:length], 7)
        at_once.look_up(ids[:1], 7)
        assert at_once.look_up(ids, 7) == one_by_one.look_up(ids, 7)


# ---- Which of them are made ----


class Waiting:
    """A delivery that knows how often it was waited for."""

    times = 0

    def deliver(self):
        self.times += 1


def lengths(chances, row_cost=0.15, draft_tokens=16, pipelined=False, delivery=None):
    """How many guesses are made for requests whose guesses have these chances to come true."""
    runner = SimpleNamespace(row_cost=row_cost, draft_tokens=draft_tokens, pipelined=pipelined, draft_cost=None)
    speculation = Speculation(runner, SimpleNamespace(grow=lambda *_: True), delivery)
    requests = [Request([1, 2], SamplingParams(), Ids(), 99, torch.empty(99), slot=n) for n in range(len(chances))]
    speculation._guess = lambda request, room: [Guess(5, chance) for chance in chances[requests.index(request)]]
    return [len(chunk.draft) for chunk in speculation.chunks(requests)]


def test_as_many_guesses_are_made_as_give_the_most_tokens_for_a_steps_time():
    chances = [0.9, 0.7, 0.5, 0.3, 0.2, 0.1]

    def tokens(length, row_cost):
        return (1 + sum(chances[:length])) / (1 + row_cost * length)

    for row_cost in (0.01, 0.03, 0.1, 0.15, 0.3, 0.6):
        best = max(range(7), key=lambda length, cost=row_cost: tokens(length, cost))
        assert lengths([chances], row_cost) == [best]
    assert lengths([chances], row_cost=1) == []  # no step checks guesses
    assert lengths([chances], row_cost=0) == [6]


def test_for_a_wrong_guess_all_who_share_a_step_wait_so_among_many_only_likely_ones_are_made():
    assert lengths([[0.3]]) == [1]
    assert lengths([[0.3], [], [], []]) == []
    assert lengths([[0.9], [], [], []]) == [1, 0, 0, 0]


def test_where_there_is_no_room_for_all_the_likeliest_guesses_are_made():
    assert lengths([[0.9, 0.6, 0.5], [0.95, 0.8, 0.2]], row_cost=0.01, draft_tokens=5) == [1, 2]
    assert lengths([[1.0] * 9, [1.0] * 9], row_cost=0.01, draft_tokens=8) == [3, 3]


def test_a_token_in_flight_is_waited_for_only_where_more_seems_to_follow_it():
    waiting = Waiting()
    assert lengths([[0.9]], pipelined=True, delivery=waiting) == []
    assert waiting.times == 0
    assert lengths([[0.9, 0.8]], pipelined=True, delivery=waiting) == [2]
    assert waiting.times == 1
