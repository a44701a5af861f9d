"""Names and addresses: those of this computer, which of them a certificate made here is for, which it is asked by."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

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


def own_hosts() -> tuple[str, ...]:
    """localhost, this computer's names, and every private address of its interfaces, the one others use first."""
    name = socket.gethostname().lower().rstrip(".")
    bare = name.partition(".")[0]
    names = ["localhost", f"{bare}.local", name, bare]
    return tuple(
        dict.fromkeys(
            [name for name in names if HOST_NAME.fullmatch(name) and name not in TOP_LEVEL_DOMAINS]
            + [address for address in ("127.0.0.1", "::1", *own_addresses()) if is_private(address)]
        )
    )


def own_addresses() -> list[str]:
    """Every address of every interface; first the one that leads outside, so that no container bridge is before it."""
    addresses: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # UDP: looks up the route and sends nothing
        addresses = [probe.getsockname()[0]]
    for interface in psutil.net_if_addrs().values():
        addresses += [a.address.partition("%")[0] for a in interface if a.family in (socket.AF_INET, socket.AF_INET6)]
    return addresses


def is_private(address: str) -> bool:
    return any(ipaddress.ip_address(address) in network for network in PRIVATE_RANGES)


def as_address(host: str) -> Address | None:
    """None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def host_of(netloc: str) -> str:
    """The name or address of a Host header, without its port: "[::1]:7860" is ::1. Empty if it makes no sense."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class AllowedHosts:
    """The names by which this server may be asked.

    A page of another site whose name an attacker lets point here (DNS rebinding) would else count as ours. It cannot
    do that with an address, so every address is allowed.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """names: "*.example.com" is every name one label below; "*" is any name."""
        self._names = {name.strip().lower().rstrip(".") for name in names} - {""}

    def __contains__(self, host: str) -> bool:
        wildcard = "*." + host.partition(".")[2]
        own = host.endswith(".localhost") or as_address(host.partition("%")[0]) is not None
        return own or not self._names.isdisjoint((host, wildcard, "*"))
