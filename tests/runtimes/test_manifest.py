"""Manifests: where exports are found, what is refused, and that every mismatch is reported with the command that helps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finelip_fast._files import file_hash
from finelip_fast.errors import EngineError
from finelip_fast.runtimes.manifest import (
    Export,
    Manifest,
    exports_folder,
    find,
    read,
    rebuild_command,
)


@pytest.fixture
def export(tmp_path: Path) -> Export:
    folder = tmp_path / "checkpoint" / "exports" / "onnx-fp32"
    folder.mkdir(parents=True)
    for name in ("image.onnx", "text.onnx"):
        (folder / name).write_bytes(b"weights")
    manifest = Manifest(
        runtime="onnx",
        precision="fp32",
        checkpoint="a" * 64,
        config={"embed_dim": 48},
        files={name: file_hash(folder / name) for name in ("image.onnx", "text.onnx")},
        versions={"torch": "2.11"},
        options={"opset": 20},
        proof={"passed": True},
    )
    manifest.write(folder)
    return Export(folder, manifest)


def test_what_was_written_is_read(export: Export, tmp_path: Path) -> None:
    assert read(export.folder) == export
    assert find(tmp_path / "checkpoint", "onnx").exports == [export]
    assert find(tmp_path / "checkpoint", "onnx", "fp32").exports == [export]
    assert find(tmp_path / "checkpoint", "onnx", "int8") == ([], {})
    assert find(tmp_path / "checkpoint", "trt") == ([], {})
    export.check("a" * 64, "", opset=20)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"checkpoint": "b" * 64}, "checkpoint: made from bbbbbbbbbbbb…, this one is aaaaaaaaaaaa…"),
        ({"options": {"opset": 18}}, "opset: made for 18, here it is 20"),
        ({"options": {}}, "opset: made for None, here it is 20"),
        ({"files": {"image.onnx": "0", "text.onnx": "0"}}, r"image\.onnx: not the file that was proven"),
        (
            {"files": {"image.onnx": "0", "other": "0"}},
            r"text\.onnx: the manifest does not name it; .*; other: missing",
        ),
        ({"proof": {}}, "proof: it was never compared"),
        ({"proof": {"passed": False}}, "proof: it was never compared"),
    ],
)
def test_every_difference_is_refused_and_told(export: Export, change: dict[str, object], text: str) -> None:
    changed = Export(export.folder, dataclasses.replace(export.manifest, **change))
    with pytest.raises(EngineError, match=f"onnx-fp32 cannot be used: {text}.* Export it again: finelip export onnx x"):
        changed.check("a" * 64, "finelip export onnx x", opset=20)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "finelip_fast_export/9"}', '{"format": "finelip_fast_export/1", "new": 1}']
)
def test_a_manifest_that_is_none_is_refused(export: Export, content: str) -> None:
    (export.folder / "manifest.json").write_text(content)
    with pytest.raises(EngineError, match=r"manifest\.json: (expected|missing|unknown) .*; export it again"):
        read(export.folder)


def test_half_written_and_refused_exports_are_not_found(export: Export, tmp_path: Path) -> None:
    export.folder.rename(export.folder.with_name(".onnx-fp32.1.partial"))
    (export.folder.with_name("failed-onnx-fp32")).mkdir()
    export.manifest.write(export.folder.with_name("failed-onnx-fp32"))
    assert find(tmp_path / "checkpoint", "onnx") == ([], {})


def test_exports_lie_beside_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "cache"))
    assert exports_folder(tmp_path) == tmp_path / "exports"
    (tmp_path / "clip.pt").touch()
    assert exports_folder(tmp_path / "clip.pt") == tmp_path / "clip.pt.exports"
    assert exports_folder(None) == tmp_path / "cache" / "exports" / "bundled"
    assert exports_folder("open_clip:ViT-B-16/openai").name == "open_clip--ViT-B-16--openai"
    assert exports_folder("org/name").parent == tmp_path / "cache" / "exports"


def test_commands_can_be_pasted() -> None:
    assert rebuild_command(None, "onnx", "fp32") == "finelip export onnx --precision fp32"
    assert rebuild_command("my models/a", "trt", "fp16", ["--prove"]) == (
        "finelip export trt 'my models/a' --precision fp16 --prove"
    )
