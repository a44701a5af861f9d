"""What the engine promises: the ids that generate gives, requests kept apart, the model free again at once."""

import queue
import threading

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chat_types import Busy, ChatError, ModelUnavailable, SamplingParams
from engine import CPU_PREFILL_CHUNK, Engine, Sampler

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=24)
SEEDED = SamplingParams(seed=7, temperature=1, max_new_tokens=24)
LONG = SamplingParams(seed=7, temperature=1, max_new_tokens=4000)
END = None


class Ids:
    """A streamer whose ids the test reads one by one."""

    def __init__(self):
        self.queue = queue.Queue()

    def put(self, value):
        self.queue.put(value.item())

    def end(self):
        self.queue.put(END)

    def next(self):
        return self.queue.get(timeout=60)

    def rest(self):
        return list(iter(self.next, END))


@pytest.fixture
def engine(loaded_float32):
    engine = Engine(loaded_float32.model, stop_ids={2}, queue_limit=3)
    yield engine
    engine.close()


@pytest.fixture
def endless(loaded_float32):
    """An engine whose answers end at their limit only."""
    engine = Engine(loaded_float32.model, stop_ids=set(), queue_limit=3)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ids(chat_float32):
    return lambda text: chat_float32.tokenizer(text, add_special_tokens=False)["input_ids"]


def answer(engine, input_ids, params=GREEDY):
    """The ids of one whole answer, and the request that gave them."""
    streamer = Ids()
    request = engine.submit(input_ids, params, streamer)
    return streamer.rest(), request


def generated(model, input_ids, **options):
    """What generate() answers, without the end token."""
    with torch.inference_mode():
        whole = model.generate(torch.tensor([input_ids]), do_sample=False, max_new_tokens=24, **options)
    return [token for token in whole[0, len(input_ids) :].tolist() if token != 2]


@pytest.mark.parametrize("text", ["The three largest cities of Japan are", "Answer: <|im_end|", "1"])
def test_greedy_ids_are_the_ones_generate_gives(engine, loaded_float32, ids, text):
    found, request = answer(engine, ids(text))
    assert found == generated(loaded_float32.model, ids(text))
    assert request.finish_reason == ("length" if len(found) == 24 else "stop")


def test_a_prompt_of_several_chunks_gives_what_generate_gives(engine, loaded_float32, ids):
    prompt = ids("A llama walked through the garden. " * 90)
    assert len(prompt) > 2 * CPU_PREFILL_CHUNK
    assert answer(engine, prompt)[0] == generated(loaded_float32.model, prompt)


def test_the_repetition_penalty_counts_the_prompt_as_generate_does(engine, loaded_float32, ids):
    prompt = ids("one two three one two three one two")
    params = SamplingParams(temperature=0, repetition_penalty=1.3, max_new_tokens=24)
    assert answer(engine, prompt, params)[0] == generated(loaded_float32.model, prompt, repetition_penalty=1.3)


def test_the_next_turn_finds_its_keys_and_values_and_says_the_same_as_without_them(engine, loaded_float32, ids):
    prompt = ids("The three largest cities of Japan are")
    first, _ = answer(engine, prompt)
    longer = [*prompt, *first, *ids(" And the smallest?")]
    second, request = answer(engine, longer)
    assert request.cached_tokens >= len(prompt) + len(first) - 1
    assert second == generated(loaded_float32.model, longer)


def test_the_same_question_again_is_computed_from_its_last_token(engine, ids):
    prompt = ids("Name a colour, any colour that you like.")
    first, _ = answer(engine, prompt)
    again, request = answer(engine, prompt)
    assert (again, request.cached_tokens) == (first, len(prompt) - 1)


def test_two_conversations_that_begin_alike_both_keep_their_keys_and_values(engine, loaded_float32, ids):
    system = ids("You are a llama who answers briefly.")
    one, two = [*system, *ids(" Where do you live? " * 8)], [*system, *ids(" What do you eat?")]
    answer(engine, one)
    text, request = answer(engine, two)
    assert request.cached_tokens >= len(system)
    assert text == generated(loaded_float32.model, two)
    _, request = answer(engine, [*one, *ids("Go on.")])
    assert request.cached_tokens >= len(one)


def test_a_seed_gives_the_same_ids_whoever_else_is_talking(engine, ids):
    prompt = ids("Once upon a time")
    alone, _ = answer(engine, prompt, SEEDED)
    neighbours = [Ids(), Ids()]
    engine.submit(ids("Count to ten."), GREEDY, neighbours[0])
    engine.submit(ids("Once upon a midnight"), SamplingParams(temperature=1, max_new_tokens=9), neighbours[1])
    assert answer(engine, prompt, SEEDED)[0] == alone
    assert all(neighbour.rest() for neighbour in neighbours)


def test_without_a_seed_two_answers_differ(engine, ids):
    params = SamplingParams(temperature=1, top_k=0, top_p=1, max_new_tokens=24)
    assert answer(engine, ids("Once upon a time"), params)[0] != answer(engine, ids("Once upon a time"), params)[0]


def test_requests_are_answered_in_order_of_arrival_and_know_their_place(endless, ids):
    order, streamers = [], [Ids() for _ in range(3)]
    requests = []
    for place, streamer in enumerate(streamers):
        streamer.end = lambda place=place, end=streamer.end: (order.append(place), end())
        requests.append(endless.submit(ids("Hello" * (place + 1)), GREEDY, streamer))
        if place == 0:
            streamer.next()  # it runs; the others wait
    assert [request.queue_position for request in requests] == [0, 1, 2]
    for streamer in streamers:
        streamer.rest()
    assert order == [0, 1, 2]
    assert [request.queue_position for request in requests] == [0, 0, 0]


def test_a_full_line_says_so_at_once_and_loses_nobody(endless, ids):
    streamers = [Ids() for _ in range(4)]
    requests = [endless.submit(ids("Hello"), LONG, streamers[0])]
    streamers[0].next()
    requests += [endless.submit(ids("Hello"), GREEDY, streamer) for streamer in streamers[1:]]
    with pytest.raises(Busy, match="3 waiting"):
        endless.submit(ids("Hello"), GREEDY, Ids())
    requests[0].cancel()
    for streamer in streamers[1:]:
        assert streamer.rest()


def test_a_cancelled_request_leaves_the_line_without_touching_the_others(endless, ids):
    running, waiting = Ids(), Ids()
    first = endless.submit(ids("Tell me a story."), GREEDY, running)
    running.next()
    second = endless.submit(ids("Hello"), GREEDY, waiting)
    second.cancel()
    second.cancel()
    assert waiting.rest() == []
    assert second.finish_reason == "cancelled"
    running.rest()
    assert first.finish_reason == "length"
    first.cancel()  # after the end: nothing happens
    assert first.finish_reason == "length"


def test_cancelling_stops_within_one_step(endless, ids):
    streamer = Ids()
    request = endless.submit(ids("Count."), LONG, streamer)
    streamer.next()
    request.cancel()
    computed_before = streamer.queue.qsize()
    assert len(streamer.rest()) <= computed_before + 1
    assert request.finish_reason == "cancelled"


def test_cancelling_acts_between_the_chunks_of_a_prefill(engine, loaded_float32, ids):
    chunks, first_chunk = [], threading.Event()

    def note(*_):
        chunks.append(1)
        first_chunk.set()

    hook = loaded_float32.model.register_forward_pre_hook(note)
    try:
        request = engine.submit(ids("word " * 4000), GREEDY, streamer := Ids())
        assert first_chunk.wait(30)
        request.cancel()
        assert streamer.rest() == []
    finally:
        hook.remove()
    assert request.finish_reason == "cancelled"
    assert len(chunks) <= 2


def test_an_error_reaches_its_own_request_and_the_next_one_works(engine, loaded_float32, ids, caplog):
    prompt = ids("The three largest cities of Japan are")
    expected, _ = answer(engine, prompt)

    def fail(*_):
        raise RuntimeError("a secret detail")

    hook = loaded_float32.model.model.layers[3].register_forward_pre_hook(fail)
    try:
        found, request = answer(engine, ids("Hello there"))
    finally:
        hook.remove()
    assert (found, request.finish_reason) == ([], "error")
    assert isinstance(request.error, ChatError)
    assert "secret" not in str(request.error)
    assert "a secret detail" in caplog.text  # the log has it all
    assert answer(engine, prompt)[0] == expected  # a half written cache must not be found again


def test_logits_that_are_not_numbers_are_an_error_not_a_token(engine, loaded_float32, ids, caplog):
    hook = loaded_float32.model.lm_head.register_forward_hook(lambda *args: args[-1] * float("nan"))
    try:
        found, request = answer(engine, ids("Hello there"), SEEDED)
    finally:
        hook.remove()
    assert (found, request.finish_reason) == ([], "error")
    assert "not finite" in caplog.text


def test_a_reader_that_fails_does_not_stop_the_engine(engine, ids, caplog):
    class Broken:
        def put(self, value):
            raise ValueError("no more room")

        end = put

    request = engine.submit(ids("Hello"), GREEDY, Broken())
    assert answer(engine, ids("Hello"))[0]
    assert request.finish_reason == "error"
    assert "no more room" in caplog.text


@pytest.mark.parametrize(
    "input_ids", [[], [-1], [49152], [2**40]], ids=["none", "negative", "too high", "far too high"]
)
def test_ids_the_model_does_not_know_are_refused_at_the_door(engine, input_ids):
    with pytest.raises(ChatError, match="0 to 49151"):
        engine.submit(input_ids, GREEDY, Ids())


def test_closing_ends_everyone_and_refuses_newcomers(endless, ids):
    running, waiting = Ids(), Ids()
    requests = [endless.submit(ids("Hello"), LONG, running)]
    running.next()
    requests.append(endless.submit(ids("Hello"), LONG, waiting))
    endless.close()
    assert waiting.rest() == []
    running.rest()
    assert [request.finish_reason for request in requests] == ["cancelled", "cancelled"]
    with pytest.raises(ModelUnavailable, match="stopped"):
        endless.submit(ids("Hello"), LONG, Ids())
    assert not endless._thread.is_alive()


def sampled(logits, params, prompt=(), draws=4000):
    """How often each token is drawn, as a share."""
    params = SamplingParams(**params, seed=1)
    sampler = Sampler(params, list(prompt), len(logits), logits.device)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[sampler._choose(sampler._penalise(logits))] += 1
    return counts / draws


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1},
        {"temperature": 2, "top_k": 0, "top_p": 0.7, "repetition_penalty": 0.7},
        {"temperature": 0.8, "top_k": 1000, "top_p": 0.95, "repetition_penalty": 2},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_generate_uses(params):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    prompt = [1, 5, 7]
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"]))])
    warpers.append(TemperatureLogitsWarper(float(params["temperature"])))
    if params["top_k"]:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    warpers.append(TopPLogitsWarper(params["top_p"]))
    expected = warpers(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)
    found = sampled(logits, params, prompt)
    assert not found[expected == 0].any()
    assert torch.allclose(found, expected, atol=0.03)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1e-6},
        {"temperature": 5e-324},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"top_p": 5e-324},
    ],
    ids=str,
)
def test_the_likeliest_token_is_taken_when_nothing_else_is_left(params):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 9
    assert sampled(logits, params, draws=50)[logits.argmax()] == 1


def test_presence_and_frequency_penalties_count_the_answer_only():
    sampler = Sampler(
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1, temperature=0, top_k=0),
        input_ids=[3, 3],
        vocab_size=4,
        device=torch.device("cpu"),
    )
    logits = torch.tensor([1.0, 0.6, 0.0, 0.8])
    assert [sampler.next_token(logits) for _ in range(4)] == [0, 3, 1, 0]
