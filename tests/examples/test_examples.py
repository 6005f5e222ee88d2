"""The scripts in ``examples/`` do what their first lines promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finelip_fast.datasets import Scenes

EXAMPLES = Path(__file__).parents[2] / "examples"
CAPTIONS = {scene.id: scene.caption for scene in Scenes("test", 8, image_size=256)}


def run(name: str, *arguments: str | Path, cwd: Path, stdin: str = "") -> str:
    """Return the output of a script that runs in a process of its own, as for a user."""
    process = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        cwd=cwd,
        input=stdin,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_run_here() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests


def test_search_folder(scenes: Path, tmp_path: Path) -> None:
    name = "test-000003"
    lines = run("search_folder", scenes, CAPTIONS[name], "-k", "2", cwd=tmp_path).splitlines()
    assert len(lines) == 2
    assert f"{name}.png" in lines[0]
    again = run("search_folder", scenes, CAPTIONS[name], "-k", "2", cwd=tmp_path).splitlines()
    assert again == lines


def test_compare_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    printed = run("compare_checkpoints", checkpoint, checkpoint, "--data", "scenes:test:8", cwd=tmp_path)
    assert "baseline" in printed
    assert "candidate" in printed


def test_ask_a_server(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    import finelip_fast

    finelip_fast.Retriever(engine="torch", index=tmp_path / "index").add_images(scenes, progress=False)
    names = ["test-000002", "test-000005"]
    words = ["--index", "index", "--port", "0", "--engine", "torch"]
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "finelip_fast.cli", "serve", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            captions = "\n\n".join(CAPTIONS[name] for name in names)
            answers = [json.loads(line) for line in run("ask_a_server", url, cwd=tmp_path, stdin=captions).splitlines()]
        finally:
            server.terminate()
    assert [answer["query"] for answer in answers] == [CAPTIONS[name] for name in names]
    assert [Path(answer["hits"][0]["id"]).stem for answer in answers] == names
