"""Races: who takes part, and that the time of one holds nothing of what went before."""

from __future__ import annotations

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


def test_the_cache_is_emptied_without_leaving_writes_behind(monkeypatch):
    """What a fill left in the L2 cache of a GPU would be written to memory beside the run."""

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
