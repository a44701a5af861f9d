"""What a visitor reads names no folder of this machine; the log does."""

import json

import httpx
import pytest

from llama2_chat.errors import ModelUnavailable, without_folders
from llama2_chat.page.wording import status_line
from llama2_chat.server.preflight import run_probe
from llama2_chat.server.probes import PlannedStart
from llama2_chat.settings import Settings
from model import ChatModel
from tests.support.serving import serving
from tests.support.small_chat_model import save_chat_model


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("There is no folder /x/y. Check the path.", "There is no folder y. Check the path."),
        ("There is no folder '/x/my models/y'. Check.", "There is no folder y. Check."),
        ("Delete ~/.cache/llama2-chat/SmolLM2-135M-Instruct.", "Delete SmolLM2-135M-Instruct."),
        ("'~/my models/' holds no config.json", "my models holds no config.json"),
        ("cannot import name 'x' (/usr/lib/python3/site-packages/y.py)", "cannot import name 'x' (y.py)"),
        (
            "/a/b needs 1.0 GB more on disk and /c/d has 0.5 GB free.",
            "b needs 1.0 GB more on disk and d has 0.5 GB free.",
        ),
    ],
)
def test_of_a_path_a_visitor_reads_the_last_part(sentence, shown):
    error = ModelUnavailable(sentence)
    assert (str(error), error.detail) == (shown, sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "meta-llama/Llama-2-7b-chat-hf is gated. Accept its licence at https://hf.co/meta-llama/Llama-2-7b-chat-hf.",
        "Make a new one at https://hf.co/settings/tokens.",
        "The server http://127.0.0.1:8000/v1 has no model; http://[::1]/v1 has one.",
        "'not an id' is neither a folder here nor an id on the Hub, which looks like owner/name.",
        "Its template strips <think> and </think>, [INST] and [/INST], <<SYS>> and <</SYS>>.",
        "5 tokens/s, 1 / 2, and/or ../models/x",
    ],
)
def test_what_is_no_path_of_the_machine_stays(sentence):
    assert without_folders(sentence) == sentence


def no_folder(place):
    return {"model_id": str(place)}


def no_model(place):
    place.mkdir(parents=True)
    return {"model_id": str(place)}


def no_weights(place):
    (save_chat_model(place) / "model.safetensors").unlink()
    return {"model_id": str(place)}


def odd_ending(place):
    save_chat_model(place)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    return {"model_id": str(place)}


def damaged(place):
    save_chat_model(place)
    (place / "model.safetensors").write_bytes(b"x" * 100)
    return {"model_id": str(place)}


def no_base(place):
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{place}/of an adapter"}))
    return {"model_id": str(place)}


def no_cache(place):
    place.parent.mkdir(parents=True)
    place.touch()
    return {"cache_dir": place / "cache"}


@pytest.fixture
def place(tmp_path):
    """Not yet there, and with blanks in its name."""
    return tmp_path / "7q9x of a user" / "the last part"


def leaks(place, *texts):
    return [text for text in texts if "7q9x" in text or str(place.parents[1]) in text]


@pytest.mark.parametrize(
    "trouble",
    [no_folder, no_model, no_weights, odd_ending, damaged, no_base, no_cache],
    ids=lambda trouble: trouble.__name__,
)
def test_a_start_that_fails_tells_where_in_the_log_and_in_check_and_nowhere_else(place, caplog, trouble):
    settings = Settings(**trouble(place))
    chat = ChatModel(settings).load()
    assert chat.state == "failed"
    assert leaks(place, chat.status.error, status_line(chat.status)) == []
    assert str(place) in caplog.text
    found = [run_probe(name, PlannedStart(settings)) for name in ("model", "tokenizer", "disk")]
    assert str(place) in str([each for each in found if each.ok is False])


def test_no_route_tells_where_a_model_was_looked_for(place):
    # "There is no folder /home/somebody/models/llama", read every visitor.
    settings = Settings(**no_folder(place))
    chat = ChatModel(settings).load()
    with serving(chat, settings) as address, httpx.Client(base_url=address) as client:
        asked = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        seen = [client.get(path).text for path in ("/", "/config", "/healthz", "/v1/models", "/metrics")]
    assert asked.status_code == 503
    assert "There is no folder the last part." in asked.text
    assert leaks(place, asked.text, *seen) == []
