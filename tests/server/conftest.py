"""What the tests of a file share: two servers, one with the embedded model and one with a small one; certificates."""

import time
from dataclasses import replace

import httpx
import openai
import pytest

from llama2_chat.types import Status
from model import ChatModel
from tests.support.certificates import LOCALHOST, SELF_SIGNED, openssl
from tests.support.programs import HELLO, LIKELIEST, TALK, whole_reply
from tests.support.scripted import ScriptedChat
from tests.support.serving import serving
from tests.support.small_model import untrained

SMALL_CONTEXT = 4096


@pytest.fixture(scope="session")
def small(chat, settings):
    """The embedded model's tokenizer and few random weights: one answer and one in line.

    A long answer takes some seconds, so that a test can do something before it ends.
    """
    small = ChatModel(replace(settings, max_batch=1, queue_limit=1))
    small.status = Status(model="small")
    small.serve(chat.serving.tokenizer, untrained(chat.serving.tokenizer, SMALL_CONTEXT))
    runner = small.serving.engine.runner
    decode = runner.decode

    def decode_slowly(requests):
        time.sleep(0.002)
        return decode(requests)

    runner.decode = decode_slowly
    yield small
    small.close()


@pytest.fixture(scope="module")
def address(chat, settings, tmp_path_factory):
    for messages in (HELLO, TALK):  # a prompt from the KV cache may differ in its last bits from one that is computed
        whole_reply(chat, messages, max_new_tokens=1)
    documents_dir = tmp_path_factory.mktemp("documents")
    with serving(chat, replace(settings, sampling=LIKELIEST, documents_dir=documents_dir)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def small_address(small, settings):
    with serving(small, settings) as address:
        yield address


@pytest.fixture(scope="session")
def scripted():
    return ScriptedChat()


@pytest.fixture(scope="session")
def script(scripted, settings):
    """A client of a model that says what a test wants."""
    with serving(scripted, replace(settings, sampling=LIKELIEST)) as address, httpx.Client(base_url=address) as http:
        yield http


@pytest.fixture
def http(small_address):
    # It is plain HTTP, and reading certificates would take longer than most of these tests.
    with httpx.Client(base_url=small_address, timeout=60, verify=False) as http:
        yield http


@pytest.fixture
def folder(tmp_path):
    """Where certificates are made."""
    return tmp_path / "certs"


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A folder with what people bring: server.crt, server.key and other forms of them."""
    folder = tmp_path_factory.mktemp("own")
    made = openssl(*SELF_SIGNED, *LOCALHOST, "-keyout", folder / "server.key", "-out", folder / "server.crt")
    assert made.returncode == 0, made.stderr
    openssl(*SELF_SIGNED, "-subj", "/CN=localhost", "-keyout", folder / "other.key", "-out", folder / "no_san.crt")
    openssl("x509", "-in", folder / "server.crt", "-outform", "der", "-out", folder / "server.der")
    secret = ("-passout", "pass:open sesame")
    openssl("pkcs8", "-topk8", "-in", folder / "server.key", "-out", folder / "secret.key", *secret)
    openssl("ec", "-aes256", "-in", folder / "server.key", "-out", folder / "secret_old.key", *secret)
    certificate, key = ((folder / name).read_text() for name in ("server.crt", "server.key"))
    curve = openssl("ecparam", "-name", "prime256v1").stdout
    (folder / "key_first.pem").write_text(curve + key + certificate)
    (folder / "key_last.pem").write_text("Bag Attributes\n" + certificate + curve + key)
    (folder / "upside_down.crt").write_text((folder / "no_san.crt").read_text() + certificate)
    (folder / "folder.crt").mkdir()
    return folder
