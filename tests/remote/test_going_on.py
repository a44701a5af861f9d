"""Answers that servers are asked to go on with."""

from dataclasses import replace

import pytest

from llama2_chat.errors import BadGrammar, PromptTooLong
from llama2_chat.remote.faults import CANNOT_GO_ON
from llama2_chat.types import GrammarSpec
from tests.remote.test_question import LONG, picky
from tests.support.odd_server import status, words
from tests.support.remote import HELLO, PARAMS, behind, read

UNFINISHED = [*HELLO, {"role": "assistant", "content": "Hel"}]


def test_a_server_is_told_to_go_on_and_only_then(settings, odd):
    odd.answer = words("lo", "!")
    with behind(settings, odd) as model:
        text, reply = read(model, UNFINISHED)
        read(model)
    first, second = odd.requests
    assert (text, reply.usage.prompt_tokens) == ("lo!", 7)
    assert first["messages"] == UNFINISHED
    assert (first["continue_final_message"], first["add_generation_prompt"]) == (True, False)
    assert not {"continue_final_message", "add_generation_prompt"} & second.keys()


def test_an_empty_answer_is_not_sent(settings, odd):
    with behind(settings, odd) as model:
        read(model, [*HELLO, {"role": "assistant", "content": ""}])
    assert odd.requests[0]["messages"] == HELLO
    assert "continue_final_message" not in odd.requests[0]


@pytest.mark.parametrize(
    "said",
    [
        "Unrecognized request argument supplied: continue_final_message",
        {"loc": ["body", "add_generation_prompt"], "msg": "Extra inputs: add_generation_prompt"},
        "continue_final_message is set but the final message does not appear in the chat after applying the template",
    ],
    ids=["OpenAI", "a strict one", "a template that cuts it"],
)
def test_a_server_that_cannot_go_on_is_a_sentence(settings, odd, said):
    odd.answer = status(400, {"error": said})
    with behind(settings, odd) as model:
        assert str(read(model, UNFINISHED)[1]) == CANNOT_GO_ON
        assert "rejects this request" in str(read(model)[1])  # the same words about another question


@pytest.mark.parametrize("server", ["vLLM", "one without numbers", "this project"])
def test_what_is_left_out_of_a_long_conversation_is_never_the_unfinished_answer(settings, odd, server):
    odd.answer = picky(server)
    with behind(settings, odd) as model:
        text, reply = read(model, [*LONG, *UNFINISHED])
        sent = odd.requests[-1]["messages"]
        assert (text, sent) == ("Hello!", [*LONG, *UNFINISHED][-len(sent) :])
        assert sent[0]["role"] == "user"
        assert reply.usage.dropped_messages == 22 - len(sent)
        odd.answer = picky(server, characters=1)
        endless = [*HELLO, {"role": "assistant", "content": "word " * 1000}]
        error = read(model, [*LONG, *endless])[1]
    assert isinstance(error, PromptTooLong)
    assert odd.requests[-1]["messages"] == endless
    assert "This message and its answer so far are" in str(error)


def test_our_own_refusal_is_read_by_ourselves(settings, odd):
    odd.answer = status(400, {"error": str(PromptTooLong(5000, 4096, 8, subject="message and its answer so far"))})
    with behind(settings, odd) as model:
        error = read(model, UNFINISHED)[1]
    assert (error.prompt_tokens, error.context_length) == (5000, 4096)


def test_an_answer_that_has_begun_cannot_be_held_to_a_schema_there_either(settings, odd):
    with behind(settings, odd) as model, pytest.raises(BadGrammar, match="has begun"):
        model.stream_reply(UNFINISHED, replace(PARAMS, grammar=GrammarSpec("json_schema", '{"type": "object"}')))
