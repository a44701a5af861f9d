"""What ChatModel and its replies promise: text as soon as it is whole, a model that is free when a reader leaves."""

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llama2_chat import prompt
from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.engine.reply import StreamedReply
from llama2_chat.errors import Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.types import SamplingParams, Usage
from model import EXIT_GPU_LOST, ChatModel
from tests.support.serving import busy
from tests.support.small_model import untrained
from tests.support.waiting import until

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
ENDLESS = SamplingParams(temperature=1, max_new_tokens=4000, seed=1)


ENGINE = SimpleNamespace(cancel=lambda request: None)  # for replies whose ids a test puts in


@pytest.fixture(scope="module")
def loaded(embedded_tokenizer):
    return untrained(embedded_tokenizer, 8192)


@pytest.fixture(scope="module")
def small(settings, embedded_tokenizer, loaded):
    """The embedded model's tokenizer and few random weights: what is said does not matter here, and it is said fast."""
    small = ChatModel(settings).serve(embedded_tokenizer, loaded)
    yield small
    small.close()


def user(text):
    return [{"role": "user", "content": text}]


def reply_of(tokenizer, text, stop=()):
    """A finished reply whose ids are those of a given text, to see how it is cut into pieces."""
    reply = StreamedReply(tokenizer, ENGINE, stop, Usage())
    reply.request = SimpleNamespace(finish_reason="length", cached_tokens=0, params=GREEDY)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        reply.put(torch.tensor([token]))
    reply.end()
    return reply


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 warns of what is tried here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_after_loading_is_told_that_it_has_no_model(small):
    # It waited for its first word for ever: the engine's thread is not in it.
    reading, writing = os.pipe()
    if not (child := os.fork()):
        signal.alarm(10)  # so long would a child wait that the parent could not end
        try:
            small.stream_reply(user("Hello"), GREEDY)
        except ModelUnavailable as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "before this process was forked" in pipe.read()
    os.waitpid(child, 0)


def test_streamed_pieces_join_to_the_text_generate_returns(small, loaded):
    messages = user("Write one sentence about llamas, with an emoji and a word of Japanese.")
    ids = prompt.encode(small.serving.tokenizer, messages)
    with torch.inference_mode():
        whole = loaded.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    expected = small.serving.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    with small.stream_reply(messages, GREEDY) as reply:
        assert "".join(reply) == expected


TEXTS = [
    "Hi 👩‍👩‍👧‍👦🇯🇵 there",
    "日本語のテキスト",
    "สวัสดีชาวโลก",
    "https://example.org/a?b=c",
    "é\u0301 \t\n  x",
    " leading",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_shows_at_once_and_whole(small, text):
    pieces = list(reply_of(small.serving.tokenizer, text))
    assert "".join(pieces) == text
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_2_text_streams_the_same_as_it_decodes_whole(llama2_tokenizer, text):
    reply = reply_of(llama2_tokenizer, text)
    ids = llama2_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(reply)
    assert "".join(pieces) == llama2_tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_limit_shows_as_a_replacement_character(small):
    reply = reply_of(small.serving.tokenizer, "")
    reply.text_queue.get()
    first_byte = small.serving.tokenizer("😱", add_special_tokens=False)["input_ids"][0]
    reply.put(torch.tensor([first_byte]))
    reply.end()
    assert "".join(reply) == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three four", ["three"], "one two "),
        ("one two three four", ["four", "two"], "one "),
        ("one two three four", ["five"], "one two three four"),
        ("one two thr", ["three"], "one two thr"),
        ("aaab", ["aab"], "a"),
        ("User: hi\nUser: you", ["\nUser:"], "User: hi"),
        ("日本語", ["語"], "日本"),
        ("stop", ["stop"], ""),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_never_shown(small, text, stop, shown):
    reply = reply_of(small.serving.tokenizer, text, stop)
    assert "".join(reply) == shown
    assert reply.finish_reason == ("stop" if shown != text else "length")


def test_a_stop_string_frees_the_model(chat):
    messages = user("Count from one to a thousand, one number per line.")
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=1000, stop=["\n"])
    with chat.stream_reply(messages, params) as reply:
        assert "\n" not in "".join(reply)
    assert reply.finish_reason == "stop"
    assert reply.usage.completion_tokens < 1000


def test_usage_and_timing_say_what_the_answer_cost(small):
    messages = user("Say hello to the llama in the garden. " * 8)
    with small.stream_reply(messages, GREEDY) as reply:
        text = "".join(reply)
    assert reply.usage.prompt_tokens == len(prompt.encode(small.serving.tokenizer, messages))
    assert 0 < reply.usage.completion_tokens <= 40
    assert reply.usage.dropped_messages == 0
    assert reply.timing.time_to_first_token_s > 0
    assert reply.timing.tokens_per_second > 0
    more = [*messages, {"role": "assistant", "content": text}, *user("And goodbye.")]
    with small.stream_reply(more, GREEDY) as reply:
        next(reply)
    whole = len(prompt.encode(small.serving.tokenizer, messages)) // BLOCK_SIZE
    assert reply.usage.cached_tokens >= whole * BLOCK_SIZE > 0


def test_an_async_reader_gets_the_same_text(small):
    async def read():
        async with small.stream_reply(user("Name three colours."), GREEDY) as reply:
            return "".join([piece async for piece in reply])

    with small.stream_reply(user("Name three colours."), GREEDY) as reply:
        assert asyncio.run(read()) == "".join(reply)


def test_no_thread_waits_on_behalf_of_a_reader(small):
    async def read_together():
        replies = [small.stream_reply(user(f"Say {n}."), ENDLESS) for n in range(40)]
        readers = [asyncio.create_task(anext(reply)) for reply in replies]
        done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        threads = threading.active_count()
        for reply in replies:
            reply.close()
        await asyncio.gather(*readers, return_exceptions=True)
        return len(done), threads

    before = threading.active_count()
    done, threads = asyncio.run(read_together())
    assert done < 40  # the others still wait
    assert threads == before


def test_closing_the_stream_frees_the_model_for_the_next_question(small):
    with small.stream_reply(user("Tell me a very long story."), ENDLESS) as endless:
        next(endless)
    assert endless.finish_reason == "cancelled"
    with small.stream_reply(user("Say hi."), GREEDY) as reply:
        assert "".join(reply)
    assert reply.finish_reason in ("stop", "length")


def test_close_from_another_thread_wakes_a_reader_and_may_be_called_twice(small):
    with busy(small, user("Tell me a very long story."), ENDLESS):
        waiting = small.stream_reply(user("Say hi."), GREEDY)
        assert waiting.queue_position == 1
        threading.Timer(0.2, waiting.close).start()
        assert list(waiting) == []
        waiting.close()
        assert waiting.finish_reason == "cancelled"


def test_close_wakes_an_async_reader(small):
    async def read():
        waiting = small.stream_reply(user("Say hi."), GREEDY)
        threading.Timer(0.2, waiting.close).start()
        return [piece async for piece in waiting], waiting.finish_reason

    with busy(small, user("Tell me a very long story."), ENDLESS):
        assert asyncio.run(read()) == ([], "cancelled")


def test_closing_after_the_end_changes_nothing(small):
    reply = small.stream_reply(user("Say hi."), GREEDY)
    text = "".join(reply)
    reason = reply.finish_reason
    reply.close()
    assert text
    assert reply.finish_reason == reason


def test_an_error_while_generating_reaches_the_reader_after_the_text_before_it(small, loaded, caplog):
    reply = small.stream_reply(user("Tell me a very long story."), ENDLESS)
    next(reply)

    def fail(*_):
        raise RuntimeError("a secret detail")

    hook = loaded.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ChatError, match="Please try again"):
            list(reply)
    finally:
        hook.remove()
    assert reply.finish_reason == "error"
    with small.stream_reply(user("Say hi."), GREEDY) as reply:
        assert "".join(reply)


def test_a_conversation_that_grew_too_long_loses_its_oldest_exchanges_and_says_so(small):
    old = [*user("word " * 3000), {"role": "assistant", "content": "Noted."}] * 3
    with small.stream_reply([*old, *user("Say hi.")], GREEDY) as reply:
        assert reply.usage.dropped_messages in (2, 4)
        assert reply.usage.prompt_tokens + 40 <= small.context_length
    with pytest.raises(PromptTooLong, match=r"9,\d\d\d tokens, and 40 more"):
        small.stream_reply([*old, *user("Say hi.")], GREEDY, trim=False)


def test_fit_tells_what_an_answer_would_find(small):
    old = [*user("word " * 3000), {"role": "assistant", "content": "Noted."}] * 3
    told = small.fit([*old, *user("Say hi.")], GREEDY)
    with small.stream_reply([*old, *user("Say hi.")], GREEDY) as reply:
        assert (told.prompt_tokens, told.dropped_messages) == (reply.usage.prompt_tokens, reply.usage.dropped_messages)
    assert told.fits
    assert told.answer_tokens == small.context_length - told.prompt_tokens
    too_long = small.fit([*old, *user("word " * 20_000)], GREEDY)
    assert (too_long.fits, too_long.dropped_messages, too_long.answer_tokens) == (False, 6, 0)
    assert too_long.prompt_tokens > small.context_length


def test_refusals_come_from_the_call_itself(small):
    with pytest.raises(PromptTooLong, match=r"\d,\d\d\d tokens"):
        small.stream_reply(user("word " * 9000), GREEDY)
    with pytest.raises(ChatError):
        small.stream_reply([{"role": "wizard", "content": "hi"}], GREEDY)
    with pytest.raises(PromptTooLong, match="8,153 tokens, and 40 more"):
        small.stream_completion([5] * 8153, GREEDY)


@pytest.mark.slow
def test_ids_can_be_continued_without_a_chat_format(chat):
    ids = chat.serving.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    with chat.stream_completion(ids, GREEDY) as reply:
        assert "Paris" in "".join(reply)
    assert reply.usage.prompt_tokens == len(ids)


def test_the_line_has_an_end(settings, small, loaded):
    short = ChatModel(replace(settings, queue_limit=1, max_batch=1)).serve(small.serving.tokenizer, loaded)
    with short.stream_reply(user("Tell me a very long story."), ENDLESS) as running:
        next(running)
        with short.stream_reply(user("Hi"), ENDLESS), pytest.raises(Busy):
            short.stream_reply(user("Hi"), ENDLESS)
    short.close()


def test_before_loading_and_after_closing_the_model_says_so(settings, small, loaded):
    chat = ChatModel(settings)
    assert chat.state == "loading"
    with pytest.raises(ModelUnavailable, match="still loading"):
        chat.stream_reply(user("Hi"), GREEDY)
    chat.serve(small.serving.tokenizer, loaded)
    assert chat.state == "ready"
    reply = chat.stream_reply(user("Tell me a very long story."), ENDLESS)
    next(reply)
    started = time.monotonic()
    chat.close()
    chat.close()
    assert time.monotonic() - started < 5
    list(reply)
    assert reply.finish_reason == "cancelled"
    with pytest.raises(ModelUnavailable, match="stopped"):
        chat.stream_reply(user("Hi"), GREEDY)


@pytest.mark.slow
def test_closing_while_loading_stops_the_loading(settings):
    chat = ChatModel(settings)
    chat.close()
    assert chat.load().state == "loading"


def test_garbage_is_looked_for_among_what_came_after_loading(settings, chat_model):
    # Now and then an answer stood still for half a second: Python looked through all that a loaded model brings.
    chat = ChatModel(replace(settings, model_id=str(chat_model))).load()
    assert gc.get_freeze_count() > 100_000
    chat.close()
    assert not gc.get_freeze_count()


def test_a_model_that_is_closed_is_garbage_beside_another_whose_answers_stand_still_for_it_once(settings, chat_model):
    # From then on Python looked through all that the other one had brought, again and again.
    closed, other = (ChatModel(replace(settings, model_id=str(chat_model))).load() for _ in range(2))
    weights = weakref.ref(closed.serving.model.lm_head.weight)
    closed.close()
    del closed
    gc.collect()
    assert weights() is None
    assert gc.get_freeze_count() > 100_000
    other.close()
    assert not gc.get_freeze_count()


class FullGpu(ChatModel):
    def serve(self, tokenizer, loaded, chat_format=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_after_loading_is_said_as_such(settings, chat_model):
    # The operator read "an unexpected error".
    chat = FullGpu(replace(settings, model_id=str(chat_model))).load()
    assert "GPU memory ran out while" in chat.status.error


@pytest.mark.parametrize(
    ("own", "found"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing is set", "the operator's own", "the operator's policy"],
)
def test_beside_other_programs_threads_wait_asleep_for_each_other(settings, tmp_path, monkeypatch, own, found):
    # Beside a few busy programs an answer came at one token a second.
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    ChatModel(replace(settings, model_id=str(tmp_path / "nothing here"))).load()
    assert os.environ.get("GOMP_SPINCOUNT") == found


def test_a_model_that_cannot_be_loaded_says_why_and_keeps_saying_it(settings, tmp_path):
    chat = ChatModel(replace(settings, model_id=str(tmp_path / "nothing here"))).load()
    assert chat.state == "failed"
    assert "nothing here" in chat.status.error
    with pytest.raises(ModelUnavailable, match="nothing here"):
        chat.stream_reply(user("Hi"), GREEDY)


def test_the_embedded_model_says_what_it_is(chat):
    assert chat.status.model
    assert (chat.status.precision, chat.status.device) == ("int8", "cpu")
    assert chat.status.why
    assert chat.context_length == 8192


def test_stray_bytes_break_no_answer(llama2_tokenizer):
    """A visitor saw an answer end in an error: a byte that is no character came after one that is."""
    ids = llama2_tokenizer.convert_tokens_to_ids(["▁It", "<0x32>", "<0xA6>", "▁addr", "ess", "▁here"])
    reply = StreamedReply(llama2_tokenizer, ENGINE, (), Usage())
    reply.request = SimpleNamespace(finish_reason="stop", cached_tokens=0, params=GREEDY)
    for token in ids:
        reply.put(torch.tensor([token]))
    reply.end()
    assert "".join(reply) == "It2\ufffd address here"


def test_a_lost_gpu_ends_the_program_also_while_its_engine_waits_with_the_lock(settings, monkeypatch):
    # Readers were to be told first, which takes the engine's lock, and its thread may wait for that GPU with it.
    chat, timers, held = ChatModel(settings), [], threading.Event()
    timer = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr("model.threading.Timer", lambda *args: timers.append(args) or timer)
    chat._serving = SimpleNamespace(engine=SimpleNamespace(lose=held.wait))
    thread = threading.Thread(target=chat._rank_lost)
    thread.start()
    until(lambda: timers == [(2, os._exit, (EXIT_GPU_LOST,))])
    held.set()
    thread.join()
