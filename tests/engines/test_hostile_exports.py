"""Untrusted exports: whatever their folder contains gives an EngineError or exactly the proven graphs."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import finelip_fast
from finelip_fast._files import file_hash
from finelip_fast.checkpoint import fingerprint
from finelip_fast.engines import Engine, open_engine
from finelip_fast.engines.onnx import OnnxEngine
from finelip_fast.errors import EngineError, FineLIPError
from finelip_fast.export import graphs
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.runtimes import graph as contents
from finelip_fast.runtimes.manifest import Export, read

EXAMPLES = settings.get_profile("fuzz").max_examples
PAIRS = "scenes:test:8"
CONTEXT = 24

# JSON values that may replace any other.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 63)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["../image.onnx", "/etc/passwd", "a\\b", "c:x", "", "0" * 64, "onnx", "trt", "fp32", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_layers=1), folder)
    export_onnx(folder, data=PAIRS, progress=False)
    return folder


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "checkpoint"))


@pytest.fixture
def folder(checkpoint: Path) -> Path:
    return checkpoint / "exports" / "onnx-fp32"


def refused(checkpoint: Path, text: str) -> None:
    """Check that the engine is refused by name, and that ``auto`` takes another one and says why."""
    with pytest.raises(EngineError, match=text):
        open_engine("onnx", checkpoint, "cpu")
    engine = open_engine("auto", checkpoint, "cpu")
    assert engine.name == "torch"
    assert "not onnx" in engine.reason


def change(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def list_all(folder: Path) -> None:
    """Write the manifest as an attacker would, with the hashes of the present files."""
    change(folder, files={path.name: file_hash(path) for path in folder.iterdir() if path.suffix in (".onnx", ".data")})


# ---- Files that run are named and are those that were proven


@pytest.mark.parametrize("files", [{}, {"image.onnx": None}, {"text.onnx": None}])
def test_a_file_that_the_manifest_does_not_name_does_not_run(checkpoint: Path, folder: Path, files: dict) -> None:
    hashes = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files={name: hashes[name] for name in files})
    refused(
        checkpoint,
        r"(image|text)\.onnx: the manifest does not name it\. Export it again: finelip export onnx .*--again",
    )


@pytest.mark.parametrize("name", ["../text.onnx", "/text.onnx", "a/b", "c:\\x", "", "."])
def test_names_that_lead_elsewhere_are_refused(checkpoint: Path, folder: Path, name: str) -> None:
    change(folder, files={name: "0" * 64})
    refused(checkpoint, r"manifest\.json: files: expected a file name without a folder")


def test_any_flipped_byte_is_noticed(exported: Path) -> None:
    export = read(exported / "exports" / "onnx-fp32")
    path = export.folder / "text.onnx"
    content = path.read_bytes()
    try:
        for at in range(0, len(content), len(content) // EXAMPLES):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(EngineError, match="not the file that was proven"):
                export.content("text.onnx", "", max_bytes=1 << 30)
        path.write_bytes(content[:-1])
        with pytest.raises(EngineError, match="not the file that was proven"):
            export.content("text.onnx", "", max_bytes=1 << 30)
    finally:
        path.write_bytes(content)


def test_the_bytes_that_were_compared_are_those_that_run(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes by another process during loading have no effect."""
    real = Export.content

    def content(export: Export, name: str, *arguments: Any, **options: Any) -> bytes:
        original = real(export, name, *arguments, **options)
        (folder / name).write_bytes(b"changed meanwhile")
        return original

    expected = open_engine("onnx", checkpoint, "cpu").embed_texts(["a cat"])
    monkeypatch.setattr(Export, "content", content)
    assert torch.equal(open_engine("onnx", checkpoint, "cpu").embed_texts(["a cat"]), expected)


def test_another_checkpoint_is_refused_before_a_file_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Export, "content", lambda *_, **__: pytest.fail("a file was read"))
    change(checkpoint / "exports" / "onnx-fp32", checkpoint="0" * 64)
    with pytest.raises(EngineError, match="checkpoint: made from 000000000000…"):
        open_engine("onnx", checkpoint, "cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["manifest.json", "text.onnx"])
def test_a_pipe_is_not_waited_for(checkpoint: Path, folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(checkpoint, f"{name}: expected a regular file, got a pipe")


def test_a_file_that_would_fill_the_memory_is_not_read(checkpoint: Path, folder: Path) -> None:
    with (folder / "text.onnx").open("r+b") as file:
        file.truncate(1 << 40)
    refused(checkpoint, r"text\.onnx: expected at most \d+ bytes")


# ---- Weights in other files


@pytest.fixture(scope="module")
def exported_apart(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "LARGEST_FILE", 0)
        return export_onnx(exported, data=PAIRS, progress=False, out=folder / "onnx-fp32")


@pytest.fixture
def external(folder: Path, exported_apart: Path) -> Path:
    shutil.rmtree(folder)
    return Path(shutil.copytree(exported_apart, folder))


def test_weights_beside_a_graph_are_proven_too(checkpoint: Path, external: Path) -> None:
    assert {"image.onnx.data", "text.onnx.data"} <= set(read(external).manifest.files)
    expected = open_engine("torch", checkpoint, "cpu").embed_texts(["a cat"])
    engine = open_engine("onnx", checkpoint, "cpu")
    torch.testing.assert_close(engine.embed_texts(["a cat"]), expected, atol=1e-5, rtol=0)
    data = external / "text.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(checkpoint, r"text\.onnx\.data: not the file that was proven")
    data.write_bytes(content)
    files = read(external).manifest.files
    change(external, files={name: digest for name, digest in files.items() if name != data.name})
    refused(checkpoint, r"text\.onnx\.data: the manifest does not name it")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", ".", "", "c:\\x"])
def test_weights_come_from_no_other_folder(checkpoint: Path, external: Path, location: str) -> None:
    proto = onnx.load(external / "text.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (external / "text.onnx").write_bytes(proto.SerializeToString())
    list_all(external)
    refused(checkpoint, r"text\.onnx, weights of .*: expected a file name without a folder")


# ---- Graphs with the right hash that are not a valid export


def tampered(folder: Path, change_proto: Callable[[onnx.ModelProto], object]) -> None:
    proto = onnx.load(folder / "text.onnx")
    change_proto(proto)
    (folder / "text.onnx").write_bytes(proto.SerializeToString())
    list_all(folder)


def _other_shape(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 7


def _other_rank(proto: onnx.ModelProto) -> None:
    del proto.graph.output[0].type.tensor_type.shape.dim[2]


def _other_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def _unknown_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 9999


def _other_name(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "scores"


def _more_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _fixed_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def _custom_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("PyOp", ["ids"], ["unused"], domain="com.example"))


def _contributed_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(
        helper.make_node("EPContext", [], ["unused"], domain="com.microsoft", ep_cache_context="../x")
    )


def _inner_operator(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("X", [], ["y"], domain="com.example")], "inner", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=inner, else_branch=inner))


def _other_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 19


def _function(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    proto.functions.append(helper.make_function("local", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)]))


CHANGES = {
    _other_shape: r"text\.onnx: embeddings: axis 2 is 7, expected 48",
    _other_rank: r"embeddings: expected 3 axes, got 2",
    _other_type: r"ids: expected INT64, got INT32",
    _unknown_type: r"ids: expected INT64, got type 9999",
    _other_name: r"expected outputs \['embeddings'\], got \['scores'\]",
    _more_outputs: r"expected outputs \['embeddings'\], got",
    _fixed_batch: r"ids: axis 0 \(batch\) is frozen at 4",
    _custom_operator: r"expected standard ONNX operators, found 'com\.example'\.'PyOp'",
    _contributed_operator: r"found 'com\.microsoft'\.'EPContext'",
    _inner_operator: r"found 'com\.example'\.'X'",
    _other_opset: r"opset: made for 20, found 19",
    _function: r"expected a graph of operators only, found functions",
}


@pytest.mark.parametrize("change_proto", CHANGES, ids=lambda change_proto: change_proto.__name__)
def test_a_graph_that_is_no_export_does_not_open(
    checkpoint: Path, folder: Path, change_proto: Callable[[onnx.ModelProto], None]
) -> None:
    tampered(folder, change_proto)
    with pytest.raises(EngineError, match=CHANGES[change_proto]):
        open_engine("onnx", checkpoint, "cpu")


def test_a_graph_that_says_one_shape_and_gives_another_is_an_error(checkpoint: Path, folder: Path) -> None:
    tokens = finelip_fast.load(checkpoint).config.tokens
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["ids"], ["sizes"], start=0, end=1),
            helper.make_node("Unsqueeze", ["width", "zero"], ["last"]),
            helper.make_node("Concat", ["sizes", "rows", "last"], ["shape"], axis=0),
            helper.make_node("ConstantOfShape", ["shape"], ["embeddings"]),
        ],
        "other",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", tokens, 48])],
        [
            helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
            helper.make_tensor("rows", TensorProto.INT64, [1], [tokens]),
            helper.make_tensor("width", TensorProto.INT64, [], [47]),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", graphs.OPSET)], ir_version=10)
    (folder / "text.onnx").write_bytes(proto.SerializeToString())
    list_all(folder)

    def run() -> None:
        open_engine("onnx", checkpoint, "cpu").embed_texts(["a cat"])

    # Either ONNX Runtime or the engine reports it.
    with pytest.raises(EngineError, match=r"expected embeddings \[B, \d+, 48\], got|ONNX Runtime"):
        run()


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x0a" * 999, b"ORTM" * 99, b"\x08\x0a" + b"\x3a\x80" * 99])
def test_what_is_no_graph_is_told(checkpoint: Path, folder: Path, content: bytes) -> None:
    (folder / "text.onnx").write_bytes(content)
    list_all(folder)
    refused(checkpoint, r"text\.onnx")


def test_a_graph_without_its_weights_is_the_same_in_all_else(exported: Path, exported_apart: Path) -> None:
    for folder in (exported / "exports" / "onnx-fp32", exported_apart):
        content = (folder / "image.onnx").read_bytes()
        with_weights, rest = (contents.parse(content, "image.onnx", weights=weights) for weights in (True, False))
        for tensor in with_weights.graph.initializer:
            tensor.ClearField("raw_data")
        assert rest == with_weights


def test_a_graph_that_would_fill_the_memory_is_not_read() -> None:
    graph = onnx.GraphProto(node=[onnx.NodeProto()] * (3 << 20)).SerializeToString()
    with pytest.raises(EngineError, match="more than 4194304 bytes besides its weights"):
        contents.parse(b"\x3a" + contents._varint(len(graph)) + graph, "image.onnx")


# ---- Manifests


def test_one_damaged_export_does_not_stop_the_others(checkpoint: Path, folder: Path) -> None:
    int8_folder = folder.with_name("onnx-int8")
    shutil.copytree(folder, int8_folder)
    (int8_folder / "manifest.json").write_text("damaged")
    engine = open_engine("onnx", checkpoint, "cpu")
    assert engine.precision == "fp32"
    assert "not onnx-int8: " in engine.reason
    assert open_engine("onnx", checkpoint, "cpu", precision="fp32").reason == "asked for"
    with pytest.raises(EngineError, match=r"onnx-int8/manifest\.json: expected a manifest"):
        open_engine("onnx", checkpoint, "cpu", precision="int8")
    (int8_folder / "manifest.json").write_text((folder / "manifest.json").read_text())
    change(int8_folder, runtime="trt", options={})
    with pytest.raises(EngineError, match="missing options"):
        open_engine("onnx", checkpoint, "cpu", precision="int8")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_any_manifest_is_one_or_an_error(exported: Path, data: st.DataObject) -> None:
    folder = exported / "exports" / "onnx-fp32"
    path = folder / "manifest.json"
    original = path.read_text()
    values = copy.deepcopy(json.loads(original))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(values)[1:]))
        holder = values
        for key in place[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()) or isinstance(holder, list):
            holder[place[-1]] = data.draw(VALUES)
        else:
            del holder[place[-1]]
    try:
        path.write_text(json.dumps(values))
        try:
            engine: Engine = OnnxEngine(exported, read(folder), "cpu")
        except FineLIPError:
            open_engine("auto", exported, "cpu")
        else:
            assert engine.embed_texts(["a cat"]).shape == (1, engine.config.tokens, engine.config.embed_dim)
            assert engine.export.manifest.checkpoint == fingerprint(exported)
    finally:
        path.write_text(original)


@settings(settings.get_profile("fuzz"), max_examples=EXAMPLES * 4)
@given(data=st.data())
@example(data=None)
def test_any_bytes_are_a_graph_or_an_error(data: st.DataObject | None) -> None:
    node = helper.make_node("Identity", ["x"], ["embeddings"])
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, 2])])
    content = bytearray(helper.make_model(graph).SerializeToString())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        proto = contents.parse(bytes(content), "text.onnx", weights=False)
        contents.interface_problems(proto, "text", finelip_fast.FineLIPConfig.preset("scenes"))
    except EngineError:
        pass
