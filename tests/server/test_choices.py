"""Several answers to one request: n of them, and lists of prompts. Each has its index; who leaves frees them all."""

import asyncio
import json
from dataclasses import replace

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.engine.kv_pool import BLOCK_SIZE
from llama2_chat.errors import Busy, ChatError
from llama2_chat.server.choices import Choices
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.types import Usage
from tests.support.programs import HELLO, LIKELIEST, ask, error, freed, raw
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.waiting import until


class Prompts(ScriptedChat):
    """Goes on with an id as that id says: so many pieces, each its number."""

    def __init__(self, fails_at=None, error=None):
        super().__init__()
        self.replies, self.fails_at, self.error = [], fails_at, error

    def stream_completion(self, input_ids, params, *, to_the_end=False):
        if len(self.replies) == self.fails_at:
            raise self.error
        self.asked.append((input_ids, params))
        self.replies.append(Scripted(*[str(input_ids[-1])] * input_ids[-1]))
        return self.replies[-1]

    def encode_text(self, text):
        return [1, len(text)]

    def decode(self, input_ids):
        return "".join(f"<{id}>" for id in input_ids)


@pytest.fixture
def chat_of_prompts():
    return Prompts()


def served(chat, settings):
    app = FastAPI()
    app.include_router(api_router(chat, settings, ConcurrencyLimiter(settings.client_limit), Metrics(chat)))
    return TestClient(app, base_url="http://localhost")


@pytest.fixture
def programs(chat_of_prompts, settings):
    return served(chat_of_prompts, settings)


def complete(http, **fields):
    return http.post("/v1/completions", json={"prompt": [[2], [3], [1]], **fields})


def streamed(answer):
    """The text of each choice, put together of its pieces, and the indices in the order of their ends."""
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    texts, ended = {}, []
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ended += [choice["index"]] if choice["finish_reason"] else []
    return [text for _, text in sorted(texts.items())], ended


PROMPTS = {
    "ids": ([5, 2], ["22"]),
    "lists of ids": ([[2], [3], [1]], ["22", "333", "1"]),
    "texts": (["ab", "abc"], ["22", "333"]),
    "both": (["ab", [3]], ["22", "333"]),
    "one text": (["ab"], ["22"]),
}


@pytest.mark.parametrize(("prompt", "texts"), PROMPTS.values(), ids=PROMPTS)
def test_each_prompt_of_a_list_has_its_answer(programs, prompt, texts):
    answer = complete(programs, prompt=prompt).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [*enumerate(texts)]
    assert streamed(complete(programs, prompt=prompt, stream=True))[0] == texts


def test_several_answers_to_several_prompts_stand_prompt_by_prompt_and_a_prompt_counts_once(programs):
    answer = complete(programs, n=2, best_of=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["22", "22", "333", "333", "1", "1"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3 * 20, 2 * (2 + 3 + 1))
    stream = complete(programs, n=2, stream=True, stream_options={"include_usage": True})
    assert streamed(stream)[0] == ["22", "22", "333", "333", "1", "1"]
    assert sorted(streamed(stream)[1]) == [0, 1, 2, 3, 4, 5]
    assert json.loads(stream.text.splitlines()[-4][6:])["usage"] == usage


def test_each_answer_has_the_next_seed(programs, chat_of_prompts):
    complete(programs, prompt=[[2], [3]], n=2, seed=2**63 - 1)
    assert [params.seed for _, params in chat_of_prompts.asked] == [2**63 - 1, 0] * 2
    complete(programs, n=2)
    assert [params.seed for _, params in chat_of_prompts.asked[4:]] == [None] * 6


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_the_prompt_stands_before_its_answers_if_it_is_to_be_echoed(programs, stream):
    answer = complete(programs, prompt=["ab", [7, 1]], n=2, echo=True, stream=stream)
    texts = streamed(answer)[0] if stream else [choice["text"] for choice in answer.json()["choices"]]
    assert texts == ["ab22", "ab22", "<7><1>1", "<7><1>1"]


@pytest.mark.parametrize("refusal", [Busy("Full."), ChatError("Not this id.")], ids=["busy", "bad"])
def test_if_one_answer_is_refused_none_begins(settings, refusal):
    chat = Prompts(fails_at=2, error=refusal)
    answer = complete(served(chat, settings))
    assert (answer.status_code, error(answer)["message"]) == (429 if isinstance(refusal, Busy) else 400, str(refusal))
    assert [reply.finish_reason for reply in chat.replies] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_if_one_answer_fails_all_end(settings, stream):
    chat = Prompts()
    chat.stream_reply = lambda *_, **__: (
        chat.replies.append(Scripted("Well", error=ChatError("Out of memory.") if len(chat.replies) == 1 else None))
        or chat.replies[-1]
    )
    answer = ask(served(chat, settings), n=2, stream=stream)
    assert "Out of memory." in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert all(reply.finish_reason for reply in chat.replies)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", 0), ("n", 9), ("best_of", 2)),
        *(("prompt", each) for each in ([], [[]], ["a", ""], ["a", 5], [[1, "a"]], ["a"] * 65, {"a": 1})),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_by_name(programs, field, value):
    answer = complete(programs, **{field: value})
    assert (answer.status_code, error(answer)["param"]) == (400, field)


def test_64_answers_are_the_most_of_one_request(programs):
    assert len(complete(programs, prompt=[[1]] * 8, n=8).json()["choices"]) == 64
    assert error(complete(programs, prompt=[[1]] * 9, n=8))["param"] == "prompt"


def test_a_clients_limit_counts_each_answer(settings, chat_of_prompts):
    limited = served(chat_of_prompts, replace(settings, client_limit=2))
    assert complete(limited, prompt=[5, 1], n=2).status_code == 200
    assert error(complete(limited))["message"].startswith("This asks for 3 answers at once, and 2 are allowed")
    limiter = ConcurrencyLimiter(3)
    with limiter.slot("me", 2):
        with pytest.raises(Busy, match="You have 2 answers on their way, and only 1 more"), limiter.slot("me", 2):
            pass
        with limiter.slot("you", 3), limiter.slot("me"):
            pass


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_reader_who_leaves_frees_all_answers(address, chat, stream):
    with raw(address, n=3, stream=stream):
        until(lambda: chat.occupancy.running == 3)
    freed(chat)


def test_the_first_of_several_answers_is_the_one_alone_and_a_seed_gives_all_again(client, chat):
    fields = {"model": chat.status.model, "messages": HELLO, "max_tokens": 3, "seed": 4, "temperature": 1}
    alone = client.chat.completions.create(**fields).choices[0].message.content
    several = client.chat.completions.create(**fields, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert texts[0] == alone
    assert len(set(texts)) > 1
    assert several.usage.completion_tokens == 9
    stream = client.chat.completions.create(**fields, n=3, stream=True)
    pieces = [(chunk.choices[0].index, chunk.choices[0].delta.content or "") for chunk in stream]
    assert ["".join(text for at, text in pieces if at == index) for index in range(3)] == texts


def test_the_prompt_of_several_answers_is_computed_once(chat):
    prompt = [5, 3, 9] * 30
    params = replace(LIKELIEST, max_new_tokens=1)
    with chat.serving.engine.paused():
        replies = [chat.stream_completion(prompt, params) for _ in range(3)]
    for reply in replies:
        list(reply)
    assert [reply.usage.cached_tokens for reply in replies[1:]] == [BLOCK_SIZE] * 2


def test_ids_become_text_again(http, small):
    text = "a <|im_end|> 😱"
    ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    end = small.serving.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert http.post("/detokenize", json={"tokens": [end], "model": "small"}).json() == {"prompt": "<|im_end|>"}
    for tokens in ([10**9], [-1], ["a"], "a", [True]):
        assert http.post("/detokenize", json={"tokens": tokens}).status_code == 400
    assert http.post("/detokenize", json={"tokens": ids, "model": "other"}).status_code == 404


def test_a_program_that_asks_for_moderation_is_told_that_there_is_none(client):
    with pytest.raises(openai.NotFoundError, match="There is no POST /v1/moderations here"):
        client.moderations.create(input="Hello")


# ---- Reading ----


class Patient(Scripted):
    """Ends when it is told to."""

    def __init__(self, *pieces):
        self.go_on = asyncio.Event()
        super().__init__(*pieces)

    async def __anext__(self):
        await self.go_on.wait()
        return await super().__anext__()


def test_a_heartbeat_loses_no_piece_and_a_slow_answer_holds_up_no_other():
    async def read():
        slow, quick = Patient("slow"), Scripted("a", "b")
        found = []
        async with Choices([slow, quick]) as choices:
            while len(found) < 5:
                try:
                    async with asyncio.timeout(0.01):
                        found.append(await anext(choices))
                except TimeoutError:
                    slow.go_on.set()
        return found

    assert asyncio.run(read()) == [(1, "a"), (1, "b"), (1, None), (0, "slow"), (0, None)]


def test_choices_are_as_bad_as_the_worst_of_them():
    for reasons, worst in [("stop length", "length"), ("stop cancelled", "cancelled"), ("cancelled error", "error")]:
        replies = [Scripted() for _ in reasons.split()]
        for reply, reason in zip(replies, reasons.split(), strict=True):
            reply.finish_reason = reason
        assert Choices(replies).finish_reason == worst
    replies[0].finish_reason, replies[1].finish_reason = None, "stop"
    assert Choices(replies).finish_reason is None
    assert Choices(replies).usage == Usage()
