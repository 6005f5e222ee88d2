"""TensorRT plans: built for GPUs that are not present, described by their manifest, proven only where they run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import finelip_fast
from finelip_fast import checkpoint as checkpoints
from finelip_fast._files import file_hash
from finelip_fast.cli import main
from finelip_fast.errors import EngineError, InputError
from finelip_fast.export import graphs, to_onnx, to_trt
from finelip_fast.export import precision as half
from finelip_fast.export.to_trt import Builder, export_trt, prove_trt
from finelip_fast.runtimes import trt as runtime
from finelip_fast.runtimes.manifest import Manifest, exports_folder, find, read

trt = pytest.importorskip("tensorrt_rtx")

CONTEXT = 24
PAIRS = "scenes:test:8"


def write_onnx(model: finelip_fast.FineLIP, folder: Path, image: Path | None = None) -> Path:
    """Write the output of ``export_onnx``, without the comparison; ``image`` replaces the model's own image graph."""
    folder.mkdir(parents=True)
    for name in ("image", "text"):
        if image is not None and name == "image":
            shutil.copy(image, folder)
        else:
            onnx.save(half.in_half(graphs.build(model, name), "fp16"), folder / f"{name}.onnx")
    files = {path.name: file_hash(path) for path in folder.iterdir()}
    fingerprint = checkpoints.fingerprint(model)
    Manifest("onnx", "fp16", fingerprint, model.config.to_dict(), files, {}, proof={"passed": True}).write(folder)
    return folder


@pytest.fixture(scope="module")
def make_small(make_model) -> Callable[..., finelip_fast.FineLIP]:
    def make(seed: int = 0, **changes: object) -> finelip_fast.FineLIP:
        return make_model(seed, **{"context_length": CONTEXT, "vision_layers": 1, "text_layers": 1, **changes})

    return make


@pytest.fixture(scope="module")
def model(make_small) -> finelip_fast.FineLIP:
    return make_small()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trt") / "checkpoint"
    finelip_fast.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def new(make_small, checkpoint, tmp_path_factory) -> tuple[finelip_fast.FineLIP, Path, Path]:
    """Another model of the same sizes, its checkpoint, and its graphs, except the image graph."""
    folder = tmp_path_factory.mktemp("trt") / "new"
    model = make_small(seed=3)
    finelip_fast.save(model, folder)
    image = exports_folder(checkpoint) / "onnx-fp16" / "image.onnx"
    return model, folder, write_onnx(model, folder / "exports" / "onnx-fp16", image)


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def requests(no_gpu, checkpoint, model) -> Iterator[list[dict[str, object]]]:
    """Requests to the ONNX exporter, which is replaced because it is not under test."""
    requests = []

    def export_onnx(source: object, **arguments: object) -> Path:
        requests.append({"checkpoint": source, **arguments})
        return folder

    folder = write_onnx(model, exports_folder(checkpoint) / "onnx-fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "export_onnx", export_onnx)
        yield requests


@pytest.fixture(scope="module")
def plans(checkpoint) -> Path:
    return export_trt(checkpoint, compute_capability="8.9", data=PAIRS, progress=False)


@pytest.fixture
def on_ada(monkeypatch: pytest.MonkeyPatch, model) -> dict[str, Callable[[Tensor], Tensor]]:
    """Pretend that this machine has a GPU of compute capability 8.9, on which plans return the model's embeddings."""
    encoders = {"image.plan": model.encode_image, "text.plan": model.encode_text}
    machine = runtime.Machine("tensorrt_rtx", trt.__version__, "NVIDIA GeForce RTX 4090", "8.9")
    monkeypatch.setattr(runtime, "why_not", lambda: None)
    monkeypatch.setattr(runtime, "machine", lambda device="cuda", module=None: machine)
    monkeypatch.setattr(runtime, "TrtPlan", lambda content, name, device, **_: encoders[name])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: machine.gpu)
    return encoders


def test_plans_lie_beside_the_checkpoint_and_say_what_they_are(plans: Path, checkpoint: Path, requests) -> None:
    assert plans == checkpoint / "exports" / "trt-fp16-sm89"
    assert sorted(path.name for path in plans.iterdir()) == ["image.plan", "manifest.json", "text.plan"]
    assert [export.folder for export in find(checkpoint, "trt", "fp16").exports] == [plans]
    assert requests[0] == {"checkpoint": checkpoint, "precision": "fp16", "data": PAIRS, "progress": False}
    manifest = read(plans).manifest
    source = read(exports_folder(checkpoint) / "onnx-fp16").manifest
    assert (manifest.runtime, manifest.precision) == ("trt", "fp16")
    assert (manifest.checkpoint, manifest.config) == (checkpoints.fingerprint(checkpoint), source.config)
    assert manifest.files == {name: file_hash(plans / name) for name in ("image.plan", "text.plan")}
    assert manifest.versions["tensorrt_rtx"] == trt.__version__
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0]
    structure = manifest.options.pop("structure")
    assert set(structure) == {"image.onnx", "text.onnx"}
    assert manifest.options == {
        "module": "tensorrt_rtx",
        "version": trt.__version__,
        "gpu": None,
        "compute_capability": "8.9",
        "profile": {"name": "latency", "batches": [[1, 1, 1], [1, 4, 16]], "lengths": [1, 12, 24]},
        "onnx": source.files,
        "workspace": None,
        "version_compatible": False,
        "hardware_compatible": False,
        "refittable": False,
        "stripped": False,
    }


def test_plans_for_another_gpu_are_not_proven(plans: Path) -> None:
    assert read(plans).manifest.proof == {}
    assert not read(plans).manifest.proven


def test_a_second_run_builds_what_changed_and_nothing_else(plans: Path, checkpoint: Path, capsys) -> None:
    def build(**changes: object) -> int:
        export_trt(checkpoint, compute_capability="8.9", progress=False, **changes)
        return (plans / "image.plan").stat().st_mtime_ns

    before = build()
    assert build() == before
    (plans / "text.plan").write_bytes(b"broken")
    after = build()
    assert after > before
    assert read(plans).manifest.files["text.plan"] == file_hash(plans / "text.plan")
    with_other_profile = build(profile="1,2,8", builder=Builder(workspace=64))
    assert with_other_profile > after
    assert read(plans).manifest.options["profile"]["batches"] == [[1, 2, 8]]
    assert read(plans).manifest.options["workspace"] == 64
    latest = build()
    assert latest > with_other_profile
    assert build(again=True) > latest
    assert [path.name for path in plans.parent.glob(".*")] == []


@pytest.mark.parametrize(
    ("profile", "batches"),
    [
        ("latency", ((1, 1, 1), (1, 4, 16))),
        ("throughput", ((1, 32, 128),)),
        ("1,8,64", ((1, 8, 64),)),
        ("1, 1, 1", ((1, 1, 1),)),
    ],
)
def test_profiles(profile: str, batches: tuple[tuple[int, ...], ...]) -> None:
    assert to_trt.profile_batches(profile) == batches


@pytest.mark.parametrize("profile", ["", "fast", "2,4,8", "1,8,4", "1,8", "1,2,3,4", "0,1,2", "1,,2,3", "1,x,2"])
def test_a_profile_without_sense_is_refused(profile: str, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"expected profile to be one of .*'1,OPT,MAX'.* got "):
        export_trt(checkpoint, profile=profile, compute_capability="8.9")


def test_shapes_reach_from_one_to_the_whole_context(model) -> None:
    batches = to_trt.profile_batches("latency")
    assert to_trt.input_shapes("text", model.config, batches) == [
        [(1, 1), (1, 12), (1, 24)],
        [(1, 1), (4, 12), (16, 24)],
    ]
    assert to_trt.input_shapes("image", model.config, [(1, 4, 16)]) == [
        [(1, 3, 32, 32), (4, 3, 32, 32), (16, 3, 32, 32)]
    ]


def test_int8_is_made_from_calibrated_graphs(checkpoint: Path, requests, tmp_path) -> None:
    export_trt(checkpoint, precision="int8", compute_capability="8.9", out=tmp_path / "out", progress=False)
    assert requests[-1]["precision"] == "int8-calibrated"
    assert read(tmp_path / "out").manifest.precision == "int8"


def test_what_cannot_be_asked_for_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"expected precision to be one of .* got 'fp8'"):
        export_trt(checkpoint, precision="fp8")
    with pytest.raises(EngineError, match=r"PyTorch finds none; name a GPU with --compute-capability.*tensorrt_rtx"):
        export_trt(checkpoint)
    with pytest.raises(InputError, match=r"expected a compute capability such as '8\.9', got 'ada'"):
        export_trt(checkpoint, compute_capability="ada")
    with pytest.raises(EngineError, match=r"builds for, \[.*'8\.9'.*\], got 9\.0"):
        export_trt(checkpoint, compute_capability="9.0")
    monkeypatch.setattr(runtime, "importable", lambda: ("tensorrt",))
    with pytest.raises(EngineError, match=r"expected tensorrt_rtx.* got \['tensorrt'\]: pip install"):
        export_trt(checkpoint, compute_capability="8.9")
    monkeypatch.setattr(runtime, "importable", lambda: ())
    with pytest.raises(EngineError, match=r"TensorRT is not installed: pip install 'finelip-fast\[trt\]'"):
        export_trt(checkpoint)


@pytest.mark.parametrize("option", ["refittable", "strip", "version_compatible"])
def test_options_that_need_the_gpu_say_so(option: str, checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=f"--{option.replace('_', '-')}: TensorRT needs the GPU"):
        export_trt(checkpoint, compute_capability="8.9", builder=Builder(**{option: True}))


def test_a_failed_build_says_why_and_leaves_what_was_there(plans: Path, checkpoint: Path, monkeypatch) -> None:
    before = (plans / "manifest.json").read_bytes()
    monkeypatch.setattr(to_trt, "input_shapes", lambda *_: [[(1, 3, 99, 99)] * 3])
    with pytest.raises(EngineError, match=r"image\.onnx: tensorrt_rtx .* cannot build it: .*pixels"):
        export_trt(checkpoint, compute_capability="8.9", progress=False, again=True)
    assert (plans / "manifest.json").read_bytes() == before
    assert [path.name for path in plans.parent.glob(".*")] == []


# ---- Proof, with plans that are the model


def test_plans_for_this_gpu_are_proven_as_they_are_built(on_ada, checkpoint: Path, tmp_path: Path) -> None:
    folder = export_trt(checkpoint, compute_capability="8.9", out=tmp_path / "out", data=PAIRS, progress=False)
    assert read(folder).manifest.proof["passed"] is True
    assert read(folder).manifest.proof["on"] == "NVIDIA GeForce RTX 4090"
    assert json.loads((folder / "parity.json").read_text())["precision"] == "fp16"
    read(folder).check(checkpoints.fingerprint(checkpoint), "", compute_capability="8.9")


@pytest.mark.parametrize("keep", [False, True])
def test_plans_that_are_not_the_model_are_refused(on_ada, checkpoint: Path, tmp_path: Path, keep: bool) -> None:
    on_ada["image.plan"] = lambda pixels, encode=on_ada["image.plan"]: encode(pixels.roll(1, -1))
    with pytest.raises(EngineError, match="the fp16 export is refused: image: largest error"):
        export_trt(
            checkpoint, compute_capability="8.9", out=tmp_path / "out", data=PAIRS, keep_failed=keep, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == (["failed-out"] if keep else [])


def test_plans_from_elsewhere_are_proven_where_they_run(
    plans: Path, checkpoint: Path, request: pytest.FixtureRequest, tmp_path: Path, new
) -> None:
    folder = export_trt(checkpoint, compute_capability="8.9", out=tmp_path / "out", progress=False)
    assert not read(folder).manifest.proven
    with pytest.raises(EngineError, match="PyTorch finds none here"):
        prove_trt(checkpoint, folder)
    encoders = request.getfixturevalue("on_ada")
    with pytest.raises(EngineError, match=r"checkpoint: made from .*, this one is .*finelip export trt"):
        prove_trt(new[1], folder, progress=False)
    prove_trt(checkpoint, folder, data=PAIRS, progress=False)
    assert read(folder).manifest.proven
    assert (folder / "parity.md").is_file()
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]

    encoders["text.plan"] = lambda ids, encode=encoders["text.plan"]: -encode(ids)
    with pytest.raises(EngineError, match="the fp16 export is refused: text: "):
        prove_trt(checkpoint, folder, data=PAIRS, progress=False)
    assert not folder.exists()


@pytest.mark.parametrize("command", ["--prove", "--again"])
def test_what_is_not_an_exports_is_not_removed(on_ada, checkpoint: Path, tmp_path: Path, capsys, command: str) -> None:
    """Plans that are refused are deleted, and so is all that a new export replaces."""
    folder = export_trt(checkpoint, compute_capability="8.9", out=tmp_path / "out", data=PAIRS, progress=False)
    (folder / "notes.txt").write_text("mine")
    on_ada["text.plan"] = lambda ids, encode=on_ada["text.plan"]: -encode(ids)
    arguments = ["export", "trt", str(checkpoint), "--compute-capability", "8.9", "--data", PAIRS, "--out", str(folder)]
    assert main([*arguments, command, "--quiet"]) == 2
    assert "other contents (notes.txt) and would lose them; move them, or" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "text.plan").is_file()


def test_a_default_folder_keeps_what_else_is_there(on_ada, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    folder = copy / "exports" / "trt-fp16-sm89"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other contents \(notes\.txt\)"):
        export_trt(copy, compute_capability="8.9", data=PAIRS, again=True, progress=False)
    assert (folder / "notes.txt").read_text() == "mine"


def test_building_again_where_plans_wait_for_their_proof_proves_them(on_ada, checkpoint, tmp_path, monkeypatch) -> None:
    arguments = {"compute_capability": "8.9", "out": tmp_path / "out", "data": PAIRS, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "why_not", lambda: "no GPU")
        built = (export_trt(checkpoint, **arguments) / "image.plan").stat().st_mtime_ns
        assert not read(tmp_path / "out").manifest.proven
    folder = export_trt(checkpoint, **arguments)
    assert read(folder).manifest.proven
    assert (folder / "image.plan").stat().st_mtime_ns == built


def test_existing_plans_are_compared_on_the_pairs_that_are_named(on_ada, checkpoint: Path, tmp_path: Path) -> None:
    arguments = {"compute_capability": "8.9", "out": tmp_path / "out", "progress": False}
    built = (export_trt(checkpoint, data=PAIRS, **arguments) / "image.plan").stat().st_mtime_ns
    for data, pairs in ((None, PAIRS), ("scenes:test:9", "scenes:test:9"), (None, "scenes:test:9")):
        folder = export_trt(checkpoint, data=data, **arguments)
        assert read(folder).manifest.proof["pairs"] == pairs
        assert (folder / "image.plan").stat().st_mtime_ns == built


# ---- Refitting


@pytest.fixture
def refittable(on_ada, checkpoint: Path, tmp_path: Path) -> Path:
    """Plans declared as refittable; building real ones needs the GPU."""
    folder = export_trt(checkpoint, compute_capability="8.9", out=tmp_path / "old", data=PAIRS, progress=False)
    manifest = read(folder).manifest
    dataclasses.replace(manifest, options={**manifest.options, "refittable": True, "stripped": True}).write(folder)
    return folder


def test_refitting_takes_the_new_weights_and_keeps_the_rest(refittable, on_ada, new, monkeypatch) -> None:
    model, checkpoint, source = new
    refit_calls = []
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *_, **__: source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        to_trt, "refit_plan", lambda plan, graph, module: refit_calls.append((plan, graph, module)) or b"refitted"
    )
    on_ada |= {"image.plan": model.encode_image, "text.plan": model.encode_text}
    arguments = {"compute_capability": "8.9", "profile": "throughput", "data": PAIRS, "progress": False}
    folder = export_trt(checkpoint, refit=refittable, **arguments)
    assert refit_calls == [
        (refittable / f"{name}.plan", source / f"{name}.onnx", "tensorrt_rtx") for name in ("image", "text")
    ]
    manifest, old = read(folder).manifest, read(refittable).manifest
    assert folder == checkpoint / "exports" / "trt-fp16-sm89"
    assert manifest.proven
    assert manifest.checkpoint == checkpoints.fingerprint(checkpoint)
    assert manifest.options == {**old.options, "onnx": read(source).manifest.files, "stripped": False}


def test_what_does_not_fit_is_not_refitted(refittable, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refused(text: str, precision: str = "fp16") -> None:
        arguments = {"compute_capability": "8.9", "precision": precision, "progress": False, "again": True}
        with pytest.raises(EngineError, match=text):
            export_trt(checkpoint, refit=refittable, **arguments)

    refused("expected plans of precision 'bf16', got 'fp16'", precision="bf16")
    graphs_ = shutil.copytree(exports_folder(checkpoint) / "onnx-fp16", tmp_path / "graphs")
    source = read(graphs_).manifest
    monkeypatch.setattr(to_onnx, "export_onnx", lambda *_, **__: graphs_)
    dataclasses.replace(source, config={**source.config, "text_width": 32}).write(graphs_)
    refused(r"its model has other sizes \(text_width\)")
    source.write(graphs_)
    proto = onnx.load(graphs_ / "text.onnx")
    del proto.graph.initializer[0]
    onnx.save(proto, graphs_ / "text.onnx")
    refused(r"old: text\.onnx of the two checkpoints differ in more than their weights")
    manifest = read(refittable).manifest
    dataclasses.replace(manifest, options={**manifest.options, "version": "1.0"}).write(refittable)
    refused(r"version: made for '1\.0'")
    dataclasses.replace(manifest, options={**manifest.options, "refittable": False}).write(refittable)
    refused("expected plans that were built with --refittable")


def test_weights_are_not_part_of_a_structure_and_the_rest_is(checkpoint: Path, new, tmp_path: Path) -> None:
    path = exports_folder(checkpoint) / "onnx-fp16" / "text.onnx"
    assert to_trt.structure(path) == to_trt.structure(new[2] / "text.onnx")

    def change(edit: Callable[[onnx.GraphProto], object]) -> str:
        proto = onnx.load(path)
        edit(proto.graph)
        onnx.save(proto, tmp_path / "changed.onnx")
        return to_trt.structure(tmp_path / "changed.onnx")

    def other_size(graph: onnx.GraphProto) -> None:
        tensor = next(
            initializer for initializer in graph.initializer if initializer.data_type == onnx.TensorProto.INT64
        )
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.int64(1), tensor.name))

    structures = [
        to_trt.structure(path),
        change(lambda graph: graph.initializer.pop()),
        change(lambda graph: graph.node.pop()),
        change(lambda graph: setattr(graph.initializer[0], "name", "renamed")),
        change(other_size),
    ]
    assert len(set(structures)) == len(structures)


# ---- Command line


def test_the_command_says_what_it_made_and_how_to_prove_it(plans: Path, checkpoint: Path, capsys) -> None:
    assert main(["export", "trt", str(checkpoint), "--compute-capability", "8.9", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "folder": str(plans),
        "precision": "fp16",
        "module": "tensorrt_rtx",
        "version": trt.__version__,
        "compute_capability": "8.9",
        "profile": "latency",
        "prove": f"finelip export trt {checkpoint} --precision fp16 --prove",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name a GPU with --compute-capability"),
        (["--prove"], "PyTorch finds none here"),
        (["--compute-capability", "8.9", "--strip"], "--strip: TensorRT needs the GPU"),
        (["--compute-capability", "8.9", "--refit", "x"], "--refit: TensorRT needs the GPU"),
    ],
)
def test_errors_are_told_in_one_line(arguments: list[str], text: str, checkpoint: Path, capsys) -> None:
    assert main(["export", "trt", str(checkpoint), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert text in err


def test_every_option_reaches_the_exporter(monkeypatch: pytest.MonkeyPatch, plans: Path, tmp_path: Path) -> None:
    arguments = {}
    monkeypatch.setattr(
        to_trt, "export_trt", lambda checkpoint, **rest: arguments.update(checkpoint=checkpoint, **rest) or plans
    )
    flags = "--version-compatible --hardware-compatible --refittable --strip --keep-failed --again --quiet"
    values = "--precision bf16 --profile 1,2,3 --compute-capability 12.0 --out o --workspace 7 --refit r --data p"
    assert main(["export", "trt", "CHECKPOINT", *flags.split(), *values.split()]) == 0
    assert arguments == {
        "checkpoint": "CHECKPOINT",
        "precision": "bf16",
        "profile": "1,2,3",
        "compute_capability": "12.0",
        "out": "o",
        "builder": Builder(7, True, True, True, True),
        "refit": "r",
        "data": "p",
        "keep_failed": True,
        "again": True,
        "progress": False,
    }
    assert main(["export", "trt"]) == 0
    assert arguments["data"] is None, "those of existing plans"
