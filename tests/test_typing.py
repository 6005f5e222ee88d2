"""Type checkers accept a user's program that uses the public names, installed from a wheel or in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROGRAM = """
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from PIL import Image
from torch import Tensor

import finelip_fast as ff

with ff.Retriever("checkpoint", engine="torch", precision=None, dtype="int8", overflow="window") as retriever:
    assert_type(retriever, ff.Retriever)
    assert_type(retriever.add_images("photos", existing="skip"), ff.AddReport)
    assert_type(retriever.add_folder("photos"), ff.FolderReport)
    assert_type(retriever.add_files(["a.jpg", Path("b.jpg")]), ff.FolderReport)
    assert_type(retriever.search("a house", mode="two-stage"), ff.Hits)
    assert_type(retriever.search(["a house", "a bus"]), list[ff.Hits])
    assert_type(retriever.search(image="a.jpg"), ff.Hits)
    assert_type(retriever.search(image=[Image.new("RGB", (8, 8))]), list[ff.Hits])
    assert_type(retriever.search(image=("a.jpg", "b.jpg")), list[ff.Hits])
    hits: list[ff.Hit] = retriever.search("a house")
    assert_type(hits[0].metadata, dict[str, Any])
    assert_type(retriever.encode_texts(["a house"]), Tensor)
    assert_type(retriever.encode_images(["a.jpg"], convert_to_numpy=True), np.ndarray[Any, np.dtype[np.float32]])
    assert_type(retriever.similarity(retriever.encode_texts(["a"]), np.zeros((1, 2, 3))), Tensor)
    assert_type(retriever.explain("a.jpg", "a house"), ff.Explanation)
    assert_type(retriever.engine, ff.Engine)
    assert_type(retriever.index, ff.Index)

with ff.Client("http://127.0.0.1:8000", api_key=None, timeout=5) as client:
    assert_type(client.search("a house", alpha=0.5), ff.Hits)
    assert_type(client.search(["a house", "a bus"]), list[ff.Hits])
    assert_type(client.search(image=[Image.new("RGB", (8, 8))]), list[ff.Hits])
    assert_type(client.score(["a.jpg"], ["a house"]), np.ndarray[Any, np.dtype[np.float32]])
    assert_type(client.add_images(["a.jpg", b"", Image.new("RGB", (8, 8))]), ff.AddReport)
    assert_type([item.metadata for item in client.items()], list[dict[str, Any]])


async def ask() -> None:
    async with ff.AsyncClient("http://127.0.0.1:8000") as client:
        assert_type(await client.search("a house"), ff.Hits)
        assert_type(await client.search(image=("a.jpg", "b.jpg")), list[ff.Hits])
        assert_type([item.id async for item in client.items()], list[str])


assert_type(ff.Retriever.open("index"), ff.Retriever)
assert_type(ff.Retriever().search(name for name in ("a", "b")), list[ff.Hits])
assert_type(ff.Retriever().search("a house")[:3] + hits, ff.Hits)
assert_type(len(ff.datasets.Scenes("test", 3)), int)
assert_type(ff.metrics.recall(retriever.score(["a.jpg"], ["a house"])), dict[str, float])
model = ff.FineLIP.from_pretrained("org/name")
assert_type(model, ff.FineLIP)
assert_type(ff.load(), ff.FineLIP)
assert_type(model.push_to_hub("org/name"), str)
assert_type(ff.tokenize(["a house"]), Tensor)
assert_type(ff.IndexSpec("0" * 64, 4, 8, dtype="int8"), ff.IndexSpec)
try:
    ff.Retriever(engine="tensorflow")  # type: ignore[arg-type]
    ff.Retriever(precision="fp8")  # type: ignore[arg-type]
    ff.Retriever(dtype="float64")  # type: ignore[arg-type]
    ff.Retriever(overflow="drop")  # type: ignore[arg-type]
    ff.Retriever().search("a house", mode="fast")  # type: ignore[call-overload]
    ff.Retriever().add_texts(["a"], existing="keep")  # type: ignore[arg-type]
except (ff.InputError, ff.StoreError):
    pass
"""


@pytest.fixture(scope="module", params=["wheel", "in place"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a wheel's contents for the checkers to search first; empty if they follow the environment."""
    if request.param == "in place":
        if not Path(sysconfig.get_path("purelib"), "finelip_fast-stubs").is_dir():
            pytest.skip("needs the stub package of an installation in place: make stubs")
        return ""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(request.getfixturevalue("wheel")) as archive:
        archive.extractall(folder)
    return str(folder)


def check(command: list[str], site: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"MYPYPATH": site, "PYTHONPATH": site, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", *command, "program.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_mypy_accepts_a_users_program(site: str, tmp_path: Path) -> None:
    options = ["--strict", "--follow-imports=silent", "--python-version=3.11", "--cache-dir", str(tmp_path / "cache")]
    check(["mypy", *options], site, tmp_path)


@pytest.mark.slow
def test_pyright_accepts_a_users_program(site: str, tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    config = {"extraPaths": [site] if site else [], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    check(["pyright", "--pythonpath", sys.executable], site, tmp_path)
