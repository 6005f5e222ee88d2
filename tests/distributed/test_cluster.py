"""The Ray cluster: errors if there is none, and ownership."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finelip_fast.distributed import Shards, index_images
from finelip_fast.distributed import cluster as cluster_module
from finelip_fast.distributed.cluster import _connect, cluster
from finelip_fast.errors import EngineError


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for use in (lambda: index_images([], tmp_path / "index"), lambda: Shards([tmp_path])):
        with pytest.raises(EngineError, match=r"ray is not installed .*pip install 'finelip-fast\[distributed\]'"):
            use()
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(EngineError, match=f"RAY_ADDRESS='{address}' cannot be used: .*refused; start it, or unset"):
        _connect(None, 1)


@pytest.mark.parametrize("failures", [1, 2])
def test_ray_that_does_not_start_is_tried_once_more(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    calls: list[str] = []

    def init(**_: Any) -> None:
        calls.append("init")
        signal.signal(signal.SIGTERM, lambda *_: None)
        if calls.count("init") <= failures:
            raise Exception("The current node timed out during startup.")  # what Ray raises on a busy machine

    ray = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: calls.append("shutdown"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_module, "_users", 0)
    monkeypatch.setattr(cluster_module, "_handler", signal.SIG_DFL)
    before = signal.getsignal(signal.SIGTERM)
    message = r"twice: The current node timed out during startup; try again when .*, or start a cluster with 'ray start"
    with pytest.raises(EngineError, match=message) if failures == 2 else nullcontext(), cluster(1):
        pass
    assert calls == ["init", "shutdown"] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_its_address_this_machine_is_used(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(EngineError, match="or unset RAY_ADDRESS to use only this machine"):
        _connect(ray, 1)
    monkeypatch.delenv("RAY_ADDRESS")
    with cluster(1) as module:
        assert module.is_initialized()


def test_the_cluster_lives_as_long_as_its_users(ray: Any) -> None:
    with cluster(2) as shared_ray:
        assert shared_ray is ray
    assert ray.is_initialized()


HANDLERS = """
import signal
from finelip_fast.distributed.cluster import cluster
def mine(*_): pass
for handler in (signal.SIG_DFL, mine):
    signal.signal(signal.SIGTERM, handler)
    with cluster(1):
        print(signal.getsignal(signal.SIGTERM) is mine)
    print(signal.getsignal(signal.SIGTERM) is handler)
"""


def test_a_cluster_leaves_the_process_its_signals() -> None:
    """Ray replaces a command's signal handler with its own and does not restore it."""
    if importlib.util.find_spec("ray") is None:  # not imported, because its settings must come first
        pytest.skip("ray is not installed")
    ended = subprocess.run([sys.executable, "-I", "-c", HANDLERS], capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["False", "True", "True", "True"], ended.stderr
