"""What the engine promises to one request: the ids that generate gives, a place in line, an end when asked."""

from dataclasses import replace

import pytest
import torch

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.errors import Busy, ChatError, ModelUnavailable
from llama2_chat.loading.load import load
from llama2_chat.types import SamplingParams
from tests.support.engines import GREEDY, LONG, SEEDED, Ids, Slow, answer, letters, running, start
from tests.support.serving import ignore


@pytest.fixture
def engine(tiny_llama):
    """Answers end with the id 2 at the latest when generate's do."""
    with running(tiny_llama, tokens=4000, stop_ids={2}) as engine:
        yield engine


@pytest.fixture
def single(tiny_llama):
    """One answer at a time, three may wait."""
    with running(tiny_llama, max_batch=1, queue_limit=3) as engine:
        yield engine


def generated(model, input_ids, **options):
    """What generate() answers, without the end token."""
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([input_ids]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens, **options
        )
    return [token for token in whole[0, len(input_ids) :].tolist() if token != 2]


@pytest.fixture(scope="module")
def embedded_engine(embedded):
    """An engine of the embedded model in float32, where ids can be compared one for one, and the model."""
    model = load(replace(embedded, quantization="float32"), ignore).model
    with running(model, tokens=1000, stop_ids={2}) as engine:
        yield engine, model


@pytest.fixture
def ids(embedded_tokenizer):
    return lambda text: embedded_tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "The three largest cities of Japan are",
        pytest.param("Answer: <|im_end|", marks=pytest.mark.slow),
        pytest.param("1", marks=pytest.mark.slow),
    ],
)
def test_greedy_ids_of_the_embedded_model_are_the_ones_generate_gives(embedded_engine, ids, text):
    engine, model = embedded_engine
    found, request = answer(engine, ids(text))
    assert found == generated(model, ids(text))
    assert request.finish_reason == ("length" if len(found) == GREEDY.max_new_tokens else "stop")


def test_a_prompt_of_several_chunks_gives_what_generate_gives(tiny_llama):
    prompt = letters("A llama walked through the garden. " * 4)
    assert len(prompt) > 2 * 50
    with running(tiny_llama, tokens=1000, stop_ids={2}, longest_chunk=50) as engine:
        assert answer(engine, prompt)[0] == generated(tiny_llama, prompt)


def test_the_repetition_penalty_counts_the_prompt_as_generate_does(engine, tiny_llama):
    prompt = letters("one two three one two three one two")
    params = replace(GREEDY, repetition_penalty=1.3)
    assert answer(engine, prompt, params)[0] == generated(tiny_llama, prompt, repetition_penalty=1.3)


def test_the_next_turn_finds_its_keys_and_values_and_says_the_same_as_without_them(engine, tiny_llama):
    prompt = letters("The three largest cities of Japan are " * 2)
    first, _ = answer(engine, prompt)
    longer = [*prompt, *first, *letters(" And the smallest?")]
    second, request = answer(engine, longer)
    assert request.cached_tokens == (len(prompt) + len(first) - 1) // BLOCK_SIZE * BLOCK_SIZE > 0
    assert second == generated(tiny_llama, longer)


def test_the_same_question_again_is_computed_from_its_last_token(endless):
    prompt = letters("Name a colour, any colour that you like. " * 2)
    first, _ = answer(endless, prompt)
    again, request = answer(endless, prompt)
    assert (again, request.cached_tokens) == (first, BLOCK_SIZE)


def test_two_conversations_that_begin_alike_both_keep_their_keys_and_values(engine, tiny_llama):
    system = letters("You are a llama who answers briefly. " * 2)
    one, two = [*system, *letters(" Where do you live? " * 8)], [*system, *letters(" What do you eat?")]
    answer(engine, one)
    text, request = answer(engine, two)
    assert request.cached_tokens == BLOCK_SIZE
    assert text == generated(tiny_llama, two)
    _, request = answer(engine, [*one, *letters("Go on.")])
    assert request.cached_tokens == len(one) // BLOCK_SIZE * BLOCK_SIZE > BLOCK_SIZE


def test_a_seed_gives_the_same_ids_whoever_else_is_talking(endless):
    prompt = letters("Once upon a time")
    alone, _ = answer(endless, prompt, SEEDED)
    neighbours = [Ids(), Ids()]
    endless.submit(letters("Count to ten."), GREEDY, neighbours[0])
    endless.submit(letters("Once upon a midnight"), SamplingParams(temperature=1, max_new_tokens=9), neighbours[1])
    assert answer(endless, prompt, SEEDED)[0] == alone
    assert all(neighbour.rest() for neighbour in neighbours)


def test_without_a_seed_two_answers_differ(endless):
    params = SamplingParams(temperature=1, top_k=0, top_p=1, max_new_tokens=24)
    assert (
        answer(endless, letters("Once upon a time"), params)[0]
        != answer(endless, letters("Once upon a time"), params)[0]
    )


def test_requests_are_answered_in_order_of_arrival_and_know_their_place(single):
    order, streamers = [], [Ids() for _ in range(3)]
    requests = []
    for place, streamer in enumerate(streamers):
        streamer.end = lambda place=place, end=streamer.end: (order.append(place), end())
        requests.append(single.submit(letters("Hello" * (place + 1)), (GREEDY if place else LONG), streamer))
        if place == 0:
            streamer.next()  # it runs; the others wait
    assert [single.position(request) for request in requests] == [0, 1, 2]
    single.cancel(requests[0])
    for streamer in streamers:
        streamer.rest()
    assert order == [0, 1, 2]
    assert [single.position(request) for request in requests] == [0, 0, 0]


def test_a_full_line_says_so_at_once_and_loses_nobody(single):
    streamers = [Ids() for _ in range(4)]
    requests = [single.submit(letters("Hello"), LONG, streamers[0])]
    streamers[0].next()
    requests += [single.submit(letters("Hello"), GREEDY, streamer) for streamer in streamers[1:]]
    with pytest.raises(Busy, match="3 waiting"):
        single.submit(letters("Hello"), GREEDY, Ids())
    single.cancel(requests[0])
    for streamer in streamers[1:]:
        assert streamer.rest()


def test_a_cancelled_request_leaves_the_line_without_touching_the_others(single):
    running, waiting = Slow(), Ids()
    first = single.submit(letters("Tell me a story."), replace(LONG, max_new_tokens=100), running)
    running.next()
    second = single.submit(letters("Hello"), GREEDY, waiting)
    single.cancel(second)
    single.cancel(second)
    assert waiting.rest() == []
    assert second.finish_reason == "cancelled"
    running.rest()
    assert first.finish_reason == "length"
    single.cancel(first)  # after the end: nothing happens
    assert first.finish_reason == "length"


def test_cancelling_stops_within_one_step(endless):
    streamer = Ids()
    request = endless.submit(letters("Count."), LONG, streamer)
    streamer.next()
    endless.cancel(request)
    computed_before = streamer.queue.qsize()
    assert len(streamer.rest()) <= computed_before + 1
    assert request.finish_reason == "cancelled"


def test_cancelling_acts_between_the_chunks_of_a_prefill(endless, tiny_llama):
    chunks = []

    def leave(*_):
        chunks.append(1)
        endless.cancel(request)

    hook = tiny_llama.register_forward_pre_hook(leave)
    try:
        with endless.paused():
            request, streamer = start(endless, letters("word " * 800))
        found = streamer.rest()
    finally:
        hook.remove()
    assert (found, request.finish_reason, len(chunks)) == ([], "cancelled", 1)


@pytest.mark.parametrize("input_ids", [[], [-1], [97], [2**40]], ids=["none", "negative", "too high", "far too high"])
def test_ids_the_model_does_not_know_are_refused_at_the_door(endless, input_ids):
    with pytest.raises(ChatError, match="0 to 96"):
        endless.submit(input_ids, GREEDY, Ids())


def test_closing_ends_everyone_and_refuses_newcomers(single):
    running, waiting = Ids(), Ids()
    requests = [single.submit(letters("Hello"), LONG, running)]
    running.next()
    requests.append(single.submit(letters("Hello"), LONG, waiting))
    single.close()
    assert waiting.rest() == []
    running.rest()
    assert [request.finish_reason for request in requests] == ["cancelled", "cancelled"]
    with pytest.raises(ModelUnavailable, match="stopped"):
        single.submit(letters("Hello"), LONG, Ids())
