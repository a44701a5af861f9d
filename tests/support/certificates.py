"""Certificates and keys for tests of HTTPS, curl and OpenSSL to look at them, and a server that shows them."""

import subprocess
from datetime import UTC, datetime, timedelta

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from llama2_chat.server.certificate import Certificate
from llama2_chat.server.hosts import as_address
from llama2_chat.server.local_ca import local_certificate
from llama2_chat.server.tls import Certificates
from tests.support.serving import listening

HOSTS = ("localhost", "llama.local", "llama", "127.0.0.1", "127.0.0.2", "::1", "192.168.7.7", "fd00::7")
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
FILES = ("ca.crt", "ca.key", "server.crt", "server.key")
SELF_SIGNED = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30")
LOCALHOST = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
    await send({"type": "http.response.body", "body": b"<title>Hello</title>"})


def serving(get, check_every_s=60, app=lambda: hello):
    """The port of a server with the certificate that get() returns, for what app() makes in the server's loop."""
    context = Certificates(get, check_every_s).context

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
