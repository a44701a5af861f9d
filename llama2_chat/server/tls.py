"""HTTPS: a certificate authority and a leaf for the LAN, kept in certs/, or one's own certificate, checked.

    curl --cacert certs/ca.crt https://localhost:7860/livez

Whoever trusts ca.crt trusts it for this computer's names, .local and private addresses, and for nothing else. The files
are made and renewed here; app.py serves with server_context() and prints announcement().
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import segno
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from llama2_chat import ROOT
from llama2_chat.errors import ChatError

log = logging.getLogger(__name__)
CERTS = ROOT / "certs"

EVERYWHERE = ("0.0.0.0", "::")

CA_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=397, seconds=-1)  # both ends count, and browsers refuse more than 398 days
RENEW_BEFORE = timedelta(days=30)
CLOCK_SKEW = timedelta(days=1)  # a phone whose clock is late must not find a certificate from the future

PRIVATE_RANGES = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("::1/128", "fc00::/7", "fe80::/10"),
    )
)
# A constraint also permits every name below it: for a computer called `dev` the CA would be good for all of .dev. Such
# a computer is served as dev.local only.
TOP_LEVEL_DOMAINS = {"ai", "app", "bot", "box", "cloud", "dev", "host", "mini", "nexus", "page", "red", "tv", "xbox"}
HOST_NAME = re.compile(r"(?=.{1,253}$)(?!.*\.\d+$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")


@dataclass(frozen=True)
class Certificate:
    """A certificate that was checked, and where it lies."""

    certfile: Path
    keyfile: Path
    hosts: tuple[str, ...]  # names and addresses that it is good for
    not_after: datetime
    ca: Path | None = None  # what other devices are to trust; None for one's own certificate
    password: str | None = field(default=None, repr=False)  # of the key


def get_certificate(certfile: Path | None, keyfile: Path | None, password: str | None) -> Certificate:
    """One's own certificate if files are named, else the local one. Raises ChatError, saying what to do."""
    if certfile is None:
        if keyfile is not None:
            raise ChatError("A keyfile needs its certificate. Set --certfile too.")
        return local_certificate()
    return own_certificate(certfile, keyfile, password)


def server_context(get: Callable[[], Certificate], look_every_s: float = 60) -> ssl.SSLContext:
    """TLS 1.2 and later with what get() returns, asked again at a handshake when the last time is a while ago.

    So a server that outlives its certificate, or a laptop that changes networks, needs no restart.
    """
    entrance = current = _context(get())
    looked = time.monotonic()

    def look(connection: ssl.SSLObject, _name: str | None, _context_before: ssl.SSLContext) -> None:
        nonlocal current, looked
        if time.monotonic() - looked > look_every_s:
            try:
                current = _context(get())
            except ChatError as error:
                log.warning("%s Until then the certificate stays as it was.", error)
            looked = time.monotonic()
        connection.context = current

    entrance.sni_callback = look  # called for clients that name no server, too
    return entrance


def _context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without any password OpenSSL would stop and ask for one on the terminal.
        context.load_cert_chain(certificate.certfile, certificate.keyfile, certificate.password or "")
    except OSError as error:  # ssl.SSLError is one: a key too short for this OpenSSL, for instance
        reason = getattr(error, "reason", None) or error.strerror
        raise ChatError(f"OpenSSL refuses {certificate.certfile}: {reason}. Make a new certificate and key.") from error
    return context


# ---- the local authority and its leaf ----


def local_certificate(
    folder: Path = CERTS, *, hosts: Sequence[str] | None = None, now: datetime | None = None
) -> Certificate:
    """The leaf in the folder; made, or renewed, if it does not cover these hosts for another 30 days.

    hosts: names and addresses; by default all of this computer's, see own_hosts().
    The authority stays as long as it can. Raises ChatError when the files cannot be read or written.
    """
    hosts = own_hosts() if hosts is None else tuple(hosts)
    now = now or datetime.now(UTC)
    with _folder_told(folder):
        leaf = _usable_leaf(folder, hosts, now)  # a folder where nothing is to be done may be read-only
        if leaf is None:
            _make_folder(folder)
            with FileLock(folder / ".lock", timeout=10):
                leaf = _usable_leaf(folder, hosts, now) or _make_leaf(folder, hosts, now)
    return Certificate(folder / "server.crt", folder / "server.key", hosts, leaf.not_valid_after_utc, folder / "ca.crt")


def needs_new_certificate(folder: Path) -> bool:
    """Whether local_certificate() would make one. Makes none, but raises ChatError where that would."""
    with _folder_told(folder):
        needed = _usable_leaf(folder, own_hosts(), datetime.now(UTC)) is None
        if needed:
            tempfile.TemporaryFile(dir=folder if folder.exists() else folder.parent).close()
    return needed


@contextlib.contextmanager
def _folder_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ChatError(
            f"The certificates in {folder} cannot be read or written: {error.strerror or error}. Make the folder "
            "yours, or use a certificate of your own with --certfile and --keyfile."
        ) from error


def own_hosts() -> tuple[str, ...]:
    """localhost, this computer's names, and every private address of its interfaces, the one others use first."""
    name = socket.gethostname().lower().rstrip(".")
    bare = name.partition(".")[0]
    names = ["localhost", f"{bare}.local", name, bare]
    return tuple(
        dict.fromkeys(
            [name for name in names if HOST_NAME.fullmatch(name) and name not in TOP_LEVEL_DOMAINS]
            + [address for address in ("127.0.0.1", "::1", *_own_addresses()) if _is_private(address)]
        )
    )


def _own_addresses() -> list[str]:
    """Every address of every interface; first the one that leads outside, so that no container bridge is before it."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # UDP: looks up the route and sends nothing
        addresses = [probe.getsockname()[0]]
    for interface in psutil.net_if_addrs().values():
        addresses += [a.address.partition("%")[0] for a in interface if a.family in (socket.AF_INET, socket.AF_INET6)]
    return addresses


def _is_private(address: str) -> bool:
    return any(ipaddress.ip_address(address) in network for network in PRIVATE_RANGES)


Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _usable_leaf(folder: Path, hosts: Sequence[str], now: datetime) -> x509.Certificate | None:
    ca, leaf = _read_pair(folder, "ca"), _read_pair(folder, "server")
    if not ca or not leaf or _flaw_of_ca(ca, hosts, now):
        return None
    try:
        leaf[0].verify_directly_issued_by(ca[0])
        names = leaf[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return None
    current = leaf[0].not_valid_before_utc <= now < leaf[0].not_valid_after_utc - RENEW_BEFORE
    return leaf[0] if current and set(names) == set(map(_general_name, hosts)) else None


def _make_leaf(folder: Path, hosts: Sequence[str], now: datetime) -> x509.Certificate:
    ca = _read_pair(folder, "ca")
    flaw = _flaw_of_ca(ca, hosts, now) if ca else "is damaged or without its key"
    if flaw:
        first = not (folder / "ca.crt").exists()
        ca = _new_ca(hosts, now)
        _write_pair(folder, "ca", *ca)
        if not first:
            log.warning(
                "%s %s, so there is a new certificate authority: every device has to trust the new ca.crt, and "
                "should forget the old one.",
                folder / "ca.crt",
                flaw,
            )
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _sign(
        _name("Llama 2 Chat"),
        key,
        ca,
        (now - CLOCK_SKEW, min(now - CLOCK_SKEW + LEAF_LIFE, ca[0].not_valid_after_utc)),
        {
            x509.BasicConstraints(ca=False, path_length=None): True,
            _key_usage(digital_signature=True): True,
            x509.SubjectAlternativeName(map(_general_name, hosts)): False,
        },
    )
    _write_pair(folder, "server", leaf, key)
    log.info("Made a certificate for %s.", ", ".join(hosts))
    return leaf


def _flaw_of_ca(ca: Pair, hosts: Sequence[str], now: datetime) -> str:
    """Why it can sign no certificate for these hosts; "" if it can."""
    certificate = ca[0]
    if now < certificate.not_valid_before_utc:
        raise ChatError(
            f"This computer's clock says {now:%Y-%m-%d}, before certs/ca.crt was made. "
            "Set the clock or, if it is right, delete certs/ca.crt."
        )
    try:
        permitted = certificate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except x509.ExtensionNotFound:
        raise ChatError("certs/ca.crt was not made here: it may sign for any name. Move it and its key away.") from None
    if certificate.not_valid_after_utc - RENEW_BEFORE <= now:
        return f"ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    outside = [host for host in hosts if not any(_is_within(host, tree.value) for tree in permitted)]
    return f"may not sign for {', '.join(outside)}" if outside else ""


def _is_within(host: str, tree: str | ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    if isinstance(tree, str):
        return host == tree or host.endswith("." + tree)
    address = _address(host)
    return address is not None and address in tree


def _new_ca(hosts: Sequence[str], now: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # "local", without a leading dot, is RFC 5280's way to write .local; older GnuTLS and Java take no other.
    names = dict.fromkeys(["localhost", "local", *(host for host in hosts if _address(host) is None)])
    permitted = [x509.DNSName(name) for name in names if name == "local" or not _is_within(name, "local")]
    # An authority made anew needs a name of its own: some certificate stores take one per name.
    subject = _name(f"Llama 2 Chat on {socket.gethostname()[:24]}, {now:%Y-%m-%d %H:%M:%S}")
    certificate = _sign(
        subject,
        key,
        (subject, key),
        (now - CLOCK_SKEW, now - CLOCK_SKEW + CA_LIFE),
        {
            x509.BasicConstraints(ca=True, path_length=0): True,
            _key_usage(key_cert_sign=True): True,
            x509.NameConstraints([*permitted, *map(x509.IPAddress, PRIVATE_RANGES)], None): True,
        },
    )
    return certificate, key


def _sign(subject, key, issuer, validity, extensions) -> x509.Certificate:
    """issuer: the authority's certificate, or its name while that is in the making, and its key."""
    above, issuer_key = issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above if isinstance(above, x509.Name) else above.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
    )
    extensions = {
        **extensions,
        # Name constraints say nothing about programs and mail; this keeps the CA from vouching for either.
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]): False,
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()): False,
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()): False,
    }
    for extension, critical in extensions.items():
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def _key_usage(digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature, False, False, False, False, key_cert_sign, False, False, False)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    address = _address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")  # private keys stay out of git, wherever the folder is


def _read_pair(folder: Path, name: str) -> Pair | None:
    """Certificate and key; None if one is missing or damaged, or they do not belong together."""
    keyfile = folder / f"{name}.key"
    try:
        if os.name == "posix" and keyfile.stat().st_mode & 0o077:
            keyfile.chmod(0o600)
            log.warning("Other users could read %s; now only you can.", keyfile)
        certificate = x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
        key = serialization.load_pem_private_key(keyfile.read_bytes(), None)
    except (FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return (certificate, key) if certificate.public_key() == key.public_key() else None


def _write_pair(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    # Whoever looks between the two finds a pair that does not match, and waits for the lock.
    _write(folder / f"{name}.key", key.private_bytes(serialization.Encoding.PEM, pkcs8, plain), 0o600)
    _write(folder / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    """The file is whole or not there, and never readable by more users than at the end."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # of a program that was killed
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


# ---- one's own certificate ----


def own_certificate(
    certfile: Path, keyfile: Path | None = None, password: str | None = None, *, now: datetime | None = None
) -> Certificate:
    """The certificate, if a browser that knows its issuer would take it; ChatError otherwise.

    keyfile: may be left out if certfile holds the key too. password: of the key, needed if it is encrypted.
    """
    keyfile = keyfile or certfile
    now = now or datetime.now(UTC)
    try:
        chain = x509.load_pem_x509_certificates(_read(certfile))
    except ValueError as error:
        raise ChatError(
            f"{certfile} is not a certificate in PEM form, the one that starts with -----BEGIN CERTIFICATE-----. "
            f"From DER: openssl x509 -inform der -in {certfile} -out server.crt"
        ) from error
    key = _private_key(keyfile, password)
    leaf = chain[0]
    if leaf.public_key() != key.public_key():
        if any(other.public_key() == key.public_key() for other in chain):
            raise ChatError(f"The certificates in {certfile} are in the wrong order. Put the server's own first.")
        raise ChatError(f"The key in {keyfile} is not the key of {certfile}. Name the two that were made together.")
    if now < leaf.not_valid_before_utc:
        raise ChatError(
            f"{certfile} is valid only from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this computer's clock "
            f"says {now:%Y-%m-%d %H:%M}. Set the clock, or wait."
        )
    if now >= leaf.not_valid_after_utc:
        raise ChatError(f"{certfile} expired on {leaf.not_valid_after_utc:%Y-%m-%d}. Renew it, or use --https alone.")
    return Certificate(certfile, keyfile, _hosts_of(leaf, certfile), leaf.not_valid_after_utc, password=password)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror}. Check its path and its permissions.") from error


def _private_key(keyfile: Path, password: str | None):
    pem = _read(keyfile)
    encrypted = re.search(rb"BEGIN ENCRYPTED|4,ENCRYPTED", pem)
    if encrypted and not password:
        raise ChatError(f"The key in {keyfile} is encrypted. Set its password in the environment as KEY_PASSWORD.")
    try:
        return serialization.load_pem_private_key(pem, password.encode() if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise ChatError(f"KEY_PASSWORD does not open {keyfile}. Set the password the key was made with.") from error
        raise ChatError(
            f"{keyfile} holds no private key in PEM form, the one that starts with -----BEGIN PRIVATE KEY-----. "
            "Name the file that was made with the certificate in --keyfile."
        ) from error


def _hosts_of(leaf: x509.Certificate, certfile: Path) -> tuple[str, ...]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = []
    hosts = tuple(str(name.value) for name in names if isinstance(name, (x509.DNSName, x509.IPAddress)))
    if not hosts:
        raise ChatError(
            f"{certfile} names no host in subjectAltName, so no browser can ever trust it. Make it anew with "
            'openssl req -x509 ... -addext "subjectAltName=DNS:localhost,IP:127.0.0.1", or use --https alone.'
        )
    return hosts


# ---- what is printed at the start ----

TRUST = """\
Windows          certutil -addstore -user Root ca.crt
macOS            security add-trusted-cert -r trustRoot -k ~/Library/Keychains/login.keychain-db ca.crt
iPhone, iPad     open in Safari; Settings > Profile Downloaded; General > About > Certificate Trust Settings: full trust
Android          Settings > Security > Encryption & credentials > Install a certificate > CA certificate
Debian, Ubuntu   sudo cp ca.crt /usr/local/share/ca-certificates/llama2-chat.crt && sudo update-ca-certificates
Fedora, Arch     sudo trust anchor ca.crt
Firefox          Settings > Privacy & Security > View Certificates > Authorities > Import, for websites
Chrome on Linux  certutil -d sql:$HOME/.pki/nssdb -A -t C,, -n "Llama 2 Chat" -i ca.crt    (package libnss3-tools)"""


def urls(certificate: Certificate, host: str, port: int) -> list[str]:
    """Where other devices find a server that listens on this host, the likeliest to work first."""
    if host not in EVERYWHERE:
        address = _address(host)
        names = [name for name in certificate.hosts if _address(name) is None and _is_reached_from_outside(name, False)]
        elsewhere = address is not None and not address.is_loopback and not _is_in(certificate, host)
        return [f"https://{_bracketed(name)}:{port}" for name in (elsewhere and names) or [host]]
    likeliest = sorted(certificate.hosts, key=lambda name: _address(name) is None)  # addresses; stable otherwise
    return [f"https://{_bracketed(name)}:{port}" for name in likeliest if _is_reached_from_outside(name, host == "::")]


def _is_in(certificate: Certificate, host: str) -> bool:
    return (_address(host) or host.lower()) in [_address(name) or name.lower() for name in certificate.hosts]


def _is_reached_from_outside(host: str, over_ipv6: bool) -> bool:
    address = _address(host)
    if address is None:
        return host != "localhost" and "*" not in host
    # Browsers take no link-local IPv6 address: it would need the name of an interface.
    return not address.is_loopback and (address.version == 4 or (over_ipv6 and not address.is_link_local))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def fingerprint(certificate: Path) -> str:
    """SHA-256 in the form that every certificate viewer shows."""
    return x509.load_pem_x509_certificate(certificate.read_bytes()).fingerprint(hashes.SHA256()).hex(":").upper()


def qr_code(text: str, colours: bool = False) -> str:
    """A QR code of half blocks, light ones drawn; with ANSI colours it is also right on a light terminal."""
    rows = [[*row] for row in segno.make(text, error="l", micro=False).matrix_iter(border=2)]
    rows += [[0] * len(rows[0])] * (len(rows) % 2)
    blocks = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
    lines = ["".join(map(blocks.get, zip(*two, strict=True))) for two in zip(rows[::2], rows[1::2], strict=True)]
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" if colours else line for line in lines)


def announcement(certificate: Certificate, host: str, port: int, colours: bool = False) -> str:
    """What somebody needs to open the page from another device, to be printed as it stands."""
    addresses = urls(certificate, host, port) or [f"https://localhost:{port}"]
    parts = ["\n".join(addresses), qr_code(addresses[0], colours)]
    if certificate.ca is not None:
        served = dict.fromkeys(_own_addresses() if host in EVERYWHERE else [host])
        left_out = [a for a in served if not _is_in(certificate, a) and (":" not in a or host not in EVERYWHERE)]
        if left_out:
            parts.append(
                f"Not in the certificate: {', '.join(left_out)}. It is for this computer's names and private addresses "
                "only; for others there is --certfile with a certificate of your own."
            )
        parts.append(
            f"Once, every device has to trust {certificate.ca}. It is also at {addresses[0]}/ca.crt, where the browser "
            "still warns.\nIt is good for this computer, .local and private addresses only. Compare its SHA-256 "
            f"fingerprint first:\n{fingerprint(certificate.ca)}"
        )
        parts.append(TRUST)
    return "\n\n".join(parts)
