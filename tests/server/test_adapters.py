"""Programs choose an adapter by the name of the model; the names are those of ADAPTERS."""

import json
from dataclasses import replace

import httpx
import openai
import pytest

from model import ChatModel
from tests.support.adapters import in_settings, save_four
from tests.support.programs import HELLO, LIKELIEST
from tests.support.serving import serving

NAMES = ["small", "queries", "all", "scaled", "patterns"]


@pytest.fixture(scope="module")
def adapted(chat_model, settings, tmp_path_factory):
    """The address of a start with four adapters."""
    folders = save_four(chat_model, tmp_path_factory.mktemp("adapters"))
    settings = replace(
        settings, model_id=str(chat_model), model_name="small", adapters=in_settings(folders), sampling=LIKELIEST
    )
    chat = ChatModel(settings).load()
    assert chat.state == "ready", chat.status.error
    with serving(chat, settings) as address:
        yield address
    chat.close()


@pytest.fixture(scope="module")
def programs(adapted):
    with openai.OpenAI(base_url=f"{adapted}v1", api_key="none", max_retries=0) as programs:
        yield programs


def said(programs, model):
    answer = programs.chat.completions.create(model=model, messages=HELLO, max_tokens=6)
    assert answer.model == model
    return answer.choices[0].message.content


def test_the_list_of_models_names_the_base_and_its_adapters(programs):
    models = programs.models.list().data
    assert [model.id for model in models] == NAMES
    assert [getattr(model, "parent", None) for model in models] == [None, *["small"] * 4]
    assert programs.models.retrieve("all").id == "all"


def test_a_program_gets_the_answer_of_the_adapter_that_it_names_as_its_model(programs):
    answers = [said(programs, model) for model in NAMES]
    assert len(set(answers)) == len(NAMES)
    assert [said(programs, model) for model in ("scaled", "small")] == [answers[3], answers[0]]
    chunks = programs.chat.completions.create(model="all", messages=HELLO, max_tokens=6, stream=True)
    pieces = [(chunk.model, chunk.choices[0].delta.content or "") for chunk in chunks]
    assert {model for model, _ in pieces} == {"all"}
    assert "".join(text for _, text in pieces) == answers[2]


def test_the_other_routes_take_an_adapters_name_too(programs, adapted):
    def completed(model):
        return programs.completions.create(model=model, prompt="Hello", max_tokens=6).choices[0].text

    def responded(model):
        return programs.responses.create(model=model, input="Hello", max_output_tokens=6).output_text

    for route in (completed, responded):
        assert len({route(model) for model in NAMES[:3]}) == 3
    tokens = [httpx.post(f"{adapted}tokenize", json={"model": name, "prompt": "Hi"}).json()["tokens"] for name in NAMES]
    assert tokens == [tokens[0]] * len(NAMES)


def test_the_page_is_told_of_an_adapter_that_is_not_here_and_the_message_goes_back(adapted):
    settings = {"maxNewTokens": 6, "temperature": 0, "topP": 0.9, "topK": 50, "repetitionPenalty": 1, "adapter": "gone"}
    body = {"messages": [{"role": "user", "content": "Hi"}], "settings": settings}
    with httpx.Client(base_url=adapted) as http:
        http.get("page/state")
        *_, last = http.put(f"page/answers/{'0' * 32}", json=body).text.splitlines()
    end = json.loads(last)["end"]
    assert end["refused"]
    assert end["error"] == "There is no adapter 'gone' here. Choose another model."


def test_an_unknown_model_is_refused_by_the_names_of_those_that_are_here(programs):
    with pytest.raises(openai.NotFoundError) as refused:
        said(programs, "poems")
    assert refused.value.code == "model_not_found"
    assert "'poems'" in str(refused.value)
    assert "small, queries, all, scaled, patterns" in str(refused.value)
