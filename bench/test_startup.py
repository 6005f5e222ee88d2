"""Time ``finelip search`` of 60 pictures from the shell to its hits, beside a Python that only imports a package."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contest import Contender, Result, clock, compete
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.datasets import Scenes

PICTURES, ROUNDS = 60, 7
BASELINE = "import open_clip"
CONTENDERS = ("finelip search", "import torch", BASELINE, "import sentence_transformers")


def exit_code(folder: Path, command: list[str]) -> Tensor:
    """Run a command in a process of its own."""
    return torch.tensor([subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode])


@cache
def race() -> dict[str, Result]:
    folder = Path(tempfile.mkdtemp())
    scenes = list(Scenes("test", PICTURES))
    for scene in scenes:
        scene.draw().save(folder / f"{scene.id}.png")
    index = str(folder / "index")
    assert main(["add", str(folder), "--index", index, "--quiet"]) == 0
    search = ["-m", "finelip_fast.cli", "search", scenes[7].caption, "--index", index, "--quiet"]
    commands = {name: search if name == "finelip search" else ["-c", name] for name in CONTENDERS}
    runs = {name: partial(exit_code, folder, [sys.executable, "-P", *command]) for name, command in commands.items()}
    return compete({name: Contender(run, 0.0) for name, run in runs.items()}, torch.tensor([0]), rounds=ROUNDS)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_startup(benchmark: Any, contender: str) -> None:
    clock.into(benchmark, race(), contender, group="from the shell to an answer", baseline=BASELINE)
