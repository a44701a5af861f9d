"""What a start with HTTPS prints for whoever opens the page on another device."""

import pytest
import segno

from llama2_chat.server import announcement as announcements
from llama2_chat.server.announcement import announcement, qr_code, urls
from llama2_chat.server.certificate import own_certificate
from tests.support.certificates import local, openssl


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("0.0.0.0", ["https://192.168.7.7:7860", "https://llama.local:7860", "https://llama:7860"]),
        (
            "::",
            ["https://192.168.7.7:7860", "https://[fd00::7]:7860", "https://llama.local:7860", "https://llama:7860"],
        ),
        ("127.0.0.1", ["https://127.0.0.1:7860"]),
        ("::1", ["https://[::1]:7860"]),
        ("192.168.7.7", ["https://192.168.7.7:7860"]),
        ("fd00:0::7", ["https://[fd00:0::7]:7860"]),
        ("203.0.113.9", ["https://llama.local:7860", "https://llama:7860"]),  # which the certificate does not have
    ],
)
def test_the_urls_are_those_that_other_devices_can_open(folder, host, expected):
    assert urls(local(folder)(), host, 7860) == expected


def test_the_announcement_has_all_that_another_device_needs(folder):
    text = announcement(local(folder)(), "0.0.0.0", 7860)
    shown = openssl("x509", "-in", folder / "ca.crt", "-noout", "-fingerprint", "-sha256").stdout
    assert shown.strip().partition("=")[2] in text
    assert "https://192.168.7.7:7860/ca.crt" in text
    for platform in ("Windows", "macOS", "iPhone", "full trust", "Android", "Debian", "Firefox", "Chrome on Linux"):
        assert platform in text


@pytest.mark.parametrize("host", ["203.0.113.9", "llama.example", "0.0.0.0"])
def test_an_address_that_no_certificate_made_here_is_good_for_is_named(folder, host, monkeypatch):
    monkeypatch.setattr(announcements, "own_addresses", lambda: ["203.0.113.9", "192.168.7.7", "2001:db8::9"])
    left_out = "203.0.113.9" if host == "0.0.0.0" else host
    assert f"Not in the certificate: {left_out}. " in announcement(local(folder)(), host, 7860)
    assert "Not in the certificate" not in announcement(local(folder)(), "192.168.7.7", 7860)


def test_the_announcement_of_ones_own_certificate_asks_nobody_to_trust_a_ca(own):
    assert "ca.crt" not in announcement(own_certificate(own / "server.crt", own / "server.key"), "0.0.0.0", 7860)


def test_the_qr_code_in_the_terminal_is_the_one_that_was_meant():
    above, below = {"█": 0, "▀": 0, "▄": 1, " ": 1}, {"█": 0, "▀": 1, "▄": 0, " ": 1}
    shown = []
    for line in qr_code("https://192.168.7.7:7860").splitlines():
        shown += [[above[block] for block in line], [below[block] for block in line]]
    meant = [list(row) for row in segno.make("https://192.168.7.7:7860", error="l", micro=False).matrix_iter(border=2)]
    assert shown[: len(meant)] == meant
