"""Provenance of every recorded result (commit, versions), and records of races that pytest does not run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_fast._versions import installed

if TYPE_CHECKING:
    from contest import Result

# Set where the tree is copied without .git: the output of `git describe --always --dirty --abbrev=40` at its source.
COMMIT = "FINELIP_BENCH_COMMIT"

_RESULTS = "bench/results"


def commit() -> dict[str, Any]:
    """Return the commit's ``id``, and whether the tree was ``dirty``, ignoring the records."""
    stated = os.environ.get(COMMIT)
    if stated:
        return {"id": stated.removesuffix("-dirty"), "dirty": stated.endswith("-dirty")}
    head, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", f":(exclude){_RESULTS}")
    return {"id": head or "unknown", "dirty": head is None or bool(status)}


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, or None if it is not installed."""
    present = installed(*packages)
    return {name: present.get(name) for name in packages}


def opened(path: Path) -> dict[str, Any]:
    """Open a record to add to; it is empty if the file does not exist.

    Raises:
        ValueError: The record is of another commit; results in one file must be comparable.
    """
    present = commit()
    if not path.exists():
        return {"benchmarks": [], "left_out": {}, "commit_info": present}
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if run["commit_info"] != present:
        raise ValueError(
            f"{path} is a record of commit {run['commit_info']['id'][:10]}: remove it, or name another file"
        )
    return run


def add(path: Path, group: str, results: Mapping[str, Result], *, baseline: str, threads: int) -> None:
    """Add a group to a record in pytest-benchmark's format; create the file if missing, and replace a group of the same name.

    The record's ``left_out`` gives the reason for each missing result, by group and contender.

    Args:
        path: The JSON file.
        group: Name of the group.
        results: Results of all contenders; their ``info`` may hold the version of a ``package``.
        baseline: Contender that the others are compared with.
        threads: Number of threads of each contender.

    Raises:
        ValueError: The record is of another commit.
    """
    run = opened(path)
    peers = {result.info["package"]: result.info["version"] for result in results.values() if "package" in result.info}
    run["machine_info"] = run.get("machine_info", {}) | peers | _machine() | {"threads": threads}
    run["datetime"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run["benchmarks"] = [benchmark for benchmark in run["benchmarks"] if benchmark["group"] != group]
    for name, result in results.items():
        if not result.refusal:
            info = result.info | {"contender": name, "baseline": baseline}
            run["benchmarks"].append({"group": group, "stats": {"median": result.info["p50"]}, "extra_info": info})
    run["left_out"][group] = {name: result.refusal for name, result in results.items() if result.refusal}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _machine() -> dict[str, Any]:
    import torch
    from cpuinfo import get_cpu_info

    about = {"machine": platform.machine(), "python_version": platform.python_version(), "torch": torch.__version__}
    return about | {"cpu": {"brand_raw": get_cpu_info().get("brand_raw", platform.machine())}, "gpus": []}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
