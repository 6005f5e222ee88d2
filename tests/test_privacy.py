"""Nothing is reported or left behind: no connections, and no files outside the folders named for them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import finelip_fast
from finelip_fast.model import FineLIP

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and system calls are Linux's")

# All uses of the library without a hub, a cluster or an object store; run in a process of its own.
JOURNEY = """
import sys
from pathlib import Path

calls = []
sys.addaudithook(lambda name, given: name in ("socket.connect", "socket.getaddrinfo") and calls.append((name, given[-1])))

import finelip_fast
from finelip_fast.export.to_onnx import export_onnx

checkpoint, index = sys.argv[1:]
finelip_fast.load(checkpoint)
retriever = finelip_fast.Retriever(checkpoint, engine="torch", device="cpu", index=index)
retriever.add_texts(["a cat", "a dog"], progress=False)
assert len(retriever.search(["a cat"], k=1)[0]) == 1
export_onnx(checkpoint, data="scenes:test:8", progress=False)
retriever = finelip_fast.Retriever(checkpoint, engine="onnx", device="cpu")
retriever.add_texts(["a cat", "a dog"], progress=False)
assert len(retriever.search(["a cat"], k=1)[0]) == 1
print(finelip_fast.Retriever(checkpoint, engine="auto", device="cpu").engine)
assert not calls, calls
"""


def _works(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )


def test_no_connection_and_no_file_elsewhere(make_model: Callable[..., FineLIP], tmp_path: Path) -> None:
    """Native code of dependencies is visible only in system calls, so these are traced if possible."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    checkpoint, index, calls = tmp_path / "checkpoint", tmp_path / "index", tmp_path / "calls"
    finelip_fast.save(make_model(context_length=24, vision_layers=1, text_layers=1), checkpoint)
    alone = ["unshare", "--map-root-user", "--net"]
    traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(calls)]
    wrapped = [part for prefix in (alone, traced) if _works(*prefix) for part in prefix]
    process = subprocess.run(
        [*wrapped, sys.executable, "-I", "-c", JOURNEY, checkpoint, index],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert process.returncode == 0, process.stderr
    lines = calls.read_text().splitlines() if calls.exists() else []
    assert [line for line in lines if re.search(r"AF_INET|htons\(53\)", line)] == []
    left = {path.relative_to(home) for path in home.rglob("*") if path.is_file()}
    assert {path.parts[:2] for path in left} <= {(".cache", "finelip_fast")}, left
    # PyTorch creates this folder on import.
    assert {path.name.partition("_")[0] for path in scratch.iterdir()} <= {"torchinductor"}
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "scratch", "checkpoint", "index", "calls"}
    assert {path.name for path in checkpoint.iterdir()} == {"config.json", "model.safetensors", "exports"}


def test_onnx_runtime_is_imported_in_one_place() -> None:
    """Telemetry is disabled there first."""
    folder = Path(__file__).parents[1]
    pattern = re.compile(r"^\s*(import|from) onnxruntime\b|importorskip\(.onnxruntime", re.MULTILINE)
    sources = [
        path
        for name in ("finelip_fast", "export", "kernels", "training", "bench")
        for path in (folder / name).rglob("*.py")
    ]
    importing = {path.relative_to(folder).as_posix(): len(pattern.findall(path.read_text())) for path in sources}
    # The other import there is for type checkers.
    assert {path: count for path, count in importing.items() if count} == {"finelip_fast/runtimes/onnx.py": 2}
