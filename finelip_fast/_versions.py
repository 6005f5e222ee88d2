"""Versions of installed packages and of this library."""

from __future__ import annotations

from contextlib import suppress


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    from importlib import metadata  # slow for a command that only prints help

    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def library_version() -> str:
    """Version of this library; ``"0"`` if it runs without having been installed."""
    return installed("finelip-fast").get("finelip-fast", "0")
