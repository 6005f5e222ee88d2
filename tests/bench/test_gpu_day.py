"""A rehearsal of the GPU run without a GPU: every step works, and none can use up the others' time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_day
import pytest
from gpu_day import LOG, RESULTS, SETTINGS, STEPS, Step, package, run_group, spend

pytest.importorskip("triton", reason="Triton is not installed")


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


@pytest.mark.slow
def test_every_step_works_without_an_installed_package(tmp_path):
    """Python sees the package only through the script's own folder of links, in an empty environment."""
    command = [sys.executable, gpu_day.__file__, "--tiny", "--out", str(tmp_path / "day")]
    command += ["--minutes", "120"]  # the limits of steps grow with it: no machine is too slow
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=7200)
    assert process.returncode == 0, process.stderr
    lines = lines_of(tmp_path / "day")
    log = (tmp_path / "day" / LOG).read_text()
    assert {line["step"]: line["ended"] for line in lines if "ended" in line} == dict.fromkeys(STEPS, 0), log
    for step in STEPS:
        assert any(line["step"] == step and "ended" not in line for line in lines), f"{step} found nothing"
    assert not [line for line in lines if line.get("refused") or line.get("wrong") or line.get("exit_code")]
    assert {path.name for path in (tmp_path / "day").iterdir()} <= {RESULTS, LOG, SETTINGS}


def test_a_step_that_hangs_ends_with_what_it_started(tmp_path):
    child = "import time, pathlib; time.sleep(4); pathlib.Path('late').touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with (tmp_path / LOG).open("ab") as log:
        ended = run_group([sys.executable, "-c", parent], 2, log, os.environ, tmp_path)
    assert ended == "time limit"
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_what_no_longer_fits_is_skipped_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "STEPS", {"long": Step(lambda: None, 100, 90), "short": Step(lambda: None, 1, 0)})
    monkeypatch.setattr(gpu_day, "run_group", lambda command, limit, *rest: limit)
    spend(tmp_path, tmp_path, 30, ["long", "short"], tiny=False)
    skipped, run = lines_of(tmp_path)
    assert (skipped["step"], run["step"], run["ended"]) == ("long", "short", 1)
    assert "90 needed" in skipped["skipped"]


def test_the_package_is_imported_from_the_checkout_with_its_version():
    code = "import finelip_fast; print(finelip_fast.__file__, finelip_fast.__version__)"
    with package() as folder:
        command = [sys.executable, "-S", "-c", code]  # without the packages of this environment
        words = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.split()
        assert words[0] == str(folder / "finelip_fast" / "__init__.py")
        assert words[1][0].isdigit()


def test_all_that_the_sweep_would_launch_is_compiled_before():
    launches = gpu_day.launches_of(90)
    assert len(launches) > 100
    assert {"clim", "atrm"} <= {word for launch in launches for word in launch.kernel.fn.__module__.split(".")}
