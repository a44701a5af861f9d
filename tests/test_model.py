"""What ChatModel and its replies promise: text as soon as it is whole, a model that is free when a reader leaves."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llama2_chat import prompt
from llama2_chat.engine.reply import StreamedReply
from llama2_chat.errors import Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.types import SamplingParams, Usage
from model import ChatModel
from tests.support.serving import busy

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
ENDLESS = SamplingParams(temperature=1, max_new_tokens=4000, seed=1)


ENGINE = SimpleNamespace(cancel=lambda request: None)  # for replies whose ids a test puts in


def user(text):
    return [{"role": "user", "content": text}]


def reply_of(tokenizer, text, stop=()):
    """A finished reply whose ids are those of a given text, to see how it is cut into pieces."""
    reply = StreamedReply(tokenizer, ENGINE, stop, Usage())
    reply.request = SimpleNamespace(finish_reason="length", cached_tokens=0)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        reply.put(torch.tensor([token]))
    reply.end()
    return reply


def test_streamed_pieces_join_to_the_text_generate_returns(chat_float32, loaded_float32):
    messages = user("Write one sentence about llamas, with an emoji and a word of Japanese.")
    ids = prompt.encode(chat_float32.serving.tokenizer, messages)
    with torch.inference_mode():
        whole = loaded_float32.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    expected = chat_float32.serving.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
    with chat_float32.stream_reply(messages, GREEDY) as reply:
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
def test_every_character_shows_at_once_and_whole(chat_float32, text):
    pieces = list(reply_of(chat_float32.serving.tokenizer, text))
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


def test_a_character_cut_off_by_the_limit_shows_as_a_replacement_character(chat_float32):
    reply = reply_of(chat_float32.serving.tokenizer, "")
    reply.text_queue.get()
    first_byte = chat_float32.serving.tokenizer("😱", add_special_tokens=False)["input_ids"][0]
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
def test_a_stop_string_ends_the_answer_and_is_never_shown(chat_float32, text, stop, shown):
    reply = reply_of(chat_float32.serving.tokenizer, text, stop)
    assert "".join(reply) == shown
    assert reply.finish_reason == ("stop" if shown != text else "length")


def test_a_stop_string_frees_the_model(chat_float32):
    messages = user("Count from one to a thousand, one number per line.")
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=1000, stop=["\n"])
    with chat_float32.stream_reply(messages, params) as reply:
        assert "\n" not in "".join(reply)
    assert reply.finish_reason == "stop"
    assert reply.usage.completion_tokens < 1000


def test_usage_and_timing_say_what_the_answer_cost(chat_float32):
    messages = user("Say hello to the llama in the garden.")
    with chat_float32.stream_reply(messages, GREEDY) as reply:
        text = "".join(reply)
    assert reply.usage.prompt_tokens == len(prompt.encode(chat_float32.serving.tokenizer, messages))
    assert 0 < reply.usage.completion_tokens <= 40
    assert reply.usage.dropped_messages == 0
    assert reply.timing.time_to_first_token_s > 0
    assert reply.timing.tokens_per_second > 0
    more = [*messages, {"role": "assistant", "content": text}, *user("And goodbye.")]
    with chat_float32.stream_reply(more, GREEDY) as reply:
        next(reply)
    assert reply.usage.cached_tokens > len(prompt.encode(chat_float32.serving.tokenizer, messages)) - 8


def test_an_async_reader_gets_the_same_text(chat_float32):
    async def read():
        async with chat_float32.stream_reply(user("Name three colours."), GREEDY) as reply:
            return "".join([piece async for piece in reply])

    with chat_float32.stream_reply(user("Name three colours."), GREEDY) as reply:
        assert asyncio.run(read()) == "".join(reply)


def test_no_thread_waits_on_behalf_of_a_reader(chat_float32):
    async def read_together():
        replies = [chat_float32.stream_reply(user(f"Say {n}."), ENDLESS) for n in range(40)]
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


def test_closing_the_stream_frees_the_model_for_the_next_question(chat_float32):
    with chat_float32.stream_reply(user("Tell me a very long story."), ENDLESS) as endless:
        next(endless)
    assert endless.finish_reason == "cancelled"
    with chat_float32.stream_reply(user("Say hi."), GREEDY) as reply:
        assert "".join(reply)
    assert reply.finish_reason in ("stop", "length")


def test_close_from_another_thread_wakes_a_reader_and_may_be_called_twice(chat_float32):
    with busy(chat_float32, user("Tell me a very long story."), ENDLESS):
        waiting = chat_float32.stream_reply(user("Say hi."), GREEDY)
        assert waiting.queue_position == 1
        threading.Timer(0.2, waiting.close).start()
        assert list(waiting) == []
        waiting.close()
        assert waiting.finish_reason == "cancelled"


def test_close_wakes_an_async_reader(chat_float32):
    async def read():
        waiting = chat_float32.stream_reply(user("Say hi."), GREEDY)
        threading.Timer(0.2, waiting.close).start()
        return [piece async for piece in waiting], waiting.finish_reason

    with busy(chat_float32, user("Tell me a very long story."), ENDLESS):
        assert asyncio.run(read()) == ([], "cancelled")


def test_closing_after_the_end_changes_nothing(chat_float32):
    reply = chat_float32.stream_reply(user("Say hi."), GREEDY)
    text = "".join(reply)
    reason = reply.finish_reason
    reply.close()
    assert text
    assert reply.finish_reason == reason


def test_an_error_while_generating_reaches_the_reader_after_the_text_before_it(chat_float32, loaded_float32, caplog):
    reply = chat_float32.stream_reply(user("Tell me a very long story."), ENDLESS)
    next(reply)

    def fail(*_):
        raise RuntimeError("a secret detail")

    hook = loaded_float32.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ChatError, match="Please try again"):
            list(reply)
    finally:
        hook.remove()
    assert reply.finish_reason == "error"
    with chat_float32.stream_reply(user("Say hi."), GREEDY) as reply:
        assert "".join(reply)


def test_a_conversation_that_grew_too_long_loses_its_oldest_exchanges_and_says_so(chat_float32):
    old = [*user("word " * 3000), {"role": "assistant", "content": "Noted."}] * 3
    with chat_float32.stream_reply([*old, *user("Say hi.")], GREEDY) as reply:
        assert reply.usage.dropped_messages in (2, 4)
        assert reply.usage.prompt_tokens + 40 <= chat_float32.context_length
    with pytest.raises(PromptTooLong, match=r"9,\d\d\d tokens, and 40 more"):
        chat_float32.stream_reply([*old, *user("Say hi.")], GREEDY, trim=False)


def test_refusals_come_from_the_call_itself(chat_float32):
    with pytest.raises(PromptTooLong, match=r"\d,\d\d\d tokens"):
        chat_float32.stream_reply(user("word " * 9000), GREEDY)
    with pytest.raises(ChatError):
        chat_float32.stream_reply([{"role": "wizard", "content": "hi"}], GREEDY)
    with pytest.raises(PromptTooLong, match="8,153 tokens, and 40 more"):
        chat_float32.stream_completion([5] * 8153, GREEDY)


def test_ids_can_be_continued_without_a_chat_format(chat_float32):
    ids = chat_float32.serving.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    with chat_float32.stream_completion(ids, GREEDY) as reply:
        assert "Paris" in "".join(reply)
    assert reply.usage.prompt_tokens == len(ids)


def test_the_line_has_an_end(settings, chat_float32, loaded_float32):
    short = ChatModel(replace(settings, queue_limit=1, max_batch=1)).serve(
        chat_float32.serving.tokenizer, loaded_float32
    )
    with short.stream_reply(user("Tell me a very long story."), ENDLESS) as running:
        next(running)
        with short.stream_reply(user("Hi"), ENDLESS), pytest.raises(Busy):
            short.stream_reply(user("Hi"), ENDLESS)
    short.close()


def test_before_loading_and_after_closing_the_model_says_so(settings, chat_float32, loaded_float32):
    chat = ChatModel(settings)
    assert chat.state == "loading"
    with pytest.raises(ModelUnavailable, match="still loading"):
        chat.stream_reply(user("Hi"), GREEDY)
    chat.serve(chat_float32.serving.tokenizer, loaded_float32)
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


def test_closing_while_loading_stops_the_loading(settings):
    chat = ChatModel(settings)
    chat.close()
    assert chat.load().state == "loading"


class FullGpu(ChatModel):
    def serve(self, tokenizer, loaded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_after_loading_is_said_as_such(settings, chat_model):
    # The operator read "an unexpected error".
    chat = FullGpu(replace(settings, model_id=str(chat_model))).load()
    assert "GPU memory ran out while" in chat.status.error


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
    reply.request = SimpleNamespace(finish_reason="stop", cached_tokens=0)
    for token in ids:
        reply.put(torch.tensor([token]))
    reply.end()
    assert "".join(reply) == "It2\ufffd address here"
