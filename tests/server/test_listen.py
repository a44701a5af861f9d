"""What a start says about the address that it serves. That a taken port is refused is in test_check.py."""

import logging
import socket
from dataclasses import replace

import pytest

from llama2_chat.server.listen import announce, open_listener
from llama2_chat.settings import Settings


@pytest.fixture
def said(caplog):
    """What announce() logs for these settings."""
    caplog.set_level(logging.INFO, "llama2_chat")

    def said(**settings):
        settings = Settings(port=0, **settings)
        with open_listener(replace(settings, host="127.0.0.1")) as listener:
            announce(settings, listener, None)
            return caplog.text.replace(str(listener.getsockname()[1]), "PORT")

    return said


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, "http://127.0.0.1:PORT/"),
        ({"host": "::1"}, "http://[::1]:PORT/"),
        ({"root_path": "/chat"}, "http://127.0.0.1:PORT/chat/"),
    ],
)
def test_the_start_says_where_the_page_is(said, settings, address):
    assert f"The page is at {address}\n" in said(**settings)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_keys": ("key",)}, False),
        ({"host": "127.0.0.1"}, False),
    ],
)
def test_a_start_that_opens_the_model_to_the_network_says_so(said, settings, warns):
    assert ("without a key" in said(**settings)) is warns


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "reached"), [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])])
def test_the_page_can_be_served_over_ipv6(host, reached):
    with open_listener(Settings(host=host, port=0)) as listener:
        for address in reached:
            socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()
