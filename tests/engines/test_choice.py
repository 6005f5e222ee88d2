"""Choosing an engine: the requested one or an error, otherwise the fastest proven one, with one line that says why."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import finelip_fast
from finelip_fast.engines import choice, open_engine
from finelip_fast.engines import torch as torch_engine
from finelip_fast.engines.choice import Candidate, fastest
from finelip_fast.errors import EngineError, InputError
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.kernels import cpu
from finelip_fast.runtimes.manifest import read

CONTEXT = 24
PAIRS = "scenes:test:8"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("choice") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_layers=1), folder)
    export_onnx(folder, data=PAIRS, progress=False)
    return folder


@pytest.fixture(scope="module")
def bare(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "checkpoint"
    finelip_fast.save(make_model(seed=1, context_length=CONTEXT, vision_layers=1, text_layers=1), folder)
    return folder


class Stub:
    """An engine of adjustable speed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Candidate]]:
    """Return a function that builds candidates of given speeds (None: cannot be opened); log which are opened and timed."""
    seconds: dict[int, float] = {}
    log: list[str] = []

    def build(**speeds: float | None) -> list[Candidate]:
        def opener(label: str, speed: float | None) -> Callable[[str], Stub]:
            def open_it(reason: str) -> Stub:
                log.append(f"open {label}")
                if speed is None:
                    raise EngineError("broken")
                engine = Stub(reason)
                engine.label = label
                seconds[id(engine)] = speed
                return engine

            return open_it

        return [Candidate(label, opener(label, speed), "x") for label, speed in speeds.items()]

    def measure(engine: Stub) -> float:
        log.append(f"time {engine.label}")
        return seconds[id(engine)]

    monkeypatch.setattr(choice, "_seconds", measure)
    build.log = log
    return build


def test_the_fastest_is_taken_and_the_others_are_told(stubs) -> None:
    engine = fastest(stubs(a=0.2, b=0.05, c=None), {"d": "not installed"})
    assert engine.label == "b"
    assert engine.reason == "fastest here: 50 ms a picture and a caption, a 200 ms; not d: not installed; not c: broken"


def test_int8_that_is_slower_here_is_not_used(stubs) -> None:
    engine = fastest([*stubs(int8=0.3), *stubs(fp32=0.1)])
    assert engine.label == "fp32"
    assert "int8 300 ms" in engine.reason


def test_what_was_timed_once_is_not_timed_again(stubs, empty_cache: Path) -> None:
    fastest(stubs(a=0.2, b=0.05))
    stubs.log.clear()
    engine = fastest(stubs(a=0.2, b=0.05))
    assert stubs.log == ["open b"]
    assert engine.reason == "fastest here: 50 ms a picture and a caption, a 200 ms"
    (empty_cache / "engine_times.json").write_text("damaged")
    assert fastest(stubs(a=0.2, b=0.05)).label == "b"
    assert len(json.loads((empty_cache / "engine_times.json").read_text())) == 2


def test_a_cache_that_cannot_be_written_costs_the_timing_alone(stubs, empty_cache: Path) -> None:
    empty_cache.write_text("a file where the folder would be")
    assert fastest(stubs(a=0.2, b=0.05)).label == "b"


def test_a_known_winner_that_broke_since_gives_way(stubs) -> None:
    fastest(stubs(a=0.2, b=0.05))
    engine = fastest(stubs(a=0.2, b=None))
    assert engine.label == "a"
    assert engine.reason == "not b: broken"


def test_when_none_can_run_every_reason_is_told(stubs) -> None:
    with pytest.raises(EngineError, match="no engine can run: d: not installed; a: broken; b: broken"):
        fastest(stubs(a=None, b=None), {"d": "not installed"})


def test_auto_compares_what_is_beside_the_checkpoint(checkpoint: Path) -> None:
    engine = open_engine("auto", checkpoint, "cpu")
    assert engine.reason.startswith("fastest here: ")
    assert ("torch float32" in engine.reason) == (engine.name == "onnx")
    assert "not trt: " in engine.reason


def test_auto_says_how_to_get_a_faster_one(bare: Path) -> None:
    engine = open_engine("auto", bare, "cpu")
    assert engine.name == "torch"
    assert f"not onnx: no export in {bare / 'exports'} (finelip export onnx {bare} --precision fp32" in engine.reason


def test_a_named_engine_without_its_files_is_an_error(bare: Path) -> None:
    with pytest.raises(EngineError, match=r"engine='onnx' cannot run: no export in .*finelip export onnx .*build=True"):
        open_engine("onnx", bare, "cpu")


def test_a_named_precision_is_an_order(checkpoint: Path) -> None:
    assert open_engine("onnx", checkpoint, "cpu", precision="fp32").description == "cpu, fp32"
    with pytest.raises(EngineError, match="--precision int8 makes one"):
        open_engine("onnx", checkpoint, "cpu", precision="int8")


def test_settings_that_an_engine_does_not_have_are_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"on cpu to be one of fp32, bf16, int8, got 'fp16'; exports support"):
        open_engine("torch", checkpoint, "cpu", precision="fp16")
    with pytest.raises(InputError, match=r"torch\.set_num_threads"):
        open_engine("torch", checkpoint, threads=2)
    with pytest.raises(InputError, match="expected threads of at least 1, got 0"):
        open_engine("onnx", checkpoint, threads=0)
    with pytest.raises(InputError, match="expected precision to be one of"):
        open_engine("onnx", checkpoint, precision="fp8")


def test_a_precision_is_that_of_the_model_too(bare: Path) -> None:
    if torch_engine.why_not("int8") is not None:
        pytest.skip("no int8 instructions")
    engine = open_engine("auto", bare, "cpu", precision="int8")
    assert (engine.name, engine.precision, engine.description) == ("torch", "int8", "cpu, int8")


def test_a_precision_that_no_engine_has_is_refused(bare: Path) -> None:
    message = (
        r"no engine can run in fp16: .*finelip export onnx .*torch: it has fp32, bf16, int8 on cpu; leave precision out"
    )
    with pytest.raises(EngineError, match=message):
        open_engine("auto", bare, "cpu", precision="fp16")


def test_engines_without_the_precision_are_left_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "PRECISIONS", {"cpu": ("bf16",)})
    engine = open_engine("auto", checkpoint, "cpu", precision="fp32")
    assert engine.name == "onnx"
    assert "not torch: it has bf16 on cpu" in engine.reason


def test_a_device_of_another_kind_is_refused(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "PRECISIONS", {"cuda": ("fp16",)})
    for name in ("torch", "auto"):
        with pytest.raises(InputError, match="expected device of the engine as cuda, got 'cpu'; leave it out"):
            open_engine(name, bare, "cpu")


def test_int8_is_advised_where_it_would_be_much_faster(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has", lambda feature: feature == "vnni")
    assert not open_engine("auto", bare, "cpu").faster, "a narrow model"
    monkeypatch.setattr(choice, "_WIDE", 64)
    engine = open_engine("auto", bare, "cpu")
    command = f"finelip export onnx {bare} --precision int8"
    assert f"int8 is about twice as fast on this processor: {command} makes an export" in engine.faster
    assert engine.reason.endswith(f"; {engine.faster}")
    for options in ({"name": "auto", "precision": "fp32"}, {"name": "torch"}):
        assert not open_engine(checkpoint=bare, device="cpu", **options).faster, "what was asked for is no mistake"
    monkeypatch.setattr(choice, "why_not", lambda name: "not installed")
    assert open_engine("auto", bare, "cpu").faster.endswith(" processor: --precision int8 (precision='int8')")
    monkeypatch.setattr(cpu, "has", lambda feature: False)
    assert not open_engine("auto", bare, "cpu").faster, "another processor"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_precision_without_instructions_is_refused(
    bare: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(cpu, "has", lambda feature: False)
    with pytest.raises(EngineError, match=f"cannot run in {precision}: this processor has no .*; omit precision"):
        open_engine("torch", bare, "cpu", precision=precision)
    with pytest.raises(EngineError, match=f"no engine can run in {precision}: .*torch: this processor has no "):
        open_engine("auto", bare, "cpu", precision=precision)


@pytest.mark.parametrize("change", ["checkpoint", "file", "proof", "device"])
def test_files_that_do_not_fit_are_refused_with_the_command(bare: Path, checkpoint: Path, change: str) -> None:
    folder = bare / "exports" / "onnx-fp32"
    shutil.copytree(checkpoint / "exports" / "onnx-fp32", folder)
    try:
        manifest = read(folder).manifest
        if change != "checkpoint":
            manifest = dataclasses.replace(manifest, checkpoint=finelip_fast.checkpoint.fingerprint(bare))
        if change == "proof":
            manifest = dataclasses.replace(manifest, proof={})
        if change == "device":
            manifest = dataclasses.replace(manifest, proof={**manifest.proof, "devices": ["cuda"]})
        manifest.write(folder)
        if change == "file":
            (folder / "text.onnx").write_bytes(b"other")
        text = {"checkpoint": "checkpoint: made from", "file": "text.onnx: not the file", "proof": "never compared"}
        text["device"] = "was not proven on cpu"
        with pytest.raises(
            EngineError, match=rf"{text[change]}.*xport it again.*: finelip export onnx .*--precision fp32"
        ):
            open_engine("onnx", bare, "cpu")
        engine = open_engine("auto", bare, "cpu")
        assert engine.name == "torch"
        assert text[change] in engine.reason
    finally:
        shutil.rmtree(folder)


def test_a_damaged_manifest_stops_the_named_engine_alone(bare: Path) -> None:
    path = bare / "exports" / "onnx-fp32" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text("damaged")
    try:
        with pytest.raises(EngineError, match=r"manifest\.json: expected a manifest: .*; export it again; finelip"):
            open_engine("onnx", bare, "cpu")
        assert "not onnx-fp32: " in open_engine("auto", bare, "cpu").reason
    finally:
        shutil.rmtree(path.parent)


def test_build_makes_what_is_missing(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "to build"  # the space tests quoting: the command is used as printed
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_layers=1), folder)
    retriever = finelip_fast.Retriever(folder, engine="onnx", device="cpu", build=True)
    assert retriever.engine.name == "onnx"
    assert "export, fp32: 100%" in capsys.readouterr().err, "it takes a while: progress is shown"
    before = (folder / "exports" / "onnx-fp32" / "manifest.json").stat().st_mtime_ns
    finelip_fast.Retriever(folder, engine="onnx", device="cpu", build=True)
    assert (folder / "exports" / "onnx-fp32" / "manifest.json").stat().st_mtime_ns == before


def test_a_build_that_fails_says_why(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.manifest, "rebuild_arguments", lambda *_: ["export", "onnx", "nowhere"])
    with pytest.raises(EngineError, match="failed: error: nowhere: no such file or folder"):
        open_engine("onnx", bare, "cpu", build=True)


def test_int8_is_refused_where_products_saturate(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finelip_fast.engines import onnx

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)  # other tests expect no int8 in theirs
    export_onnx(folder, precision="int8", data=PAIRS, progress=False)
    monkeypatch.setattr(onnx, "adds_bytes_exactly", lambda: False)
    with pytest.raises(EngineError, match="8-bit products saturate"):
        open_engine("onnx", folder, "cpu", precision="int8")
    assert "not onnx int8: 8-bit products saturate on this processor" in open_engine("auto", folder, "cpu").reason


def test_a_retriever_gives_the_same_with_every_engine(checkpoint: Path) -> None:
    texts = ["a red house", "a blue bus waits", "a cat on a roof"]
    torch_retriever = finelip_fast.Retriever(checkpoint, engine="torch", device="cpu")
    onnx_retriever = finelip_fast.Retriever(checkpoint, engine="onnx", precision="fp32", device="cpu")
    for retriever in (torch_retriever, onnx_retriever):
        retriever.add_texts(texts, progress=False)
    for torch_hits, onnx_hits in zip(
        torch_retriever.search(texts, k=3), onnx_retriever.search(texts, k=3), strict=True
    ):
        assert [hit.id for hit in torch_hits] == [hit.id for hit in onnx_hits]
        torch.testing.assert_close(
            torch.tensor([hit.score for hit in torch_hits]),
            torch.tensor([hit.score for hit in onnx_hits]),
            atol=1e-3,
            rtol=0,
        )
