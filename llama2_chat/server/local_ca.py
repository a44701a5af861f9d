"""A certificate authority of this computer, and the certificate that it signs for it, made and renewed in certs/.

    curl --cacert certs/ca.crt https://localhost:7860/livez

Whoever trusts ca.crt trusts it for this computer's names, .local and private addresses, and for nothing else: the key
of the authority is good for no other site, even if it is stolen.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from llama2_chat import ROOT
from llama2_chat.errors import ChatError
from llama2_chat.server.certificate import Certificate
from llama2_chat.server.hosts import PRIVATE_RANGES, as_address, own_hosts

log = logging.getLogger("llama2_chat")

CERTS = ROOT / "certs"
CA_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=397, seconds=-1)  # both ends count, and browsers refuse more than 398 days
RENEW_BEFORE = timedelta(days=30)
CLOCK_SKEW = timedelta(days=1)  # a phone whose clock is late must not find a certificate from the future

Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def local_certificate(
    folder: Path = CERTS, *, hosts: Sequence[str] | None = None, now: datetime | None = None
) -> Certificate:
    """The leaf in the folder; made, or renewed, if it does not cover these hosts for another 30 days.

    hosts: names and addresses; by default all of this computer's, see own_hosts().
    The authority stays as long as it can. Raises ChatError when the files cannot be read or written.
    """
    hosts = own_hosts() if hosts is None else tuple(hosts)
    now = now or datetime.now(UTC)
    with _translate_errors(folder):
        leaf = _usable_leaf(folder, hosts, now)  # a folder where nothing is to be done may be read-only
        if leaf is None:
            _make_folder(folder)
            with FileLock(folder / ".lock", timeout=10):
                leaf = _usable_leaf(folder, hosts, now) or _make_leaf(folder, hosts, now)
    return Certificate(folder / "server.crt", folder / "server.key", hosts, leaf.not_valid_after_utc, folder / "ca.crt")


def needs_new_certificate(folder: Path) -> bool:
    """Whether local_certificate() would make one. Makes none, but raises ChatError where that would."""
    with _translate_errors(folder):
        needed = _usable_leaf(folder, own_hosts(), datetime.now(UTC)) is None
        if needed:
            tempfile.TemporaryFile(dir=folder if folder.exists() else folder.parent).close()
    return needed


@contextlib.contextmanager
def _translate_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ChatError(
            f"The certificates in {folder} cannot be read or written: {error.strerror or error}. Make the folder "
            "yours, or use a certificate of your own with --certfile and --keyfile."
        ) from error


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
    ca = _usable_ca(folder, hosts, now)
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


def _usable_ca(folder: Path, hosts: Sequence[str], now: datetime) -> Pair:
    """The authority in the folder, or a new one, whose making the log tells if devices trust the old one."""
    ca = _read_pair(folder, "ca")
    flaw = _flaw_of_ca(ca, hosts, now) if ca else "is damaged or without its key"
    if ca and not flaw:
        return ca
    first = not (folder / "ca.crt").exists()
    ca = _new_ca(hosts, now)
    _write_pair(folder, "ca", *ca)
    if not first:
        log.warning(
            "%s %s, so there is a new certificate authority: every device must trust the new ca.crt, and should "
            "forget the old one.",
            folder / "ca.crt",
            flaw,
        )
    return ca


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
    address = as_address(host)
    return address is not None and address in tree


def _new_ca(hosts: Sequence[str], now: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # "local", without a leading dot, is RFC 5280's way to write .local; older GnuTLS and Java take no other.
    names = dict.fromkeys(["localhost", "local", *(host for host in hosts if as_address(host) is None)])
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


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate | x509.Name, ec.EllipticCurvePrivateKey],
    validity: tuple[datetime, datetime],
    extensions: Mapping[x509.ExtensionType, bool],
) -> x509.Certificate:
    """issuer: the authority's certificate, or its name while that is in the making, and its key.

    extensions: and whether each is critical.
    """
    authority, issuer_key = issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority if isinstance(authority, x509.Name) else authority.subject)
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
    address = as_address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


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
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        return None
    return certificate, key


def _write_pair(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    # A program that reads between the two writes finds a pair that does not match, and then waits for the lock.
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
