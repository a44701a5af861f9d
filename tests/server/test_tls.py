"""HTTPS from outside: curl, httpx, OpenSSL and a real Chromium decide whom they trust."""

import os
import shutil
import ssl
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from gradio_client import Client
from playwright.sync_api import Error as BrowserError
from playwright.sync_api import expect, sync_playwright

from app import create_app
from llama2_chat.errors import ChatError
from llama2_chat.server.certificate import own_certificate
from llama2_chat.server.local_ca import local_certificate
from llama2_chat.server.tls import Certificates, get_certificate
from llama2_chat.types import SamplingParams
from tests.support.browser import CHROMIUM
from tests.support.certificates import HOSTS, LOCALHOST, curl, forged, local, openssl, serving

# ---- who trusts it ----


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2"])
def test_curl_and_httpx_verify_with_the_ca(folder, host):
    with serving(local(folder)) as port:
        url = f"https://{host}:{port}/"
        assert "Hello" in curl("--cacert", folder / "ca.crt", url).stdout
        with httpx.Client(verify=ssl.create_default_context(cafile=folder / "ca.crt"), trust_env=False) as client:
            assert client.get(url).status_code == 200


def test_without_the_ca_nobody_trusts_it(folder):
    with serving(local(folder)) as port:
        assert curl(f"https://localhost:{port}/").returncode == 60
        with (
            httpx.Client(trust_env=False) as client,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.get(f"https://localhost:{port}/")


def test_an_address_that_is_not_in_the_certificate_is_refused(folder):
    with serving(local(folder)) as port:
        refused = curl("--cacert", folder / "ca.crt", f"https://127.0.0.3:{port}/")
    assert refused.returncode == 60
    assert "subject name" in refused.stderr


@pytest.mark.parametrize("name", ["bank.example", "local.example", "evil-localhost", "203.0.113.9", "2001:db8::9"])
def test_a_stolen_ca_key_is_good_for_no_name_outside(folder, name):
    local_certificate(folder, hosts=HOSTS)
    certificate = forged(folder, name)
    verified = openssl("verify", "-CAfile", folder / "ca.crt", certificate.certfile)
    assert "permitted subtree violation" in verified.stderr
    with serving(lambda: certificate) as port:
        host = f"[{name}]" if ":" in name else name
        through = ("--connect-to", f"::127.0.0.1:{port}", "--cacert", folder / "ca.crt")
        assert curl(*through, f"https://{host}/").returncode == 60


def test_a_stolen_ca_key_is_good_for_no_second_authority(folder):
    local_certificate(folder, hosts=HOSTS)
    second = forged(folder, "localhost", is_ca=True).certfile
    below = forged(folder, "localhost", "below.crt", issuer=("forged.crt", "server.key")).certfile
    verified = openssl("verify", "-CAfile", folder / "ca.crt", "-untrusted", second, below)
    assert "path length constraint exceeded" in verified.stderr


@pytest.mark.parametrize(("purpose", "returncode"), [("sslserver", 0), ("smimesign", 2), ("sslclient", 2)])
def test_a_stolen_ca_key_is_good_for_servers_only(folder, purpose, returncode):
    local_certificate(folder, hosts=HOSTS)
    certificate = forged(folder, "localhost").certfile
    assert openssl("verify", "-purpose", purpose, "-CAfile", folder / "ca.crt", certificate).returncode == returncode


def test_what_is_made_is_strictly_as_the_standard_says(folder):
    local_certificate(folder, hosts=HOSTS)
    verified = openssl("verify", "-x509_strict", "-CAfile", folder / "ca.crt", folder / "server.crt")
    assert verified.returncode == 0, verified.stderr


@contextmanager
def browser_that_trusts(ca, home, *arguments):
    """A Chromium whose user has put the CA into the store that it reads, as the announcement says."""
    store = home / ".pki" / "nssdb"
    store.mkdir(parents=True)
    subprocess.run(["certutil", "-d", f"sql:{store}", "-N", "--empty-password"], check=True)
    trust = ["certutil", "-d", f"sql:{store}", "-A", "-t", "C,,", "-n", "Llama 2 Chat", "-i", str(ca)]
    subprocess.run(trust, check=True)
    with sync_playwright() as playwright:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-proxy-server",
            *arguments,
        ]
        environment = {**os.environ, "HOME": str(home)}
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, env=environment)
        yield browser
        browser.close()


@pytest.mark.slow
def test_chromium_that_trusts_the_ca_opens_every_host_without_a_warning_and_no_other(folder, tmp_path):
    assert shutil.which("certutil"), "certutil is in Debian's package libnss3-tools"
    resolve = "--host-resolver-rules=MAP llama.local 127.0.0.1, MAP llama 127.0.0.1, MAP bank.example 127.0.0.1"
    local_certificate(folder, hosts=HOSTS)
    stolen = forged(folder, "bank.example")
    with (
        serving(local(folder)) as port,
        serving(lambda: stolen) as stolen_port,
        browser_that_trusts(folder / "ca.crt", tmp_path / "home", resolve) as browser,
    ):
        page = browser.new_page()
        for host in ("localhost", "127.0.0.1", "127.0.0.2", "llama.local", "llama"):
            page.goto(f"https://{host}:{port}/")
            assert (page.title(), page.evaluate("isSecureContext")) == ("Hello", True)
        with pytest.raises(BrowserError, match="ERR_CERT_COMMON_NAME_INVALID"):
            page.goto(f"https://127.0.0.3:{port}/")
        with pytest.raises(BrowserError, match="ERR_CERT"):
            page.goto(f"https://bank.example:{stolen_port}/")


# ---- chatting through it ----


@pytest.fixture
def site(folder, chat, settings):
    """The port of the whole site over HTTPS."""
    local_certificate(folder, hosts=HOSTS)
    short = replace(settings, sampling=SamplingParams(temperature=0, max_new_tokens=8))

    with serving(local(folder), app=lambda: create_app(chat, short)) as port:
        yield port


@pytest.mark.slow
def test_chromium_that_trusts_the_ca_chats_on_every_host(site, folder, tmp_path):
    with browser_that_trusts(folder / "ca.crt", tmp_path / "home") as browser:
        for host in ("localhost", "127.0.0.2"):
            page = browser.new_page()
            page.goto(f"https://{host}:{site}/")
            page.get_by_role("textbox", name="Message").fill("Say hello.")
            page.get_by_role("textbox", name="Message").press("Enter")
            expect(page.get_by_text("cut off at ‘Max new tokens’")).to_be_visible()
            expect(page.locator(".insecure")).to_have_count(0)


@pytest.mark.filterwarnings("ignore:`verify=<str>`:DeprecationWarning")  # how gradio_client 2.7 hands it to httpx
@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_gradio_client_chats_once_it_is_given_the_ca(site, folder, host):
    client = Client(f"https://{host}:{site}", ssl_verify=str(folder / "ca.crt"), verbose=False)
    assert client.predict("Say hello.", api_name="/chat", max_new_tokens=8).strip()


def test_gradio_client_without_the_ca_sends_nothing(site, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", lambda *_: pytest.fail("a question arrived"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        Client(f"https://localhost:{site}", verbose=False)


# ---- what is served ----


def test_a_running_server_shows_the_new_certificate_at_the_next_handshake(folder, caplog):
    hosts = ["127.0.0.1"]

    def get():
        if not hosts:
            raise ChatError("The disk is full.")
        return local_certificate(folder, hosts=hosts)

    with serving(get, check_every_s=0) as port:
        assert curl("--cacert", folder / "ca.crt", f"https://127.0.0.2:{port}/").returncode == 60
        hosts.append("127.0.0.2")
        assert curl("--cacert", folder / "ca.crt", f"https://127.0.0.2:{port}/").returncode == 0
        hosts.clear()
        assert curl("--cacert", folder / "ca.crt", f"https://127.0.0.2:{port}/").returncode == 0
    assert "The disk is full. Until then the certificate stays as it was." in caplog.text


def test_a_key_that_openssl_finds_too_weak_is_refused_before_the_start(tmp_path):
    weak = ("req", "-x509", "-newkey", "rsa:1024", "-nodes", *LOCALHOST)
    openssl(*weak, "-keyout", tmp_path / "weak.key", "-out", tmp_path / "weak.crt")
    with pytest.raises(ChatError, match=r"OpenSSL refuses .*weak\.crt: EE_KEY_TOO_SMALL"):
        Certificates(lambda: own_certificate(tmp_path / "weak.crt", tmp_path / "weak.key"))


def test_a_keyfile_alone_is_refused(own):
    with pytest.raises(ChatError, match=r"certificate\. Set --certfile too"):
        get_certificate(None, own / "server.key", None)


def test_nothing_older_than_tls_1_2_is_spoken(folder):
    assert Certificates(local(folder)).context.minimum_version == ssl.TLSVersion.TLSv1_2
