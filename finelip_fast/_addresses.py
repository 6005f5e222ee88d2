"""Conventions of servers and clients: which addresses belong to this machine, and where the API key is looked up."""

from __future__ import annotations

import ipaddress

API_KEY_VARIABLE = "FINELIP_API_KEY"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: ``localhost``, a name below it, 127.0.0.0/8 or ``::1``; no name is resolved."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
