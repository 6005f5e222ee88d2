"""The advice in error messages is followed word for word, and works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import finelip_fast
from finelip_fast import cli
from finelip_fast._files import file_hash
from finelip_fast.engines import open_engine
from finelip_fast.errors import EngineError, FineLIPError, InputError
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.runtimes import onnx as onnx_runtime
from finelip_fast.runtimes import trt as trt_runtime
from finelip_fast.runtimes.manifest import rebuild_command

PAIRS = "scenes:test:8"


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remedies") / "a checkpoint"  # with a space, at which a shell would split
    finelip_fast.save(make_model(context_length=24, vision_layers=1, text_layers=1), folder)
    export_onnx(folder, data=PAIRS, progress=False)
    return folder


def remedy(error: FineLIPError) -> list[str]:
    """Return the command in a message, split as by a shell."""
    match = re.search(r"finelip export .*?(?=$| makes one|; alternatively, )", str(error))
    assert match is not None, error
    return shlex.split(match.group())


def values(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def change(folder: Path, **changes: object) -> None:
    (folder / "manifest.json").write_text(json.dumps({**values(folder), **changes}))


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("damaged")


def _of_another_checkpoint(folder: Path) -> None:
    change(folder, checkpoint="0" * 64)


def _unnamed(folder: Path) -> None:
    change(folder, files={})


def _changed(folder: Path) -> None:
    (folder / "text.onnx").write_bytes(b"other")


def _proven_elsewhere(folder: Path) -> None:
    change(folder, proof={**values(folder)["proof"], "devices": ["cuda"]})


def _another_graph(folder: Path) -> None:
    """Replace a graph and its hash, so that nothing seems to have changed."""
    proto = onnx.load(folder / "text.onnx")
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 7
    (folder / "text.onnx").write_bytes(proto.SerializeToString())
    change(folder, files={**values(folder)["files"], "text.onnx": file_hash(folder / "text.onnx")})


# Each is detected in a different place.
DAMAGES = [_missing, _damaged_manifest, _of_another_checkpoint, _unnamed, _changed, _proven_elsewhere, _another_graph]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_advised_command_mends_an_export(
    exported: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(exported, tmp_path / "a checkpoint"))
    damage(checkpoint / "exports" / "onnx-fp32")
    with pytest.raises(EngineError) as caught:
        open_engine("onnx", checkpoint, "cpu")
    program, *arguments = remedy(caught.value)
    assert program == "finelip"
    assert cli.main([*arguments, "--quiet", "--data", PAIRS]) == 0, capsys.readouterr().err
    assert open_engine("onnx", checkpoint, "cpu").reason == "asked for"


def test_build_mends_an_export(exported: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exported, tmp_path / "checkpoint"))
    for damage in (_damaged_manifest, _unnamed):
        damage(checkpoint / "exports" / "onnx-fp32")
        assert open_engine("onnx", checkpoint, "cpu", build=True).reason == "asked for"


def test_engines_that_are_advised_open(exported: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(exported, tmp_path / "checkpoint"))
    _missing(checkpoint / "exports" / "onnx-fp32")
    with pytest.raises(EngineError, match="alternatively, use engine='torch' or engine='auto'"):
        open_engine("onnx", checkpoint, "cpu")
    assert open_engine("torch", checkpoint, "cpu").name == open_engine("auto", checkpoint, "cpu").name == "torch"
    with pytest.raises(InputError, match="use device='cpu', or leave it out"):
        open_engine("torch", checkpoint, "nonsense")
    open_engine("torch", checkpoint)


@pytest.mark.parametrize("options", [["--prove"], ["--prove", "--out", "a b"], ["--again"], ["--profile", "1,2,8"]])
def test_commands_for_tensorrt_are_read(options: list[str]) -> None:
    """Running them would need the GPU."""
    command = shlex.split(rebuild_command("a checkpoint", "trt", "fp16", options))
    assert command[:3] == ["finelip", "export", "trt"]
    params = cli.export.commands["trt"].make_context("finelip export trt", command[3:]).params
    assert params["checkpoint"] == "a checkpoint"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads the project's settings")
@pytest.mark.parametrize("text", [onnx_runtime.INSTALL, trt_runtime.INSTALL])
def test_packages_that_are_advised_are_offered(text: str) -> None:
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = re.findall(r"finelip-fast\[([\w-]+)\]", text)
    assert extras
    assert set(extras) <= set(settings["project"]["optional-dependencies"])
