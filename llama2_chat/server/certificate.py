"""A certificate of one's own, read and checked at the start: what browsers would not take is refused in a sentence."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from llama2_chat.errors import ChatError


@dataclass(frozen=True)
class Certificate:
    """A certificate that was checked, and where it lies."""

    certfile: Path
    keyfile: Path
    hosts: tuple[str, ...]  # names and addresses that it is good for
    not_after: datetime
    ca: Path | None = None  # what other devices are to trust; None for one's own certificate
    password: str | None = field(default=None, repr=False)  # of the key


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
        raise ChatError(
            f"The key in {keyfile} is not the key of {certfile}. Use the certificate and key that belong together."
        )
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


def _private_key(keyfile: Path, password: str | None) -> PrivateKeyTypes:
    pem = _read(keyfile)
    encrypted = re.search(rb"BEGIN ENCRYPTED|4,ENCRYPTED", pem) is not None
    if encrypted and not password:
        raise ChatError(f"The key in {keyfile} is encrypted. Set its password in the environment as KEY_PASSWORD.")
    try:
        return serialization.load_pem_private_key(pem, password.encode() if encrypted and password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise ChatError(f"KEY_PASSWORD does not open {keyfile}. Set the password the key was made with.") from error
        raise ChatError(
            f"{keyfile} holds no private key in PEM form, the one that starts with -----BEGIN PRIVATE KEY-----. "
            "Name the file that was made with the certificate in --keyfile."
        ) from error


def _hosts_of(leaf: x509.Certificate, certfile: Path) -> tuple[str, ...]:
    names: list[x509.GeneralName] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    hosts = tuple(str(name.value) for name in names if isinstance(name, (x509.DNSName, x509.IPAddress)))
    if not hosts:
        raise ChatError(
            f"{certfile} names no host in subjectAltName, so no browser can ever trust it. Make it anew with "
            'openssl req -x509 ... -addext "subjectAltName=DNS:localhost,IP:127.0.0.1", or use --https alone.'
        )
    return hosts
