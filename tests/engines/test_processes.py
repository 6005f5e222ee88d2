"""Engines in other processes: pickled by their opening arguments, and usable in forked processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import finelip_fast
from finelip_fast.engines import open_engine
from finelip_fast.errors import EngineError
from finelip_fast.export.to_onnx import export_onnx

TEXTS = ["a red house", "a cat"]
NAMES = ("torch", "onnx")


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "checkpoint"
    finelip_fast.save(make_model(context_length=24, vision_layers=1, text_layers=1), folder)
    export_onnx(folder, data="scenes:test:8", progress=False)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_is_pickled_as_what_it_was_opened_with(
    checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    engine = open_engine(name, checkpoint.name, "cpu", **({"threads": 2} if name == "onnx" else {}))
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(engine)
    assert len(pickled) < 10_000, "no weights"
    again = pickle.loads(pickled)
    assert (type(again), again.fingerprint, str(again)) == (type(engine), engine.fingerprint, str(engine))
    torch.testing.assert_close(again.embed_texts(TEXTS), engine.embed_texts(TEXTS))
    if name == "onnx":
        assert again._threads == 2
        assert again.export == engine.export


@pytest.mark.parametrize("name", NAMES)
def test_another_checkpoint_in_the_place_of_the_pickled_one_is_refused(
    checkpoint: Path, make_model, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    pickled = pickle.dumps(open_engine(name, folder, "cpu"))
    finelip_fast.save(make_model(seed=5, context_length=24, vision_layers=1, text_layers=1), folder)
    with pytest.raises(
        EngineError, match=r"(expected the fingerprint .*, got .*; open it again|made from .*this one is .*--again)$"
    ):
        pickle.loads(pickled)
    if name == "torch":
        pickle.loads(pickle.dumps(open_engine(name, folder, "cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_a_spawned_process_opens_it_again(checkpoint: Path, name: str) -> None:
    engine = open_engine(name, checkpoint, "cpu")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).embed_texts(['a cat']).tolist())"
    process = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(engine), capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    torch.testing.assert_close(
        torch.tensor(json.loads(process.stdout)), engine.embed_texts(["a cat"]), atol=1e-5, rtol=0
    )


def in_child(work: Callable[[], None]) -> int:
    """Return the exit status of a forked process that does the work; fail if it hangs."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError("the forked process hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_forked_process_goes_on_with_what_is_open(checkpoint: Path, name: str) -> None:
    torch.set_num_threads(2)
    try:
        engine = open_engine(name, checkpoint, "cpu", **({"threads": 2} if name == "onnx" else {}))
        texts = TEXTS * 200
        torch.ones(1 << 22).exp()  # starts PyTorch's threads
        expected = engine.embed_texts(texts)

        def work() -> None:
            torch.testing.assert_close(engine.embed_texts(texts), expected)
            torch.ones(1 << 22).exp()
            vars(engine).clear()  # deletes sessions of this process and of its parent

        assert in_child(work) == 0
        torch.testing.assert_close(engine.embed_texts(TEXTS), expected[:2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_gpu_in_a_forked_process_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine("torch", checkpoint, "cpu")
    engine.device = torch.device("cuda")

    def work() -> None:
        with pytest.raises(EngineError, match=r"a GPU cannot be used in a forked process; .*spawn"):
            engine.embed_texts(TEXTS)

    assert in_child(work) == 0
