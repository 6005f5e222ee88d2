"""Races: who takes part, and that a contender's time includes nothing from before."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import contest
import pytest
import torch
from contest import Contender

from finelip_fast.kernels import floor


def test_contenders_can_be_left_out(monkeypatch):
    ran = []

    def answer(name):
        ran.append(name)
        return torch.ones(2)

    contenders = {
        name: Contender(lambda name=name: answer(name), 1e-5) for name in ("ours", "peer, fp16", "another peer")
    }
    monkeypatch.setenv("FINELIP_BENCH_WITHOUT", "peer, fp16; another")
    results = contest.compete(contenders, torch.ones(2, dtype=torch.float64), rounds=1)
    assert list(results) == ["ours"]
    assert set(ran) == {"ours"}


RACERS = """
import os, signal, time
import torch
from contest import Contender

def entries(size):
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_later():
        turns.append(0)
        if len(turns) > 1:
            os._exit(7)
        return torch.ones(size)

    def refuses():
        raise ValueError("no such card")

    turns = []
    runs = {
        "right": lambda: torch.ones(size),
        "killed": killed,
        "killed later": killed_later,
        "wrong": lambda: torch.zeros(size),
        "refuses": refuses,
        "hangs": lambda: time.sleep(600),
    }
    noted = lambda answer: {"pid": os.getpid()}
    return {name: lambda run=run: Contender(run, 1e-5, share=0.5, notes=noted) for name, run in runs.items()}
"""


@pytest.fixture
def racers(tmp_path, monkeypatch):
    """A module of contenders, like a bench file."""
    (tmp_path / "racers.py").write_text(RACERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "racers", raising=False)
    return importlib.import_module("racers")


def raced(racers, without, *, apart):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINELIP_BENCH_WITHOUT", without)
        return contest.race(racers.entries, 3, expected=torch.ones(3, dtype=torch.float64), rounds=2, apart=apart)


def test_who_is_wrong_or_cannot_run_has_no_time(racers):
    results = raced(racers, "killed; hangs", apart=False)
    assert list(results) == ["right", "wrong", "refuses"]
    assert results["wrong"].refusal.startswith("wrong by 1")
    assert results["refuses"].refusal == "ValueError: no such card"
    assert [len(result.seconds) for result in results.values()] == [2, 0, 0]


@pytest.mark.slow
def test_what_ends_a_contender_in_a_process_of_its_own_ends_no_other(racers):
    results = raced(racers, "wrong; refuses; hangs", apart=True)
    assert {name: result.refusal for name, result in results.items()} == {
        "right": "",
        "killed": "failed: its process ended by SIGKILL",
        "killed later": "failed: its process ended by exit code 7",
    }
    right = results["right"]
    assert len(right.seconds) == 2
    assert {"max_error": 0.0, "share": 0.5}.items() <= right.info.items()
    assert 0 < right.info["p50"] < 1
    assert right.info["pid"] != os.getpid()


@pytest.mark.slow
def test_a_race_of_the_benches_runs_apart_as_on_a_gpu():
    """Its contenders are found by file name and get the same inputs; otherwise their answers would be wrong."""
    code = (
        "import test_clim, contest, json; contest.race.__kwdefaults__['apart'] = True; race = test_clim.scores_race(2)"
    )
    code += "; print(json.dumps({name: [result.refusal, len(result.seconds)] for name, result in race.items()}))"
    environment = os.environ | {
        "PYTHONPATH": str(Path(contest.__file__).parent),
        "FINELIP_BENCH_ITEMS": "16",
        "FINELIP_BENCH_WITHOUT": "loop; plain; late; float32",
    }
    code = f"from finelip_fast.kernels import floor; floor.peaks = lambda: {{'bytes/s': 1e10, 'flops/s': {{}}}}; {code}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    results = json.loads(process.stdout) if process.returncode == 0 else process.stderr
    assert results == {f"finelip_fast, {dtype}": ["", 3] for dtype in ("bfloat16", "int8")}


def test_a_contender_that_does_not_answer_is_ended(racers, tmp_path):
    racer = contest._Apart(racers.entries, (3,), "hangs", tmp_path / "none.pt", 0.5)
    assert racer.check().refusal == "failed: no answer within 0.5 s"
    racer.end()
    assert not racer._process.is_alive()


def test_the_cache_is_emptied_without_leaving_writes_behind(monkeypatch):
    """Data left in a GPU's L2 cache by a fill would be written to memory during the run."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    memory = torch.ones(1 << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(floor, "_flush", lambda: memory)
    assert floor.timed(lambda: None) == pytest.approx(1e-3)
    assert memory.all()
    assert memory._version == 0
