"""Versions of packages."""

from __future__ import annotations

from finelip_fast._versions import installed


def test_only_installed_packages_have_versions() -> None:
    assert list(installed("finelip-fast", "no-such-package-here", "torch")) == ["finelip-fast", "torch"]
