"""What every recorded result says of where it comes from: commit, versions."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from finelip_fast._files import installed

# Where the tree travels without .git: `git describe --always --dirty --abbrev=40` of where it came from.
COMMIT = "FINELIP_BENCH_COMMIT"

_RESULTS = "bench/results"


def commit() -> dict[str, Any]:
    """The commit's ``id``, and whether the tree was ``dirty``, records apart."""
    stated = os.environ.get(COMMIT)
    if stated:
        return {"id": stated.removesuffix("-dirty"), "dirty": stated.endswith("-dirty")}
    head, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", f":(exclude){_RESULTS}")
    return {"id": head or "unknown", "dirty": head is None or bool(status)}


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package; None: it is not installed."""
    present = installed(*packages)
    return {name: present.get(name) for name in packages}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
