"""Addresses as people write them, and answers that are whole although their connection does not end well."""

import time
from dataclasses import replace

import pytest

from llama2_chat.remote import RemoteModel
from tests.support.odd_server import HEAD, LAST, event, packet, reset, silence
from tests.support.remote import OFTEN, behind, read


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_end_at_any_part_of_its_path(settings, odd, path):
    with behind(settings, odd.url + path) as model:
        assert model.status.model == "odd"
        assert read(model)[0] == "Hello!"


def test_a_scheme_in_capitals_is_still_an_address(settings, odd):
    """huggingface_hub takes what does not begin with http:// for a model's name, and asks huggingface.co."""
    with behind(settings, odd.url.replace("http", "HTTP")) as model:
        assert read(model)[0] == "Hello!"


def test_servers_are_named_by_host_and_path_without_a_password_and_each_once(settings):
    urls = "http://name:secret@gpus/one/v1,http://gpus:8000/two/,http://gpus:8000/two/v1/chat/completions"
    servers = RemoteModel(replace(settings, inference_url=urls)).servers
    assert [server.name for server in servers] == ["gpus/one", "gpus:8000/two"]


ENDINGS = {
    "cut": [reset],
    "silent": [silence],
    "kept open": [*[packet(b": waiting\n\n"), 0.05] * 200],
    "DONE without a space": [packet(b"data:[DONE]\n\n"), LAST],
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_whole_answer_stays_whole_when_the_connection_does_not_end_well(settings, odd, ending):
    odd.answer = [HEAD, event("All of it.", "stop"), *ENDINGS[ending]]
    with behind(settings, odd, timeouts=replace(OFTEN, usage_s=0.2)) as model:
        began = time.monotonic()
        text, reply = read(model)
        assert (text, reply.finish_reason, reply.usage.completion_tokens) == ("All of it.", "stop", 1)
        assert time.monotonic() - began < 8
