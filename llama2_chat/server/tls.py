"""HTTPS: which certificate is served, and how a running server notices that there is a new one.

local_ca.py makes one for this computer, certificate.py checks one of one's own, announcement.py says how other devices
come to trust it.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from llama2_chat.errors import ChatError
from llama2_chat.server.certificate import Certificate, own_certificate
from llama2_chat.server.local_ca import local_certificate

log = logging.getLogger("llama2_chat")


def get_certificate(certfile: Path | None, keyfile: Path | None, password: str | None) -> Certificate:
    """One's own certificate if files are named, else the local one. Raises ChatError, saying what to do."""
    if certfile is None:
        if keyfile is not None:
            raise ChatError("A keyfile needs its certificate. Set --certfile too.")
        return local_certificate()
    return own_certificate(certfile, keyfile, password)


class Certificates:
    """TLS 1.2 and later with what get() returns, called again at a handshake once check_every_s have passed.

    So a server that outlives its certificate, or a laptop that changes networks, needs no restart.
    """

    def __init__(self, get: Callable[[], Certificate], check_every_s: float = 60) -> None:
        self._get, self._check_every_s = get, check_every_s
        self.context = self._current = _context(get())  # what a server is given
        self._checked = time.monotonic()
        self.context.sni_callback = self._use_current  # called for clients that name no server, too

    def read_again(self) -> bool:
        """Serve what get() returns now. False, with a line in the log, if that cannot be served: then all stays as it
        was."""
        self._checked = time.monotonic()
        try:
            self._current = _context(self._get())
        except ChatError as error:
            log.warning("%s Until then the certificate stays as it was.", error)
            return False
        return True

    def _use_current(self, connection: ssl.SSLObject, _server_name: str | None, _first: ssl.SSLContext) -> None:
        if time.monotonic() - self._checked > self._check_every_s:
            self.read_again()
        connection.context = self._current


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
