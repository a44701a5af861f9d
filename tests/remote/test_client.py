"""HTTP as servers send it, whole and in crumbs, and what is sent to them."""

import pytest

from llama2_chat.remote import faults
from tests.support.odd_server import BARE_HEAD, DONE, event, words
from tests.support.remote import behind, read


def test_letters_that_end_lines_elsewhere_arrive_whole(settings, odd):
    """httpx2 takes U+2028 and U+0085 for ends of lines, in the middle of the server's JSON."""
    odd.answer = words("a\u2028b\u0085", "\u2029c")
    with behind(settings, odd) as model:
        assert read(model)[0] == "a\u2028b\u0085\u2029c"


@pytest.mark.parametrize("at_once", [1, 7], ids=["byte by byte", "in sevens"])
def test_a_stream_in_crumbs_is_read_all_the_same(settings, odd, at_once):
    whole = b"".join(
        [BARE_HEAD, *(part.split(b"\r\n", 1)[1][:-2] for part in [event("Hé"), event("🦙", "stop"), *DONE])]
    )
    odd.answer = [whole[i : i + at_once] for i in range(0, len(whole), at_once)]
    with behind(settings, odd) as model:
        assert read(model)[0] == "Hé🦙"


def test_only_our_own_key_is_sent_to_a_server(settings, odd, monkeypatch):
    """huggingface_hub would send this machine's token for the Hub to whoever INFERENCE_URL names."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with behind(settings, odd) as model:
        read(model)
        assert "authorization" not in odd.headers
    with behind(settings, odd, inference_key="ours") as model:
        read(model)
        assert odd.headers["authorization"] == "Bearer ours"


def test_a_server_that_redirects_does_not_pass_the_key_on(settings, odd, other):
    odd.probe = [f"HTTP/1.1 307 Go\r\nLocation: {other.url}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n".encode()]
    with behind(settings, odd, inference_key="ours") as model:
        assert model.status.error == faults.NO_API
    assert not other.headers
