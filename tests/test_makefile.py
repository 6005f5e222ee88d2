"""The Makefile lists its targets, and keeps no results without a name for the machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_make_alone_lists_the_targets() -> None:
    listed = make().stdout
    assert listed == make("help").stdout
    for target in ("demo", "test", "lint", "docs", "bench", "record", "ring", "clean"):
        assert f"make {target} " in listed


@pytest.mark.parametrize("target", ["record", "ring"])
def test_results_need_the_name_of_a_machine(target: str) -> None:
    run = make(target, "MACHINE=")
    assert run.returncode == 2
    assert "error: expected MACHINE=NAME" in run.stderr
