"""Exporting: proven files beside the checkpoint and nothing else, whatever fails on the way."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch

import finelip_fast
from finelip_fast.checkpoint import fingerprint
from finelip_fast.cli import main
from finelip_fast.engines import open_engine
from finelip_fast.errors import CheckpointError, EngineError, InputError
from finelip_fast.export import graphs, parity
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.runtimes.manifest import find, read
from finelip_fast.runtimes.onnx import OnnxGraph

CONTEXT = 24
PAIRS = "scenes:test:8"


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("to_onnx") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_layers=1), folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_onnx(checkpoint, data=PAIRS, progress=False)


def test_files_lie_beside_the_checkpoint_and_say_what_they_are(exported: Path, checkpoint: Path) -> None:
    assert exported == checkpoint / "exports" / "onnx-fp32"
    names = {path.name for path in exported.iterdir()}
    assert names == {"image.onnx", "text.onnx", "manifest.json", "parity.json", "parity.md"}
    manifest = read(exported).manifest
    assert (manifest.runtime, manifest.precision, manifest.checkpoint) == ("onnx", "fp32", fingerprint(checkpoint))
    assert set(manifest.files) == {"image.onnx", "text.onnx"}
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.versions)
    assert manifest.proven
    assert manifest.proof["pairs"] == PAIRS
    assert [export.folder for export in find(checkpoint, "onnx").exports] == [exported]
    proto = onnx.load(exported / "text.onnx")
    facts = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert facts["finelip.checkpoint"] == manifest.checkpoint


@pytest.mark.filterwarnings("ignore::finelip_fast.UntrainedAggregatorsWarning")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_trained_aggregators_the_global_row_is_exported(make_model, tmp_path: Path, precision: str) -> None:
    finelip_fast.save(make_model(context_length=CONTEXT, trained_aggregators=False), tmp_path)
    folder = export_onnx(tmp_path, precision=precision, extras=["scorer"], data=PAIRS, progress=False)
    assert read(folder).manifest.proven
    proto = onnx.load(folder / "image.onnx")
    assert [axis.dim_value for axis in proto.graph.output[0].type.tensor_type.shape.dim][1:] == [1, 48]
    assert not [weight.name for weight in proto.graph.initializer if "aggregator" in weight.name]
    engine = open_engine("onnx", tmp_path, "cpu", precision=precision)
    assert engine.embed_texts(["a house"]).shape == (1, 1, 48)


def test_a_second_run_exports_what_changed_and_nothing_else(exported: Path, checkpoint: Path, monkeypatch) -> None:
    before = (exported / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(graphs, "build", lambda *_, **__: pytest.fail("exported again"))
    assert export_onnx(checkpoint, data=PAIRS, progress=False) == exported
    assert (exported / "manifest.json").stat().st_mtime_ns == before
    assert export_onnx(checkpoint, progress=False) == exported, "compared on some pairs"
    for changed in ({"again": True}, {"opset": 18}, {"extras": ["scorer"]}, {"data": "scenes:test:9"}):
        with pytest.raises(pytest.fail.Exception, match="exported again"):
            export_onnx(checkpoint, **{"data": PAIRS, "progress": False, **changed})


def test_a_calibration_is_kept_and_another_calibrates_again(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = {"precision": "int8-calibrated", "out": tmp_path / "out", "data": PAIRS, "progress": False}
    monkeypatch.setitem(parity.LIMITS, "int8-calibrated", parity.Limits(9.0, 9.0, -1.0, 9.0, 0.0, 1.0))
    folder = export_onnx(checkpoint, calibration="scenes:val:8", **arguments)
    assert read(folder).manifest.options["calibration"] == "scenes:val:8"
    monkeypatch.setattr(graphs, "build", lambda *_, **__: pytest.fail("exported again"))
    for calibration in (None, "scenes:val:8"):
        assert export_onnx(checkpoint, calibration=calibration, **arguments) == folder
    with pytest.raises(pytest.fail.Exception, match="exported again"):
        export_onnx(checkpoint, calibration="scenes:val:9", **arguments)
    with pytest.raises(
        InputError, match="expected calibration with precision 'int8-calibrated' alone, got it with 'int8'"
    ):
        export_onnx(checkpoint, calibration="scenes:val:8", precision="int8")
    command = ["export", "onnx", str(checkpoint), "--precision", "fp32", "int8", "--calibration", "scenes:val:8"]
    assert main([*command, "--quiet"]) == 2


def test_extras_are_written_and_proven(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_onnx(checkpoint, out=tmp_path / "out", extras=["image_uint8", "scorer"], data=PAIRS, progress=False)
    assert {"image_uint8.onnx", "scorer.onnx"} <= set(read(folder).manifest.files)
    checked = {check["name"] for check in json.loads((folder / "parity.json").read_text())["checks"]}
    assert {"image_uint8: largest error", "scorer: scores"} <= checked


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_refused_is_not_handed_over(checkpoint: Path, tmp_path: Path, monkeypatch, keep: bool) -> None:
    build = graphs.build

    def frozen(model, name, **options):
        proto = build(model, name, **options)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        return proto

    monkeypatch.setattr(graphs, "build", frozen)
    out = tmp_path / "onnx-fp32"
    with pytest.raises(EngineError, match=r"the fp32 export is refused: image: interface: .*frozen at 2"):
        export_onnx(checkpoint, out=out, data=PAIRS, keep_failed=keep, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == (["failed-onnx-fp32"] if keep else [])
    if keep:
        assert not read(tmp_path / "failed-onnx-fp32").manifest.proven


def test_a_refusal_leaves_what_was_there(exported: Path, checkpoint: Path, monkeypatch) -> None:
    before = (exported / "manifest.json").read_bytes()
    monkeypatch.setitem(parity.LIMITS, "fp32", parity.LIMITS["fp32"]._replace(largest=0.0))
    with pytest.raises(EngineError, match=r"image: largest error: of any entry \(.*, limit 0\)"):
        export_onnx(checkpoint, data=PAIRS, again=True, progress=False)
    assert (exported / "manifest.json").read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == ["onnx-fp32"]


def test_weights_past_what_a_file_holds_lie_beside_it(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST_FILE", 1 << 20)
    folder = export_onnx(checkpoint, out=tmp_path / "large", data=PAIRS, progress=False)
    assert "text.onnx.data" in read(folder).manifest.files
    assert (folder / "text.onnx").stat().st_size < 1 << 20
    ids = finelip_fast.tokenize(["a red house"], CONTEXT)
    with torch.no_grad():
        expected = finelip_fast.load(checkpoint).encode_text(ids)
    embeddings = OnnxGraph(folder / "text.onnx", torch.device("cpu"))(ids)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_asked_for_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected precision to be one of .*int8.*, got 'fp8'"):
        export_onnx(checkpoint, precision="fp8")
    with pytest.raises(InputError, match="expected opset of at least 18, got 11"):
        export_onnx(checkpoint, opset=11)
    with pytest.raises(InputError, match=r"expected extras of .*, got \['audio'\]"):
        export_onnx(checkpoint, extras=["audio"])
    with pytest.raises(CheckpointError, match="nothing: no such file or folder"):
        export_onnx(tmp_path / "nothing")
    with pytest.raises(InputError, match="expected scenes:SPLIT, jsonl:FILE"):
        export_onnx(checkpoint, data="flickr", again=True, progress=False)


def test_the_command_exports_several_precisions(checkpoint: Path, capsys) -> None:
    arguments = ["export", "onnx", str(checkpoint), "--precision", "fp16", "int8", "--data", PAIRS, "--quiet", "--json"]
    assert main(arguments) == 0
    reports = json.loads(capsys.readouterr().out)
    assert set(reports) == {"fp16", "int8"}
    assert all(report["passed"] for report in reports.values())
    assert {path.name for path in (checkpoint / "exports").iterdir()} >= {"onnx-fp16", "onnx-int8"}


def test_errors_are_told_in_one_line(checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", "onnx", str(tmp_path / "nothing"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["export", "onnx", str(checkpoint), "--out", str(tmp_path), "--precision", "fp32", "fp16"]) == 2
    assert "expected one --precision with --out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bundled_model_is_exported_and_searched_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README's first command does this, with the default held-out pairs."""
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))
    for precision in ("fp32", "int8"):
        folder = export_onnx(precision=precision, progress=False)
        assert folder == tmp_path / "exports" / "bundled" / f"onnx-{precision}"
        proof = read(folder).manifest.proof
        assert proof["pairs"] == "scenes:test:200"
        assert proof["ranking: recall@1"] <= parity.LIMITS[precision].recall
        retriever = finelip_fast.Retriever(engine="onnx", precision=precision, device="cpu")
        assert str(retriever.engine) == f"onnx: cpu, {precision} (asked for)"


def test_weights_that_are_no_numbers_are_refused_before_anything_is_written(make_model, tmp_path: Path) -> None:
    finelip_fast.save(make_model(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["visual.proj"][0, 0] = torch.nan
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in visual\.proj"):
        export_onnx(tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
