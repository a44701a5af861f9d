"""Answers that a program asks to go on with, in vLLM's words."""

import httpx
import pytest

from tests.support.programs import HELLO, ask, error, whole_reply

GO_ON = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def unfinished(chat):
    """A conversation whose answer was cut off, and the text of the rest."""
    whole = whole_reply(chat, HELLO, max_new_tokens=8)
    first = whole_reply(chat, HELLO, max_new_tokens=3)
    return [*HELLO, {"role": "assistant", "content": first}], whole.removeprefix(first)


def text(answer):
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [GO_ON, {"continue_final_message": True}], ids=["both fields", "one field"])
def test_a_program_gets_what_follows_its_text_and_nothing_of_the_text(http, chat, unfinished, fields):
    messages, rest = unfinished
    answer = ask(http, messages=messages, max_tokens=5, **fields)
    assert text(answer) == rest
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(chat.encode(messages)), 5)
    counted = http.post("/tokenize", json={"messages": messages, **fields})
    assert counted.json()["count"] == usage["prompt_tokens"]


def test_an_empty_answer_is_gone_on_with_from_its_beginning(http, chat):
    messages = [*HELLO, {"role": "assistant", "content": ""}]
    answer = ask(http, messages=messages, max_tokens=8, **GO_ON)
    assert text(answer) == whole_reply(chat, HELLO, max_new_tokens=8)


def test_without_the_field_a_conversation_ends_with_the_user(http, unfinished):
    for fields in ({}, {"continue_final_message": False}, {"add_generation_prompt": True}):
        answer = ask(http, messages=unfinished[0], **fields)
        assert (answer.status_code, error(answer)["param"]) == (400, "messages")
        assert "set continue_final_message to true" in error(answer)["message"]
    assert http.post("/tokenize", json={"messages": unfinished[0]}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (GO_ON, "messages that end with one of the assistant"),
        ({"add_generation_prompt": False}, "must be true where add_generation_prompt is false"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt false only"),
        ({"continue_final_message": "yes"}, "valid boolean"),
    ],
    ids=["ends with the user", "no prompt", "both", "no boolean"],
)
def test_fields_that_do_not_go_with_the_messages_are_refused(http, fields, sentence):
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = http.post(path, json={"messages": HELLO, **fields})
        assert (answer.status_code, error(answer)["param"]) == (400, "continue_final_message")
        assert sentence in error(answer)["message"]


def test_an_answer_that_has_begun_cannot_be_made_json(http, unfinished):
    answer = ask(http, messages=unfinished[0], response_format={"type": "json_object"}, **GO_ON)
    assert (answer.status_code, error(answer)["param"]) == (400, "response_format")
    assert "has begun" in error(answer)["message"]
