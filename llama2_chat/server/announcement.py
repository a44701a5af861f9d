"""What is printed at the start with HTTPS: where other devices find the page, and how they come to trust it."""

from __future__ import annotations

from pathlib import Path

import segno
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from llama2_chat.server.certificate import Certificate
from llama2_chat.server.hosts import as_address, own_addresses

ALL_INTERFACES = ("0.0.0.0", "::")
HOW_TO_TRUST = """\
Windows          certutil -addstore -user Root ca.crt
macOS            security add-trusted-cert -r trustRoot -k ~/Library/Keychains/login.keychain-db ca.crt
iPhone, iPad     open in Safari; Settings > Profile Downloaded; General > About > Certificate Trust Settings: full trust
Android          Settings > Security > Encryption & credentials > Install a certificate > CA certificate
Debian, Ubuntu   sudo cp ca.crt /usr/local/share/ca-certificates/llama2-chat.crt && sudo update-ca-certificates
Fedora, Arch     sudo trust anchor ca.crt
Firefox          Settings > Privacy & Security > View Certificates > Authorities > Import, for websites
Chrome on Linux  certutil -d sql:$HOME/.pki/nssdb -A -t C,, -n "Llama 2 Chat" -i ca.crt    (package libnss3-tools)"""


def announcement(certificate: Certificate, host: str, port: int, colours: bool = False) -> str:
    """What somebody needs to open the page from another device, to be printed as it stands."""
    addresses = urls(certificate, host, port) or [f"https://localhost:{port}"]
    parts = ["\n".join(addresses), qr_code(addresses[0], colours)]
    if certificate.ca is not None:
        served = dict.fromkeys(own_addresses() if host in ALL_INTERFACES else [host])
        left_out = [a for a in served if not _is_in(certificate, a) and (":" not in a or host not in ALL_INTERFACES)]
        if left_out:
            parts.append(
                f"Not in the certificate: {', '.join(left_out)}. It is for this computer's names and private addresses "
                "only; for others there is --certfile with a certificate of your own."
            )
        parts.append(
            f"Every device must trust {certificate.ca} once. It is also at {addresses[0]}/ca.crt, where the browser "
            "still warns.\nIt is good for this computer, .local and private addresses only. Compare its SHA-256 "
            f"fingerprint first:\n{fingerprint(certificate.ca)}"
        )
        parts.append(HOW_TO_TRUST)
    return "\n\n".join(parts)


def urls(certificate: Certificate, host: str, port: int) -> list[str]:
    """Where other devices find a server that listens on this host, the likeliest to work first."""
    if host in ALL_INTERFACES:
        hosts = [name for name in certificate.hosts if _is_reached_from_outside(name, over_ipv6=host == "::")]
        hosts.sort(key=lambda name: as_address(name) is None)  # addresses first; stable otherwise
    else:
        hosts = _names_instead_of(host, certificate) or [host]
    return [f"https://{_bracketed(name)}:{port}" for name in hosts]


def _names_instead_of(host: str, certificate: Certificate) -> list[str]:
    """Names that browsers accept, where they would refuse the address itself."""
    address = as_address(host)
    if address is None or address.is_loopback or _is_in(certificate, host):
        return []
    names = [name for name in certificate.hosts if as_address(name) is None]
    return [name for name in names if _is_reached_from_outside(name, over_ipv6=False)]


def _is_in(certificate: Certificate, host: str) -> bool:
    return (as_address(host) or host.lower()) in [as_address(name) or name.lower() for name in certificate.hosts]


def _is_reached_from_outside(host: str, over_ipv6: bool) -> bool:
    address = as_address(host)
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
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = ["".join(blocks[both] for both in zip(above, below, strict=True)) for above, below in pairs]
    return "\n".join(f"\x1b[97;40m{line}\x1b[0m" if colours else line for line in lines)
