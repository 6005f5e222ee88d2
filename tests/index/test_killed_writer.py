"""A writer killed at any moment: nothing acknowledged is lost, and nothing half-written is visible."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import IO

import torch

from finelip_fast.index import Index, IndexSpec

SPEC = IndexSpec("abc", 3, 8)
ROUNDS = int(os.environ.get("FINELIP_KILLS", 6))
VICTIM = Path(__file__).with_name("kill_a_writer.py")


def after(model: dict[str, int], change: list) -> dict[str, int]:
    kind, ids, values = change
    left = {item: value for item, value in model.items() if item not in ids}
    return left if kind == "delete" else left | dict(zip(ids, values, strict=True))


def acknowledged(stream: IO[bytes], count: int) -> list[bytes]:
    """Read lines until so many changes are acknowledged."""
    lines = []
    for line in stream:
        lines.append(line)
        if line == b'["done"]\n':
            count -= 1
            if not count:
                break
    return lines


def test_a_killed_writer_loses_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    """Run ``FINELIP_KILLS=100 pytest tests/index/test_killed_writer.py`` for more rounds."""
    model: dict[str, int] = {}
    changes = 0
    for seed in range(ROUNDS):
        choose = random.Random(seed)
        command = [sys.executable, str(VICTIM), str(tmp_path / "index"), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:
            assert victim.stdout is not None
            output = acknowledged(victim.stdout, choose.randint(2, 30))
            time.sleep(choose.uniform(0, 0.02))
            victim.kill()
            output += victim.stdout.readlines()
        lines = [json.loads(line) for line in output if line.endswith(b"\n")]
        pending = None
        for word, *change in lines:
            if word == "begin":
                pending = change
            else:
                model, pending = after(model, pending), None
                changes += 1
        with closing(Index(SPEC, tmp_path / "index")) as index:
            values = {item: meta["value"] for item, meta in zip(index.ids, index.metadata, strict=True)}
            allowed = [model] if pending is None else [model, after(model, pending)]
            assert values in allowed, f"round {seed}"
            model = values
            rows = index.embeddings[:, 0].float()
            row_values = (torch.atan2(rows[:, 1], rows[:, 0]) * 1000).round().int().tolist()
            assert all(abs(value - values[item]) <= 1 for value, item in zip(row_values, index.ids, strict=True))
            assert index.check() == {}
    assert changes > ROUNDS
    with closing(Index(SPEC, tmp_path / "index")) as index:
        strays = index.maintain()["unreferenced_segments"]
        assert strays <= ROUNDS  # a killed writer leaves at most one unreferenced file
        assert len(list((tmp_path / "index" / "segments").glob("*.safetensors"))) <= 1 + strays
        assert not list((tmp_path / "index" / "segments").glob(".*"))
