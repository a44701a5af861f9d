"""A certificate of one's own: what serves, and what is refused with a sentence before anybody sees a warning."""

import ssl
from datetime import UTC, datetime

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.server.certificate import own_certificate
from llama2_chat.server.tls import Certificates
from tests.support.certificates import DAY, curl, serving


def test_the_classic_openssl_pair_serves(own):
    with serving(lambda: own_certificate(own / "server.crt", own / "server.key")) as port:
        assert "Hello" in curl("--cacert", own / "server.crt", f"https://localhost:{port}/").stdout


@pytest.mark.parametrize(
    ("certfile", "keyfile", "password"),
    [
        ("server.crt", "secret.key", "open sesame"),
        ("server.crt", "secret_old.key", "open sesame"),
        ("server.crt", "server.key", "not needed"),
        ("key_first.pem", None, None),
        ("key_last.pem", None, None),
    ],
)
def test_an_encrypted_key_and_a_file_that_holds_both_are_taken(own, certfile, keyfile, password):
    certificate = own_certificate(own / certfile, keyfile and own / keyfile, password)
    assert certificate.hosts == ("localhost", "127.0.0.1")
    assert isinstance(Certificates(lambda: certificate).context, ssl.SSLContext)


@pytest.mark.parametrize(
    ("certfile", "keyfile", "password", "later", "sentence"),
    [
        (
            "gone.crt",
            "server.key",
            None,
            0 * DAY,
            r"gone\.crt cannot be read: No such file or directory\. Check its path",
        ),
        ("folder.crt", "server.key", None, 0 * DAY, r"folder\.crt cannot be read: Is a directory"),
        ("server.crt", "gone.key", None, 0 * DAY, r"gone\.key cannot be read"),
        ("server.der", "server.key", None, 0 * DAY, "not a certificate in PEM form.*openssl x509 -inform der"),
        ("server.key", "server.key", None, 0 * DAY, "not a certificate in PEM form"),
        ("server.crt", "server.crt", None, 0 * DAY, r"holds no private key in PEM form.*in --keyfile"),
        ("server.crt", None, None, 0 * DAY, "holds no private key in PEM form"),
        ("server.crt", "other.key", None, 0 * DAY, "is not the key of .*belong together"),
        ("upside_down.crt", "server.key", None, 0 * DAY, r"wrong order\. Put the server's own first"),
        ("server.crt", "secret.key", None, 0 * DAY, "is encrypted.*KEY_PASSWORD"),
        ("server.crt", "secret.key", "open barley", 0 * DAY, "KEY_PASSWORD does not open"),
        ("server.crt", "secret_old.key", "open barley", 0 * DAY, "KEY_PASSWORD does not open"),
        ("server.crt", "server.key", None, 31 * DAY, r"expired on \d{4}-\d\d-\d\d\. Renew it"),
        ("server.crt", "server.key", None, -2 * DAY, "is valid only from .* Set the clock, or wait"),
        ("no_san.crt", "other.key", None, 0 * DAY, "names no host in subjectAltName.*-addext"),
    ],
)
def test_a_pair_that_cannot_work_is_refused_with_a_sentence(own, certfile, keyfile, password, later, sentence):
    with pytest.raises(ChatError, match=sentence):
        own_certificate(own / certfile, keyfile and own / keyfile, password, now=datetime.now(UTC) + later)


def test_the_password_is_not_shown_with_the_certificate(own):
    assert "sesame" not in repr(own_certificate(own / "server.crt", own / "secret.key", "open sesame"))
