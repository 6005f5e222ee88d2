"""What a user's type checker says of a program that uses the public names, where the package lies as a wheel installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

PROGRAM = """
from typing import Any, assert_type

import numpy as np
from PIL import Image
from torch import Tensor

import finelip_fast as ff

with ff.Retriever("checkpoint", engine="torch", precision=None, dtype="int8", overflow="window") as retriever:
    assert_type(retriever, ff.Retriever)
    assert_type(retriever.add_images("photos", existing="skip"), ff.AddReport)
    assert_type(retriever.add_folder("photos"), ff.FolderReport)
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

assert_type(ff.Retriever.open("index"), ff.Retriever)
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel lays it out, by links: the mapped folders lie in it."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "finelip_fast"
    package.mkdir()
    mapped = [REPOSITORY / name for name in ("kernels", "training", "export")]
    for path in [*(REPOSITORY / "finelip_fast").iterdir(), *mapped]:
        (package / path.name).symlink_to(path)
    return folder


def check(command: list[str], program: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"MYPYPATH": str(installed), "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", *command, "program.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_mypy_accepts_a_users_program(installed: Path, tmp_path: Path) -> None:
    options = ["--strict", "--follow-imports=silent", "--python-version=3.11", "--cache-dir", str(tmp_path / "cache")]
    check(["mypy", *options], PROGRAM, installed, tmp_path)


@pytest.mark.slow
def test_pyright_accepts_a_users_program(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{installed}"], "pythonVersion": "3.11"}}')
    check(["pyright", "--pythonpath", sys.executable], PROGRAM, installed, tmp_path)
