"""Gradio's /chat, as gradio_client and other programs use it."""

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from llama2_chat.errors import ChatError
from llama2_chat.page.programs import conversation
from tests.support.browser import SHORT
from tests.support.scripted import spy
from tests.support.tool_users import QUESTION as TOOL_QUESTION
from tests.support.tool_users import computing


def test_programs_get_the_answer_alone_and_the_server_remembers_their_conversation(address, chat, monkeypatch):
    asked = spy(chat, monkeypatch)
    client = Client(address, verbose=False)
    first = client.predict("Say one word.", api_name="/chat", max_new_tokens=4, system_prompt="Be brief.")
    client.predict("And another.", api_name="/chat", max_new_tokens=4, system_prompt="")
    assert isinstance(first, str)
    assert asked == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say one word."}],
        [
            {"role": "user", "content": "Say one word."},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And another."},
        ],
    ]


@pytest.mark.slow
def test_a_program_can_let_the_model_use_tools_and_gets_the_answer_alone(perform):
    client = Client(perform(computing()), verbose=False)
    assert client.predict(TOOL_QUESTION, api_name="/chat", use_tools=True) == "It is 36."
    assert client.predict("Hi", api_name="/chat").startswith("{")  # which no agent read


def test_a_refused_question_is_not_remembered(address, chat, monkeypatch):
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match="maximum context length"):
        client.predict("word " * 20_000, api_name="/chat", max_new_tokens=4, system_prompt="")
    asked = spy(chat, monkeypatch)
    client.predict("Say one word.", api_name="/chat", max_new_tokens=4, system_prompt="")
    assert asked == [[{"role": "user", "content": "Say one word."}]]


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 99}, {"top_p": 0}, {"top_k": "many"}, {"max_new_tokens": None}, {"seed": "-1"}],
    ids=lambda setting: next(iter(setting)),
)
def test_programs_get_a_sentence_for_a_setting_out_of_range(address, setting):
    with pytest.raises(AppError, match=f"{next(iter(setting))} must be a"):
        Client(address, verbose=False).predict(SHORT, api_name="/chat", **setting)


def test_not_a_number_is_refused_in_words(address):
    asked = httpx.post(
        f"{address}gradio_api/call/chat",
        content=f'{{"data": ["{SHORT}", "", 8, NaN, 0.9, 50, 1.1, "", false, 5]}}',
        headers={"Content-Type": "application/json"},
    )
    answer = httpx.get(f"{address}gradio_api/call/chat/{asked.json()['event_id']}")
    assert "temperature must be a number from 0 to 5; it was nan." in answer.text


def test_chat_is_the_only_endpoint_that_programs_see(address):
    assert list(Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "x"},
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "file", "file": {"path": "/etc/passwd"}}]},
        {"role": "user", "content": None},
        {},
    ],
    ids=["unknown role", "system in the middle", "a file", "nothing", "empty"],
)
def test_a_history_that_no_chat_can_have_is_refused_in_words(turn):
    with pytest.raises(ChatError):
        conversation("Now", [turn], None)


def test_the_system_prompt_comes_first_and_an_empty_one_is_left_out():
    assert conversation("Hi", [], "Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert conversation("Hi", [], "") == [{"role": "user", "content": "Hi"}]
    assert conversation("{{today}}", [], "{{today}}")[0]["content"] != "{{today}}"


@pytest.mark.parametrize("message", ["", " \n", None, ["Hi"]])
def test_a_message_without_words_is_asked_for_again(message):
    with pytest.raises(ChatError, match="type a message"):
        conversation(message, [], None)
