"""One client who asks for all there is leaves everybody else their share, and cannot pass for many."""

from dataclasses import replace

import httpx
import pytest

from llama2_chat.server.limits import one_client
from llama2_chat.settings import CLIENT_LIMIT, Settings
from tests.support.programs import HELLO
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving


def clients(settings, headers):
    """As whom the model is asked from two of this machine's addresses, with these headers."""
    chat = ScriptedChat()
    with serving(chat, settings) as address:
        for source in ("127.0.0.1", "127.0.0.2"):
            transport = httpx.HTTPTransport(local_address=source)
            with httpx.Client(base_url=address, transport=transport, headers=headers) as http:
                assert http.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200
    return [params.client for _, params in chat.asked]


def test_nobody_is_believed_who_says_that_they_come_from_elsewhere(settings):
    # From the server's own machine anyone could be any number of clients.
    assert clients(settings, {"X-Forwarded-For": "192.0.2.1"}) == ["127.0.0.1", "127.0.0.2"]


def test_a_proxy_that_is_named_is_believed(settings):
    behind = replace(settings, trusted_proxies="127.0.0.1")
    assert clients(behind, {"X-Forwarded-For": "192.0.2.1"}) == ["192.0.2.1", "127.0.0.2"]


def test_a_key_is_a_client_that_shows_nobody_the_key(settings):
    found = clients(replace(settings, api_keys=("one",)), {"Authorization": "Bearer one"})
    assert found[0] == found[1]
    assert "one" not in found[0]


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("testclient", "testclient"),
    ],
)
def test_all_addresses_of_one_household_are_one_client(host, client):
    assert one_client(host) == client


@pytest.mark.parametrize(
    ("argv", "environ", "limit"),
    [
        ([], {}, None),
        (["--host", "0.0.0.0"], {}, CLIENT_LIMIT),
        (["--https"], {}, CLIENT_LIMIT),
        (["--host", "0.0.0.0", "--client-limit", "0"], {}, 0),
        ([], {"SPACE_ID": "someone/llama"}, None),
        ([], {"SPACE_ID": "someone/llama", "TRUSTED_PROXIES": "10.0.0.0/8"}, CLIENT_LIMIT),
        (["--client-limit", "3"], {}, 3),
    ],
)
def test_whoever_serves_others_has_a_limit_for_each_client(argv, environ, limit):
    assert Settings.read(argv, environ).client_limit == limit
