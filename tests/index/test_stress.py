"""Many concurrent writers and readers, checked against dictionaries: ``stress.py`` for a few seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stress.py")
SECONDS = os.environ.get("FINELIP_STRESS", "5")


@pytest.mark.parametrize(
    "options",
    [["--processes", "2", "--threads", "2"], ["--processes", "1", "--dtype", "int8"], ["--memory", "--threads", "4"]],
    ids=["folder", "folder in int8", "memory"],
)
def test_nothing_is_lost_or_wrong_under_stress(options: list[str]) -> None:
    """Run ``FINELIP_STRESS=600 pytest tests/index/test_stress.py`` for longer."""
    command = [sys.executable, str(SCRIPT), "--seconds", SECONDS, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=float(SECONDS) + 1500)
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout)
    assert (report["faults"], report["errors"]) == ({}, {}), ended.stdout + ended.stderr
    assert ended.returncode == 0
    assert report["searches"] > 0
    assert report["acknowledged"] > 0
