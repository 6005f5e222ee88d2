"""What a server and its clients agree on: which addresses are this machine's own, and where the key is looked for."""

from __future__ import annotations

import ipaddress

API_KEY_VARIABLE = "FINELIP_API_KEY"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own: ``localhost``, 127.0.0.0/8 or ``::1``; no name is looked up."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
