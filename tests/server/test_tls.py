"""HTTPS from outside: curl, httpx, OpenSSL and a real Chromium decide whom they trust; a moved clock decides when."""

import ipaddress
import os
import shutil
import ssl
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import segno
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from gradio_client import Client
from playwright.sync_api import Error as BrowserError
from playwright.sync_api import expect, sync_playwright

from app import create_app
from llama2_chat.errors import ChatError
from llama2_chat.server import announcement as announcements
from llama2_chat.server.announcement import announcement, qr_code, urls
from llama2_chat.server.certificate import Certificate, own_certificate
from llama2_chat.server.hosts import as_address, own_hosts
from llama2_chat.server.local_ca import local_certificate
from llama2_chat.server.tls import get_certificate, server_context
from llama2_chat.types import SamplingParams
from tests.support.serving import listening

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
HOSTS = ("localhost", "llama.local", "llama", "127.0.0.1", "127.0.0.2", "::1", "192.168.7.7", "fd00::7")
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
FILES = ("ca.crt", "ca.key", "server.crt", "server.key")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "certs"


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"<title>Hello</title>"})


def serving(get, check_every_s=60, app=lambda: hello):
    """The port of a server with the certificate that get() returns, for what app() makes in the server's loop."""
    context = server_context(get, check_every_s)

    def build():
        config = uvicorn.Config(app(), host="0.0.0.0", port=0, log_level="error", timeout_graceful_shutdown=1)
        config.ssl_context_factory = lambda *_: context
        return config

    return listening(build)


def local(folder):
    return lambda: local_certificate(folder, hosts=HOSTS)


def curl(*arguments):
    return subprocess.run(["curl", "-sS", "--noproxy", "*", *map(str, arguments)], capture_output=True, text=True)


def openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)


def read(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def names_in(path):
    names = read(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def general_name(host):
    address = as_address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def forged(folder, name, file="forged.crt", issuer=("ca.crt", "ca.key"), is_ca=False):
    """What whoever stole a CA's key could make for this name, good for whatever that CA may allow."""
    issuer_key, key = (load_pem_private_key((folder / file).read_bytes(), None) for file in (issuer[1], "server.key"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, file)]))
        .issuer_name(read(folder / issuer[0]).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.SubjectAlternativeName([general_name(name)]), critical=False)
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
    (folder / file).write_bytes(certificate.public_bytes(Encoding.PEM))
    return Certificate(folder / file, folder / "server.key", (), NOW + DAY)


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

# Gradio 6.31 uses what pandas 3 is about to drop.
gradios_warnings = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture
def site(folder, chat, settings):
    """The port of the whole site over HTTPS."""
    local_certificate(folder, hosts=HOSTS)
    short = replace(settings, sampling=SamplingParams(temperature=0, max_new_tokens=8))

    with serving(local(folder), app=lambda: create_app(chat, short)) as port:
        yield port


@pytest.mark.slow
@gradios_warnings
def test_chromium_that_trusts_the_ca_chats_on_every_host(site, folder, tmp_path):
    with browser_that_trusts(folder / "ca.crt", tmp_path / "home") as browser:
        for host in ("localhost", "127.0.0.2"):
            page = browser.new_page()
            page.goto(f"https://{host}:{site}/")
            page.get_by_role("textbox", name="Message").fill("Say hello.")
            page.get_by_role("textbox", name="Message").press("Enter")
            expect(page.get_by_text("The answer was cut off at 'Max new tokens'.")).to_be_visible(timeout=30_000)
            expect(page.locator("#insecure")).to_be_hidden()


@gradios_warnings
@pytest.mark.filterwarnings("ignore:`verify=<str>`:DeprecationWarning")  # how gradio_client 2.7 hands it to httpx
@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_gradio_client_chats_once_it_is_given_the_ca(site, folder, host):
    client = Client(f"https://{host}:{site}", ssl_verify=str(folder / "ca.crt"), verbose=False)
    assert client.predict("Say hello.", api_name="/chat", max_new_tokens=8).strip()


@gradios_warnings
def test_gradio_client_without_the_ca_sends_nothing(site, chat, monkeypatch):
    monkeypatch.setattr(chat, "stream_reply", lambda *_: pytest.fail("a question arrived"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        Client(f"https://localhost:{site}", verbose=False)


# ---- what is in it, and when it changes ----


def test_the_certificate_is_for_every_host_as_a_server_and_for_397_days_at_most(folder):
    local_certificate(folder, hosts=HOSTS)
    leaf = read(folder / "server.crt")
    assert names_in(folder / "server.crt") == set(HOSTS)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < 397 * DAY
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.ExtendedKeyUsageOID.SERVER_AUTH
    ]


def test_the_ca_is_for_10_years_and_its_constraints_are_critical(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    ca = read(folder / "ca.crt")
    constraints = ca.extensions.get_extension_for_class(x509.NameConstraints)
    permitted = {str(tree.value) for tree in constraints.value.permitted_subtrees}
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"}
    assert constraints.critical
    assert permitted == {"localhost", "local", "llama", "127.0.0.0/8", "::1/128", "fc00::/7", "fe80::/10"} | private
    assert ca.not_valid_after_utc > NOW + 3640 * DAY


def test_this_computers_hosts_are_its_names_and_its_private_addresses():
    hosts = own_hosts()
    assert {"localhost", "127.0.0.1", "::1"} <= set(hosts)
    assert any(host.endswith(".local") for host in hosts)
    addresses = [ipaddress.ip_address(host) for host in hosts if ":" in host or host.count(".") == 3]
    assert not any(address.is_global for address in addresses)


def test_a_computer_named_like_a_top_level_domain_gets_no_power_over_it(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Dev")  # the constraint `dev` would permit every site in .dev
    assert "dev" not in own_hosts()
    assert "dev.local" in own_hosts()


def test_another_start_changes_nothing(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    local_certificate(folder, hosts=reversed(HOSTS), now=NOW + 300 * DAY)
    assert contents(folder) == before


def test_a_certificate_near_its_end_is_renewed_and_the_ca_stays(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    renewed = local_certificate(folder, hosts=HOSTS, now=NOW + 370 * DAY)
    after = contents(folder)
    assert (after["ca.crt"], after["ca.key"]) == (before["ca.crt"], before["ca.key"])
    assert after["server.crt"] != before["server.crt"]
    assert renewed.not_after > NOW + 700 * DAY


@pytest.mark.parametrize("hosts", [(*HOSTS, "10.1.2.3"), HOSTS[:-2], (*HOSTS, "other.local")])
def test_when_the_addresses_change_the_certificate_follows_and_the_ca_stays(folder, hosts):
    local_certificate(folder, hosts=HOSTS)
    ca = (folder / "ca.crt").read_bytes()
    assert local_certificate(folder, hosts=hosts).hosts == hosts
    assert names_in(folder / "server.crt") == set(hosts)
    assert (folder / "ca.crt").read_bytes() == ca
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "server.crt").returncode == 0


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"now": NOW + 3640 * DAY}, "ends on "),
        ({"hosts": (*HOSTS, "renamed")}, "may not sign for renamed"),
    ],
    ids=["near its end", "new name"],
)
def test_a_ca_that_can_go_on_no_longer_is_replaced_and_the_log_says_so(folder, caplog, change, reason):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    local_certificate(folder, **{"hosts": HOSTS, "now": NOW, **change})
    assert not set(before.values()) & set(contents(folder).values())
    assert reason in caplog.text
    assert "every device has to trust the new ca.crt" in caplog.text


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("nothing"), lambda path: path.write_text("")]
)
@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_damaged_file_is_made_again(folder, name, damage):
    local_certificate(folder, hosts=HOSTS)
    before = contents(folder)
    damage(folder / name)
    local_certificate(folder, hosts=HOSTS)
    after = contents(folder)
    assert openssl("verify", "-CAfile", folder / "ca.crt", folder / "server.crt").returncode == 0
    assert (after["ca.crt"] == before["ca.crt"]) == name.startswith("server")


def test_a_clock_before_the_cas_time_is_named_and_the_ca_stays(folder):
    local_certificate(folder, hosts=HOSTS, now=NOW)
    before = contents(folder)
    with pytest.raises(ChatError, match=r"clock says 1970-01-01, before certs/ca\.crt was made\. Set the clock"):
        local_certificate(folder, hosts=HOSTS, now=datetime(1970, 1, 1, tzinfo=UTC))
    assert contents(folder) == before


def test_an_authority_that_was_not_made_here_is_left_alone(folder):
    folder.mkdir()
    openssl(*SELF_SIGNED, "-subj", "/CN=Mine", "-keyout", folder / "ca.key", "-out", folder / "ca.crt")
    before = (folder / "ca.key").read_bytes()
    with pytest.raises(ChatError, match="was not made here"):
        local_certificate(folder, hosts=HOSTS)
    assert (folder / "ca.key").read_bytes() == before


def test_programs_that_start_at_once_share_one_authority_and_one_certificate(folder):
    program = """
import sys, pathlib
from llama2_chat.server.announcement import fingerprint
from llama2_chat.server.local_ca import local_certificate
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    made = local_certificate(pathlib.Path(sys.argv[1]) / str(number), hosts=["localhost"])
    print(fingerprint(made.ca), fingerprint(made.certfile))
"""
    command = [sys.executable, "-c", program, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    programs = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(3)]
    for program in programs:
        program.stdout.readline()
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    printed = [program.communicate()[0] for program in programs]
    assert printed[0].count("\n") == 8
    assert len(set(printed)) == 1


# ---- the files ----


@pytest.mark.skipif(os.name != "posix", reason="Windows has access lists instead")
def test_keys_are_for_their_owner_only_even_if_somebody_opened_them(folder, caplog):
    umask = os.umask(0)
    try:
        local_certificate(folder, hosts=HOSTS)
    finally:
        os.umask(umask)
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in FILES}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    (folder / "ca.key").chmod(0o644)
    local_certificate(folder, hosts=HOSTS)
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert "Other users could read" in caplog.text


def test_git_never_sees_the_folder(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    local_certificate(tmp_path / "anywhere", hosts=HOSTS)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "certs").write_text("a file")
    with pytest.raises(ChatError, match=r"certs cannot be read or written: .*--certfile and --keyfile"):
        local_certificate(tmp_path / "certs", hosts=HOSTS)


# ---- one's own ----

SELF_SIGNED = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")
LOCALHOST = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="module")
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
    assert isinstance(server_context(lambda: certificate), ssl.SSLContext)


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
        ("server.crt", "other.key", None, 0 * DAY, "is not the key of .*made together"),
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


def test_a_key_that_openssl_finds_too_weak_is_refused_before_the_start(tmp_path):
    weak = ("req", "-x509", "-newkey", "rsa:1024", "-nodes", *LOCALHOST)
    openssl(*weak, "-keyout", tmp_path / "weak.key", "-out", tmp_path / "weak.crt")
    with pytest.raises(ChatError, match=r"OpenSSL refuses .*weak\.crt: EE_KEY_TOO_SMALL"):
        server_context(lambda: own_certificate(tmp_path / "weak.crt", tmp_path / "weak.key"))


def test_a_keyfile_alone_is_refused(own):
    with pytest.raises(ChatError, match=r"certificate\. Set --certfile too"):
        get_certificate(None, own / "server.key", None)


def test_the_password_is_not_shown_with_the_certificate(own):
    assert "sesame" not in repr(own_certificate(own / "server.crt", own / "secret.key", "open sesame"))


def test_nothing_older_than_tls_1_2_is_spoken(folder):
    assert server_context(local(folder)).minimum_version == ssl.TLSVersion.TLSv1_2


# ---- what is printed ----


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
