"""The command line: every command does its work, prints JSON on request, and explains errors with exit code 2."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import torch
from click.shell_completion import BashComplete
from PIL import Image

import finelip_fast
from finelip_fast import cli, demo
from finelip_fast.cli import main


def commands() -> dict[str, click.Command]:
    """Return every command by its words, without the groups."""
    known = {}
    for name, command in cli.finelip.commands.items():
        inside = command.commands if isinstance(command, click.Group) else {}
        known |= {f"{name} {inner}": subcommand for inner, subcommand in inside.items()} or {name: command}
    return known


COMMANDS = sorted(commands())


@pytest.fixture(scope="session")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "other"
    finelip_fast.save(make_model(seed=1, context_length=40, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures and two other files, inside the test's working directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for n, name in enumerate(("a", "b", "c")):
        save_picture(folder / f"{name}.png", n)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "broken.jpg").write_text("not a picture either")
    return folder


def save_picture(path: Path, seed: int) -> None:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(colours).resize((40, 40)).save(path)


@pytest.fixture
def finelip(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which must succeed on the CPU, and returns its output."""

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which must fail, and returns the message, its only output."""

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert "Traceback" not in printed.err
        return printed.err

    return run


def index(finelip: Callable[..., str], photos: Path, checkpoint: Path, *options: object) -> str:
    return finelip("add", photos, "--checkpoint", checkpoint, "--device", "cpu", "--quiet", *options)


# Index and search -----------------------------------------------------------------------------------------------------


def test_index_then_search(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    report = index(finelip, photos, checkpoint)
    assert report.splitlines()[0] == "3 added, 2 skipped"
    assert f"{photos / 'notes.txt'}: not a picture by its name" in report
    assert f"{photos / 'broken.jpg'}: cannot read" in report
    assert Path("finelip-index").is_dir()

    lines = finelip("search", "a red house", "--device", "cpu").splitlines()  # uses the checkpoint of the index
    assert len(lines) == 3
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert {line.split()[-1] for line in lines} == {"a.png", "b.png", "c.png"}

    by_image = finelip("search", "--image", photos / "b.png", "-k", 1, "--device", "cpu").splitlines()
    assert len(by_image) == 1
    assert by_image[0].endswith("  b.png")
    paths = finelip("search", "--image", photos / "b.png", "-k", 1, "--device", "cpu", "--paths")
    assert paths == f"{(photos / 'b.png').resolve()}\n"


def test_index_again_adds_what_is_new(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    index(finelip, photos, checkpoint)
    assert index(finelip, photos, checkpoint).splitlines()[0] == "0 added, 2 skipped"
    save_picture(photos / "d.png", 9)
    report = json.loads(finelip("add", photos, "--device", "cpu", "--quiet", "--json"))  # the checkpoint is remembered
    assert report["added"] == 1
    assert [Path(path).name for path, _ in report["skipped"]] == ["notes.txt", "broken.jpg"]
    assert len(json.loads(finelip("search", "a house", "--json", "--device", "cpu"))) == 4


def test_a_killed_job_goes_on_where_it_was(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    for n in range(60):
        save_picture(photos / f"more-{n}.png", n)
    arguments = [
        "add",
        str(photos),
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--quiet",
    ]
    job = f"import finelip_fast.ingest as i; i._FLUSH_SECONDS = 0; from finelip_fast.cli import main; main({arguments})"
    segments = Path("finelip-index/segments")
    with subprocess.Popen([sys.executable, "-c", job]) as victim:
        while not segments.is_dir() or len(list(segments.glob("*.safetensors"))) < 3:
            assert victim.poll() is None
        victim.kill()
    item_count = json.loads(finelip("index", "check", "--json"))["items"]
    assert 2 <= item_count < 63
    assert finelip(*arguments).splitlines()[0] == f"{63 - item_count} added, 2 skipped"
    assert json.loads(finelip("index", "check", "--json")) == {"items": 63, "damaged": 0, "lost": 0}
    hits = json.loads(finelip("search", "a house", "-k", "100", "--json", "--device", "cpu"))
    assert len({hit["id"] for hit in hits}) == len(hits) == 63


def test_search_speaks_json(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    index(finelip, photos, checkpoint, "--index", "elsewhere")
    arguments = ["search", "a red house", "--index", "elsewhere", "--device", "cpu", "-k", "2"]
    hits = json.loads(finelip(*arguments, "--json"))
    assert [set(hit) for hit in hits] == [
        {"id", "score", "global_score", "fine_score", "metadata", "mode", "path", "stands_out", "shard"}
    ] * 2
    assert hits[0]["score"] >= hits[1]["score"]
    (first, *_) = finelip(*arguments).splitlines()
    assert f"{hits[0]['score']:.4f}" in first
    everything = json.loads(finelip(*arguments, "--alpha", "1", "--json"))
    assert all(hit["score"] == pytest.approx(hit["global_score"], abs=1e-6) for hit in everything)


def test_an_index_is_looked_after(
    finelip: Callable[..., str],
    fails: Callable[..., str],
    photos: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("finelip_fast.ingest._FLUSH_BYTES", 1)
    finelip("add", str(photos), "--checkpoint", str(checkpoint), "--batch-size", "1", "--quiet")
    assert json.loads(finelip("index", "check", "--json")) == {"items": 3, "damaged": 0, "lost": 0}
    finelip("index", "snapshot", "copy")
    assert json.loads(finelip("index", "maintain", "--json"))["segments_before"] == 3
    assert finelip("index", "maintain") == "segments: 1 (before: 1)\n"
    assert finelip("index", "repair") == "3 items, 0 removed as damaged\n"
    (segment,) = Path("finelip-index/segments").glob("*.safetensors")
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    assert "error: 1 of 3 items are damaged, the others are sound" in fails("index", "check")
    repaired = json.loads(finelip("index", "repair", "--json"))
    assert repaired["items"] == 2
    assert list(repaired["removed"]) == ["c.png"]
    assert json.loads(finelip("index", "check", "--json")) == {"items": 2, "damaged": 0, "lost": 0}
    assert index(finelip, photos, checkpoint).splitlines()[0] == "1 added, 2 skipped"
    assert "3" in finelip("index", "check", "--index", "copy")
    for segment in Path("finelip-index/segments").glob("*.safetensors"):
        segment.unlink()  # then it does not even open, but is checked nevertheless
    assert "error: 3 of 3 items are damaged" in fails("index", "check")
    for command in ("check", "maintain", "repair", "tune"):
        assert "there is no index at nowhere" in fails("index", command, "--index", "nowhere")


def test_an_index_is_filtered_and_searched_in_every_mode(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    index(finelip, photos, checkpoint)
    assert "filters on camera are fast now" in finelip("index", "field", "camera")
    search = ["search", "a house", "--json", "--device", "cpu"]
    expected = json.loads(finelip(*search))
    for mode in ("exact-int8", "two-stage"):
        hits = json.loads(finelip(*search, "--mode", mode))
        assert [hit["score"] for hit in hits] == [hit["score"] for hit in expected]
    hits = json.loads(finelip(*search, "--where", "id like '%b.png'"))
    assert [hit["id"] for hit in hits] == ["b.png"]
    assert "expected --mode to be one of auto, exact" in fails(*search, "--mode", "fast")
    assert "error" in fails(*search, "--where", "camera = ")


def test_two_stages_are_tuned_with_items_or_with_texts(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    for n in range(80):
        save_picture(photos / f"more-{n}.png", n)
    index(finelip, photos, checkpoint)
    tuned = json.loads(finelip("index", "tune", "--quiet", "--samples", "20", "--json"))
    assert tuned["chosen"]["candidates"] == 50
    assert tuned["chosen"]["recall_change"] is None
    queries = [json.dumps({"text": f"house {n}", "id": f"more-{n}.png"}) for n in range(5)]
    Path("queries.jsonl").write_text("\n".join(queries))
    arguments = ["index", "tune", "--queries", "queries.jsonl", "--quiet", "--device", "cpu", "--json"]
    tuned = json.loads(finelip(*arguments))
    assert tuned["chosen"]["recall_change"] is not None
    assert "50 candidates" in tuned["tried"]
    assert "expected --bits from 1 to 2, got 4" in fails("index", "sketch", "--bits", "4")
    assert "searches of finelip-index with --mode sketch" in finelip("index", "sketch", "--bits", "2")
    assert "50 candidates by sketch" in json.loads(finelip(*arguments))["tried"]
    hits = json.loads(finelip("search", "a house", "--mode", "sketch", "-k", "3", "--json"))
    assert len(hits) == 3
    for line, message in (
        ("not json", "line 1: expected"),
        ('{"id": "a"}', "line 1: expected"),
        ("", "expected queries in"),
        ('{"text": "a", "id": "lost"}', "not in the index: 'lost'"),
        ('{"text": "a", "id": "x"}\n{"text": "b"}', "expected an id with every query"),
        ('{"text": 5}', "line 1: expected"),
        ('{"text": "a", "id": 5}', "line 1: expected"),
        ("[" * 100_000, "line 1: expected"),
        ('["a"]', "line 1: expected"),
    ):
        Path("queries.jsonl").write_text(line)
        assert message in fails(*arguments)
    Path("queries.jsonl").write_bytes(b"\x89PNG")
    assert "queries.jsonl: expected UTF-8 text" in fails(*arguments)
    Path("queries.jsonl").unlink()
    assert "cannot read queries.jsonl: No such file" in fails(*arguments)
    os.mkfifo("queries.jsonl")
    assert "queries.jsonl: expected a regular file, got a pipe" in fails(*arguments)


def test_an_index_is_planned(finelip: Callable[..., str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["index", "plan", "--checkpoint", checkpoint, "--device", "cpu", "--items"]
    plan = json.loads(finelip(*arguments, "2M", "--json"))
    assert plan["items"] == 2_000_000
    assert plan["encode_seconds"] > 0
    text = finelip(*arguments, "1,000", "--dtype", "int8")
    assert text.startswith("1,000 items\n")
    assert "choose exact" in text
    assert main([*map(str, arguments), "many"]) == 2
    assert "expected --items to be a number such as 20000, 200k, 100M or 1B, got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["0"], "expected --items of at least 1, got 0"),
        (["1k", "--dtype", "float64"], "expected --dtype to be one of float16, int8, got"),
        (["1k", "--candidates", "0"], "expected --candidates of at least 1, got 0"),
        (["1k", "--bits", "3"], "expected --bits from 1 to 2, got 3"),
    ],
    ids=["items", "dtype", "candidates", "bits"],
)
def test_a_plan_is_refused_before_anything_is_measured(
    options: list[str], message: str, fails: Callable[..., str]
) -> None:
    assert message in fails("index", "plan", "--checkpoint", "missing", "--items", *options)


@pytest.mark.parametrize("part", ["3/2", "2/2", "-1/2", "0/0", "1"])
def test_a_part_is_refused_before_the_store_is_asked(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "pull", "s3://nowhere/x", "--part", part]) == 2
    assert f"such as 0/4, got '{part}'" in capsys.readouterr().err


def test_the_root_of_an_index_is_told_with_the_one_before(
    finelip: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    index(finelip, photos, checkpoint)
    root = photos.resolve()
    assert finelip("index", "move-root", photos) == f"root: {root} (unchanged)\n"
    photos.rename("moved")
    assert finelip("index", "move-root", "moved") == f"root: {root.with_name('moved')} (was {root})\n"


def test_an_index_inside_its_pictures_is_not_reported(
    finelip: Callable[..., str], photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    for added in (3, 0):
        report = index(finelip, Path("."), checkpoint)
        assert report.splitlines()[0] == f"{added} added, 2 skipped"


def test_an_empty_folder_gives_an_empty_index(finelip: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    where = ["--index", tmp_path / "index"]
    assert index(finelip, tmp_path / "nothing", checkpoint, *where) == "0 added, 0 skipped\n"
    assert finelip("search", "a house", "--device", "cpu", *where) == ""
    assert json.loads(finelip("search", "a house", "--device", "cpu", "--json", *where)) == []


def test_names_that_a_terminal_cannot_show(
    finelip: Callable[..., str], photos: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        save_picture(photos / name, 5)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    index(finelip, photos, checkpoint)
    assert r"caf\udce9.png" in finelip("search", "a house", "--device", "cpu")
    hits = json.loads(finelip("search", "--image", photos / name, "--device", "cpu", "--json"))
    assert hits[0]["id"] == name


# Eval, convert, info --------------------------------------------------------------------------------------------------


def test_eval_on_scenes(finelip: Callable[..., str], checkpoint: Path) -> None:
    arguments = [
        "eval",
        "scenes:test:4",
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--quiet",
        "--context-lengths",
        "12",
        "40",
    ]
    result = json.loads(finelip(*arguments, "--json"))
    assert result["pairs"] == 4
    assert [(row["context_length"], row["score"]) for row in result["rows"][::3]] == [(12, "global"), (40, "global")]
    assert all(0 <= row["t2i_recall@1"] <= 1 for row in result["rows"])
    assert len(finelip(*arguments).splitlines()) == 7


def test_eval_on_json_lines(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    lines = [json.dumps({"image": f"{name}.png", "caption": f"picture {name}"}) for name in "abc"]
    Path("pairs.jsonl").write_text("\n".join(lines))
    arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--quiet", "--json"]
    result = json.loads(finelip("eval", "jsonl:pairs.jsonl", "--root", photos, "--alpha", "0.5", *arguments))
    assert (result["pairs"], result["alpha"]) == (3, 0.5)


def test_convert_writes_a_checkpoint_that_opens(finelip: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    summary = json.loads(
        finelip("convert", checkpoint, tmp_path / "half", "--dtype", "float16", "--context-length", 50, "--json")
    )
    assert summary["dtype"] == "float16"
    assert summary["context_length"] == finelip_fast.load(tmp_path / "half").config.context_length == 50
    assert f"folder: {tmp_path / 'text'}" in finelip("convert", checkpoint, tmp_path / "text")


def test_export_says_what_is_not_installed(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("finelip_fast.export")]:
        monkeypatch.delitem(sys.modules, name)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find_spec(name, *rest)
    )
    assert fails("export", "onnx") == "error: exporting needs onnx: pip install 'finelip-fast[onnx]'\n"


def test_what_was_exported_answers(finelip: Callable[..., str], photos: Path, make_model, tmp_path: Path) -> None:
    checkpoint = tmp_path / "exported"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_layers=1), checkpoint)
    reports = json.loads(finelip("export", "onnx", str(checkpoint), "--data", "scenes:test:8", "--quiet", "--json"))
    assert reports["fp32"]["passed"] is True
    finelip("add", str(photos), "--checkpoint", str(checkpoint), "--quiet")
    hits = [
        json.loads(finelip("search", "a red house", "--engine", name, "--device", "cpu", "--json"))
        for name in ("torch", "onnx")
    ]
    first, second = ([hit["id"] for hit in engine_hits] for engine_hits in hits)
    assert first == second


def test_info_tells_what_runs_here(finelip: Callable[..., str]) -> None:
    values = json.loads(finelip("info", "--json"))
    assert values["packages"]["finelip-fast"] == finelip_fast.__version__
    assert values["engines"]["torch"] == "runs here"
    assert set(values["engines"]) == {"torch", "onnx", "trt"}
    assert all(values["engines"].values())
    assert values["kernels"]
    text = finelip("info")
    assert "[]" not in text
    assert "packages:\n  finelip-fast: " in text
    assert "  torch: runs here" in text


def test_info_verifies_a_checkpoint(
    finelip: Callable[..., str],
    fails: Callable[..., str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(finelip("info", "--verify", "--json"))["status"] in ("ok", "none recorded")
    shutil.copytree(checkpoint, "copy")
    assert json.loads(finelip("info", "copy", "--verify", "--json"))["status"] == "ok"
    content = bytearray(Path("copy/model.safetensors").read_bytes())
    content[-3] ^= 1
    Path("copy/model.safetensors").write_bytes(content)
    assert "expected the weights of SHA-256" in fails("info", "copy", "--verify")
    assert "lost: no such file or folder" in fails("info", "lost", "--verify")
    assert "expected either PATH or --index, got both" in fails("info", "copy", "--verify", "--index", "x")


def test_info_describes_a_checkpoint(finelip: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    summary = json.loads(finelip("convert", checkpoint, tmp_path / "half", "--dtype", "float16", "--json"))
    described = json.loads(finelip("info", tmp_path / "half", "--json"))
    expected = {**summary, "source": "checkpoint"}
    del expected["folder"]
    assert {name: described.get(name) for name in expected} == expected
    assert described["bytes"] == (tmp_path / "half" / "model.safetensors").stat().st_size
    assert "sha256" not in described
    assert json.loads(finelip("info", tmp_path / "half", "--verify", "--json")).items() >= described.items()
    assert "trained_aggregators: True" in finelip("info", tmp_path / "half" / "model.safetensors")


def test_info_says_what_of_an_index_is_verified(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    index(finelip, photos, checkpoint)
    info = json.loads(finelip("info", "finelip-index", "--json"))
    assert (info["items"], info["checkpoint"], info["dtype"]) == (3, str(checkpoint), "float16")
    assert "hits only" in info["verified"]["by each search"]
    assert json.loads(finelip("info", "--index", "finelip-index", "--json")) == info
    for words in (["finelip-index"], ["--index", "finelip-index"]):
        assert json.loads(finelip("info", *words, "--verify", "--json"))["verified"]["now"] == "all files"
    search = ["search", "a house", "--device", "cpu", "-k", "1"]
    assert finelip(*search, "--verify") == finelip(*search)
    (segment,) = Path("finelip-index/segments").glob("*.safetensors")
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1  # in the last item
    segment.write_bytes(content)
    assert "1 of 3 items are damaged" in fails("info", "--index", "finelip-index", "--verify")
    assert "is not what was written" in fails(*search, "--verify")
    assert "there is no index at lost" in fails("info", "--index", "lost")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_needs_the_gpu_that_is_tuned(fails: Callable[..., str]) -> None:
    assert "expected a GPU that runs the fused kernels" in fails("tune")


def test_a_demo_report_speaks_json(finelip: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}

    def run_demo(folder: str, **options: Any) -> demo.DemoReport:
        arguments.update(options, folder=folder)
        return demo.DemoReport(4, {"all": {"t2i_recall@1": 1.0, "i2t_recall@1": 0.5}}, 1.5, 2.5, "demo/index.html")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    values = json.loads(finelip("demo", "--out", "there", "--scenes", 4, "--quiet", "--json"))
    assert values["rows"]["all"]["t2i_recall@1"] == 1.0
    assert values["page"] == "demo/index.html"
    assert arguments == {"folder": "there", "scenes": 4, "progress": False}
    assert "4 pictures indexed in 2.5 s, 1.5 ms a query" in finelip("demo")


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do(fails: Callable[..., str], photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no index at finelip-index: make one with finelip add FOLDER" in fails("search", "a house")
    assert "there is no index at photos" in fails("search", "a house", "--index", photos)
    assert sorted(path.name for path in photos.iterdir()) == ["a.png", "b.png", "broken.jpg", "c.png", "notes.txt"]
    assert "expected either a description or --image FILE" in fails("search")
    assert "expected either a description or --image FILE" in fails("search", "a house", "--image", photos / "a.png")
    assert "expected a folder, a picture, or a table (.jsonl, .csv, .tsv), got nothing there" in fails(
        "add", tmp_path / "lost", "--checkpoint", checkpoint
    )
    assert "got nothing there: 'lost.csv'; check the path" in fails("add", "lost.csv", "--checkpoint", checkpoint)
    assert "got a file: 'photos/notes.txt'" in fails("add", photos / "notes.txt")
    assert "expected --image to be a picture, not a folder, got 'photos'" in fails("search", "--image", photos)
    assert "expected IMAGE to be a picture, not a folder" in fails("explain", photos, "a house")
    assert "lost: no such file or folder" in fails("add", photos, "--checkpoint", tmp_path / "lost")
    assert "expected --engine to be one of auto, torch, onnx, trt, got 'jax'" in fails(
        "add", photos, "--checkpoint", checkpoint, "--engine", "jax"
    )
    assert "--device tpux cannot be used: PyTorch knows no such device; use --device cpu" in fails(
        "add", photos, "--checkpoint", checkpoint, "--device", "tpux"
    )
    assert "expected --batch-size of at least 1" in fails(
        "add", photos, "--checkpoint", checkpoint, "--batch-size", "0", "--quiet"
    )
    assert "expected scenes:SPLIT, jsonl:FILE" in fails("eval", "coco", "--checkpoint", checkpoint)
    assert "cannot read lost.jsonl" in fails("eval", "jsonl:lost.jsonl", "--checkpoint", checkpoint)
    assert "expected --context-lengths from 3 to" in fails(
        "eval", "scenes:test:4", "--checkpoint", checkpoint, "--context-lengths", "999"
    )
    assert "lost: no such file or folder" in fails("convert", tmp_path / "lost", tmp_path / "out")
    assert "expected --scenes of at least 1, got 0" in fails("demo", "--out", tmp_path / "demo", "--scenes", "0")
    assert not (tmp_path / "demo").exists()


def test_errors_of_a_search(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path, other_checkpoint: Path
) -> None:
    index(finelip, photos, checkpoint)
    message = fails("search", "a house", "--checkpoint", other_checkpoint)
    assert str(checkpoint) in message
    assert str(other_checkpoint) in message
    assert "expected -k of at least 1, got 0" in fails("search", "a house", "-k", "0")
    assert "expected --alpha in [0, 1], got 2.0" in fails("search", "a house", "--alpha", "2")
    assert "not an image" in fails("search", "--image", photos / "notes.txt")
    Path("finelip-index/catalogue.sqlite").write_bytes(b"not a database" * 100)
    assert "cannot be opened as an index catalogue" in fails("search", "a house")


def test_a_checkpoint_that_moved_is_named(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    shutil.copytree(checkpoint, "moving")
    index(finelip, photos, Path("moving"))
    Path("moving").rename("moved")
    assert f"{Path('moving').absolute()}: no such file or folder" in fails("search", "a house")
    assert finelip("search", "a house", "--checkpoint", "moved", "--device", "cpu")


@pytest.mark.parametrize(
    "command",
    [
        "demo --scenes 1 --out OUT",
        "add photos --checkpoint CHECKPOINT --index OUT",
        "index snapshot OUT",
        "eval scenes:test:2 --checkpoint CHECKPOINT --cache OUT",
        "eval scenes:test:2 --checkpoint CHECKPOINT --save OUT",
        "explain photos/a.png red --checkpoint CHECKPOINT --html OUT",
        "explain photos/a.png red --checkpoint CHECKPOINT --phrase red --overlay OUT",
        "study length --data scenes:test:2 --validation scenes:val:2 --checkpoint CHECKPOINT --out OUT",
        "convert CHECKPOINT OUT",
        "export onnx CHECKPOINT --out OUT",
        "train --init CHECKPOINT --train scenes:train --validation scenes:val:2 --device cpu --out OUT",
        "study ablation --out OUT",
    ],
)
def test_what_cannot_be_written_is_an_error(
    finelip: Callable[..., str],
    photos: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    if "snapshot" in command:
        index(finelip, photos, checkpoint)
    where = photos / "notes.txt" / "x"  # below a file, where even root cannot write

    def too_long_for_a_test(*_: object, **__: object) -> None:
        raise NotADirectoryError(20, "Not a directory", str(where))

    monkeypatch.setattr("finelip_fast.export.to_onnx.export_onnx", too_long_for_a_test)
    monkeypatch.setattr("finelip_fast.studies.ablation.command.load_recipe", too_long_for_a_test)
    paths = {"CHECKPOINT": str(checkpoint), "OUT": str(where)}
    assert main([paths.get(word, word) for word in command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert "notes.txt" in printed.err.splitlines()[-1]
    if command.startswith("study length"):
        assert printed.out  # the result of the long computation is printed


def test_a_signal_keeps_what_was_embedded(
    finelip: Callable[..., str], photos: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from finelip_fast.engines.torch import TorchEngine

    encode, batches = TorchEngine.encode_image, []

    def interrupted(*arguments: Any) -> Any:
        batches.append(arguments)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(TorchEngine, "encode_image", interrupted)
    arguments = ["add", str(photos), "--checkpoint", str(checkpoint), "--batch-size", "1", "--quiet"]
    assert main([*arguments, "--engine", "torch", "--device", "cpu"]) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert json.loads(finelip("index", "check", "--json"))["items"] == 2
    assert finelip(*arguments, "--device", "cpu").splitlines()[0] == "1 added, 2 skipped"


def test_a_folder_that_cannot_be_written_to_is_read_by_every_reading_command(
    finelip: Callable[..., str],
    fails: Callable[..., str],
    photos: Path,
    checkpoint: Path,
    tmp_path: Path,
    as_a_guest: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Path(shutil.copytree(checkpoint, "checkpoint"))
    index(finelip, photos, checkpoint)
    options = ["--checkpoint", checkpoint, "--device", "cpu"]
    searches = [
        ["search", "a house", *options, "--json", *extra_options]
        for extra_options in (
            [],
            ["--mode", "exact-int8"],
            ["--mode", "two-stage"],
            ["--where", "id like '%b.png'"],
            ["--verify"],
            ["--engine", "torch"],
        )
    ]

    def scores() -> list[dict[str, float]]:
        return [{hit["id"]: hit["score"] for hit in json.loads(finelip(*search))} for search in searches]

    expected = scores()
    shutil.rmtree("finelip-index/cache", ignore_errors=True)
    before = {path: path.read_bytes() for path in Path("finelip-index").rglob("*") if path.is_file()}
    save_picture(photos / "d.png", 9)  # a picture that could be added
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "finelip-index"))  # not writable, either
    with as_a_guest(tmp_path):
        assert scores() == expected
        retriever = finelip_fast.Retriever(checkpoint, index="finelip-index", device="cpu")
        assert len(retriever.search("a house")) == len(retriever) == 3
        assert json.loads(finelip("index", "check", "--json"))["items"] == 3
        assert json.loads(finelip("info", "--index", "finelip-index", "--json"))["items"] == 3
        for command in (
            ["add", photos, *options, "--quiet"],
            ["index", "field", "camera"],
            ["index", "snapshot", "copy"],
        ):
            assert "cannot" in fails(*command)
    assert {path: path.read_bytes() for path in Path("finelip-index").rglob("*") if path.is_file()} == before


def test_a_user_without_a_home_can_do_all(
    finelip: Callable[..., str],
    fails: Callable[..., str],
    photos: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FINELIP_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    index(finelip, photos, checkpoint)
    assert len(finelip("search", "a house", "--checkpoint", checkpoint, "--device", "cpu").splitlines()) == 3
    assert "3 added" in finelip("add", photos, "--index", "bundled", "--device", "cpu", "--quiet")
    assert finelip("info")
    assert "~nobody-here/x: no such file or folder" in fails("search", "a house", "--checkpoint", "~nobody-here/x")
    assert "--device tpux cannot be used" in fails(
        "explain", photos / "a.png", "red", "--checkpoint", checkpoint, "--device", "tpux"
    )


def test_names_of_strangers_forge_no_lines(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    forged = "a\n  1  9.9999  (global 1.0000, fine 1.0000)  forged\x1b[1A\r\u202e.png"
    save_picture(photos / forged, 7)
    (photos / "b\n9 added, 0 skipped").touch()
    report = index(finelip, photos, checkpoint)
    assert report.splitlines()[0] == "4 added, 3 skipped"
    assert len(report.splitlines()) == 4
    lines = finelip("search", "a house", "--device", "cpu").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    escaped_name = r"a\n  1  9.9999  (global 1.0000, fine 1.0000)  forged\x1b[1A\r\u202e.png"
    assert any(line.endswith(escaped_name) for line in lines)
    hits = json.loads(finelip("search", "a house", "--json", "--device", "cpu"))
    assert forged in {hit["id"] for hit in hits}
    for segment in Path("finelip-index/segments").glob("*.safetensors"):
        segment.unlink()
    message = fails("index", "check")
    assert escaped_name in message
    assert len(message.splitlines()) == 5
    assert not re.search(r"[\x1b\r\u202e]", report + "\n".join(lines) + message)
    repaired = finelip("index", "repair")
    assert escaped_name in repaired
    assert main(["search", "a\x1b[2J", "b\x1b[2J"]) == 2


def test_an_interruption_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["index"], ["export"], ["unknown"], ["search", "-k"], ["search", "--no-such"]],
    ids=["none", "none-index", "none-export", "unknown", "missing", "option"],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "Usage: finelip" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flag in ("--help", "-h"):
        assert main([*command.split(), flag]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"Usage: finelip {command} [OPTIONS]")
    assert "--json " in texts[0]
    assert "--quiet " in texts[0]


def test_a_default_checkpoint_is_the_indexs_only_where_there_is_an_index(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        main([*command.split(), "--help"])
        words = " ".join(capsys.readouterr().out.split())
        if "--index FOLDER" not in words:
            assert "the index's, or the bundled one" not in words, command


def test_explain_has_no_options_of_other_engines(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--engine", "--precision"):
        assert main(["explain", "a.png", "red", option, "x"]) == 2
        assert f"There is no option {option}" in capsys.readouterr().err


def test_help_spells_values_as_they_are_typed(finelip: Callable[..., str]) -> None:
    text = " ".join(finelip("train", "--help").split())
    for value in ("auto, cpu, cuda", "bf16 (autocast)", "cached, those", "torch.compile"):
        assert value in text
        assert value[0].upper() + value[1:] not in text


def test_the_installed_command_lists_all_commands() -> None:
    script = shutil.which("finelip", path=str(Path(sys.executable).parent))
    assert script is not None, "the finelip command is not installed beside this Python"
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(re.search(rf"^  {command.split()[0]} ", result.stdout, re.MULTILINE) for command in COMMANDS)


def test_help_and_completion_import_nothing_heavy() -> None:
    """``finelip --help`` takes a fifth of a second; PyTorch alone takes seconds."""
    words = [["--help"], ["--version"], ["completion", "bash"], *([*command.split(), "--help"] for command in COMMANDS)]
    code = (
        f"import os, sys\nfrom finelip_fast.cli import main\nfor words in {words}:\n    assert main(words) == 0\n"
        "os.environ.update(_FINELIP_COMPLETE='bash_complete', COMP_WORDS='finelip sea', COMP_CWORD='1')\nmain([])\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'onnx', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("plain,search\n[]\n")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("index docs", "To add the pictures of a folder: finelip add docs"),
        ("index photos", "got 'photos'. There are bulk, check"),
        ("index info", "Use finelip info --index FOLDER."),
        ("index rm a.png", "Use finelip remove."),
        ("index verify", "Use finelip index check."),
        (
            "index --index x check",
            "Options follow the command, and --index stands before it: finelip index check --index x",
        ),
        ("--json list", "finelip list --json"),
        ("index --index x", "finelip index COMMAND --index x"),
        ("index add photos", "Use finelip add."),
        ("index delete a.png", "Use finelip remove."),
        ("search a red car", "Put the description in quotes: finelip search 'a red car'"),
        ("explain a.png red car", "Put the description in quotes: finelip explain a.png 'red car'"),
        ("search red docs", "Did you mean --index docs?"),
        ("serve pictures", "Did you mean --index pictures?"),
        ("index check pictures", "Did you mean --index pictures?"),
        ("list --model x", "There is no option --model."),
        ("add docs --model x", "There is no option --model. Did you mean --checkpoint?"),
        ("search red --limit 3", "There is no option --limit. Did you mean -k?"),
        ("demo --quite", "There is no option --quite. Did you mean --quiet?"),
        ("train --resume", "There is no option --resume: to resume, run it again with the same --out."),
        ("adapt base --out x", "Missing options --train and --validation."),
        ("adapt", "Missing argument BASE and options --out, --train and --validation."),
        ("explain", "Missing arguments IMAGE and TEXT."),
        ("add", "Missing argument SOURCE."),
        ("search red -k many", "expected -k to be an integer, got 'many'"),
        ("serve --alpha most", "expected --alpha to be a number, got 'most'"),
        ("index pull s3://a --part 3", "expected --part to be I/N such as 0/4, got '3'"),
        ("serch house", "got 'serch'. Did you mean search?"),
        ("index chek", "got 'chek'. Did you mean check?"),
        ("eval scenes:test --alpha-sweep scenes:val", "--alpha-sweep is called --validation now."),
        ("eval scenes:test --context 77", "--context is called --context-lengths now."),
        ("eval scenes:test --out result.json", "--out is called --save now."),
        ("eval compare a b --format markdown", "--format is called --markdown or --json now."),
        ("explain a.png red --out why.html", "--out is called --html now."),
        ("study ablation --choose-on scenes:val", "--choose-on is called --validation now."),
        ("export onnx --pairs scenes:test:8", "--pairs is called --data now."),
        ("export trt --pairs scenes:test:8", "--pairs is called --data now."),
        ("convert a b --half", "--half is called --dtype float16 now."),
        ("convert a.pt b --part ema", "--part is called --key now."),
        ("tune --out table.json", "--out is called --settings now."),
        ("train --val scenes:val", "--val is called --validation now."),
        ("train --image-root photos", "--image-root is called --root now."),
        ("train --accumulate 4", "--accumulate is called --accumulation-steps now."),
    ],
)
def test_a_former_spelling_is_answered_with_the_one_of_today(
    typed: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert answer in printed.err.splitlines()[-1]


@pytest.mark.parametrize("words", [["search", ""], ["search", " "], ["explain", "a.png", ""]])
def test_an_empty_description_is_refused(words: list[str], fails: Callable[..., str]) -> None:
    assert "expected a description, got an empty one" in fails(*words)


def test_help_and_version_are_words_too(finelip: Callable[..., str]) -> None:
    assert finelip("help") == finelip("--help")
    assert finelip("help", "index", "check") == finelip("index", "help", "check") == finelip("index", "check", "-h")
    assert finelip("version") == finelip("-V") == finelip("--version")


def test_required_options_are_marked(finelip: Callable[..., str]) -> None:
    text = " ".join(finelip("adapt", "--help").split())
    for option in ("--out", "--train", "--validation"):
        assert re.search(rf"{option} [A-Z]+ [^\[]*\[required\]", text)


def test_options_of_several_values_take_them_at_once_or_one_by_one() -> None:
    for words in (["--seeds", "3", "1", "--jobs", "2"], ["--seeds", "3", "--jobs", "2", "--seeds=1"]):
        params = cli.ablation.make_context("finelip study ablation", words).params
        assert (params["seeds"], params["jobs"]) == ((3, 1), 2)
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        cli.ablation.make_context("finelip study ablation", ["--seeds", "1", "--", "2"])


def completions(*words: str) -> list[tuple[str, str]]:
    """Return kinds and values of what the last word is completed to."""
    completer = BashComplete(cli.finelip, {}, "finelip", "_FINELIP_COMPLETE")
    return [(item.type, item.value) for item in completer.get_completions([*words[:-1]], words[-1])]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("add pi", [("file", "pi")]),
        ("serve --index fin", [("dir", "fin")]),
        ("search --image pi", [("file", "pi")]),
        ("search --html pi", [("file", "pi")]),
        ("add photos --root pi", [("dir", "pi")]),
        ("eval compare re", [("file", "re")]),
        ("convert my", [("file", "my")]),
        ("train --init my", [("file", "my")]),
        ("train --accumulation ca", [("plain", "cached")]),
        ("search --engine to", [("plain", "torch")]),
        ("search --mode exact", [("plain", "exact"), ("plain", "exact-int8")]),
        ("export onnx --precision int8", [("plain", "int8"), ("plain", "int8-calibrated")]),
        ("completion z", [("plain", "zsh")]),
        ("serve --device c", [("plain", "cpu"), ("plain", "cuda")]),
    ],
)
def test_values_are_completed(typed: str, answer: list[tuple[str, str]]) -> None:
    assert completions(*typed.split()) == answer


def test_words_that_are_completed_are_those_of_the_library() -> None:
    from finelip_fast.checkpoint.architecture import ACTIVATIONS
    from finelip_fast.cli import commands as shared
    from finelip_fast.engines import ENGINES
    from finelip_fast.explain import MAPS
    from finelip_fast.index.search import Mode
    from finelip_fast.index.segments import DTYPES
    from finelip_fast.runtimes.manifest import PRECISIONS

    def words(command: str, name: str) -> tuple[str, ...]:
        return next(param.type.words for param in commands()[command].params if param.name == name)

    assert shared.ENGINES.words == ENGINES
    assert shared.PRECISIONS.words == PRECISIONS
    assert set(shared.DTYPES.words) == set(DTYPES)
    assert set(words("search", "mode")) == set(get_args(Mode))
    assert set(words("explain", "tokens")) == set(MAPS)
    assert set(words("convert", "activation")) == set(ACTIVATIONS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell: str, finelip: Callable[..., str]) -> None:
    assert "_FINELIP_COMPLETE" in finelip("completion", shell)


def test_another_shell_is_refused(fails: Callable[..., str]) -> None:
    assert "expected SHELL to be one of bash, zsh, fish, got 'csh'" in fails("completion", "csh")


def test_defaults_are_those_of_the_library() -> None:
    from finelip_fast.export import graphs, parity, to_onnx

    options = {param.name: param for param in cli.export.commands["onnx"].params}
    assert options["opset"].default == graphs.OPSET
    assert options["data"].help.endswith(f"or {parity.DATA}]")
    assert options["calibration"].help.endswith(f"or {to_onnx.CALIBRATION}]")


# List and remove ------------------------------------------------------------------------------------------------------


def test_items_are_listed_and_removed(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    index(finelip, photos, checkpoint)
    paths = [str((photos / f"{name}.png").resolve()) for name in "abc"]
    assert finelip("list").splitlines() == ["a.png", "b.png", "c.png"]
    assert finelip("list", "--paths").splitlines() == paths
    items = json.loads(finelip("list", "--json"))
    assert [(item["id"], item["path"]) for item in items] == [(Path(path).name, path) for path in paths]
    assert all(item["metadata"].keys() == {"bytes", "modified", "sha256", "width", "height"} for item in items)
    assert json.loads(finelip("list", "--paths", "--json", "--where", "id like '%b.png'")) == paths[1:2]
    assert json.loads(finelip("remove", paths[0], "--json")) == {"removed": 1, "items": 2}
    assert finelip("list", "--paths").splitlines() == paths[1:]
    assert finelip("remove", "--where", "id like '%b.png'") == "1 removed, 1 left\n"
    assert finelip("list", "--paths").splitlines() == paths[2:]
    assert (photos / "b.png").exists()


def test_metadata_is_listed(finelip: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    retriever = finelip_fast.Retriever(checkpoint, index=tmp_path / "index", device="cpu")
    retriever.add_texts(["a", "b"], ids=["x", "y\nz"], metadata=[{"year": 1}, {"year": 2}], progress=False)
    retriever.index.close()
    assert finelip("list", "--index", tmp_path / "index").splitlines() == ['x  {"year": 1}', r'y\nz  {"year": 2}']
    assert finelip("list", "--index", tmp_path / "index", "--paths").splitlines() == ["x", r"y\nz"]
    assert json.loads(finelip("list", "--index", tmp_path / "index", "--where", "year = 2", "--json")) == [
        {"id": "y\nz", "path": None, "metadata": {"year": 2}}
    ]


def test_a_filter_that_matches_nothing_says_so(
    finelip: Callable[..., str], photos: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(finelip, photos, checkpoint)
    message = "the filter width = 1 matches none of the 3 items\n"
    filtered = ("--where", "width = 1")
    for command in (["search", "a house", "--device", "cpu"], ["list"], ["list", "--paths"]):
        assert main([*command, *filtered]) == 0
        assert capsys.readouterr() == ("", message)
    assert finelip("remove", *filtered) == message
    assert main(["list", "--where", "widht > 3 and id = 'a.png'"]) == 0
    reason = "no item has the field widht, but some have width\n"
    assert capsys.readouterr().err.endswith(f"matches none of the 3 items; {reason}")
    assert "no item has the field camera, but some have bytes, modified" in finelip("index", "field", "camera")
    assert finelip("index", "field", "width") == "filters on width are fast now\n"
    assert json.loads(finelip("search", "a house", "--device", "cpu", "--json", *filtered)) == []
    assert json.loads(finelip("list", "--json", *filtered)) == []
    assert json.loads(finelip("remove", "--json", *filtered)) == {"removed": 0, "items": 3}


def test_what_cannot_be_listed_or_removed(
    finelip: Callable[..., str], fails: Callable[..., str], photos: Path, checkpoint: Path
) -> None:
    assert "there is no index at finelip-index: make one with finelip add FOLDER" in fails("list")
    assert "there is no index at finelip-index: make one with finelip add FOLDER" in fails("remove", "a")
    index(finelip, photos, checkpoint)
    assert "expected either ids or --where FILTER, got neither" in fails("remove")
    assert "expected either ids or --where FILTER, got both" in fails("remove", "a", "--where", "year = 1")
    assert "not in the index: 'a'" in fails("remove", "a", photos / "b.png")
    assert len(finelip("list").splitlines()) == 3


def test_several_folders_are_added(finelip: Callable[..., str], photos: Path, checkpoint: Path) -> None:
    Path("more").mkdir()
    save_picture(Path("more") / "d.png", 7)
    report = finelip("add", photos, "more", "--checkpoint", checkpoint, "--device", "cpu", "--quiet")
    assert report.splitlines()[0] == "4 added, 2 skipped"


def test_a_quiet_command_does_not_warn(
    finelip: Callable[..., str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(*_: object, **__: object) -> str:
        warnings.warn("look out", stacklevel=1)
        logging.getLogger("finelip_fast.demo").warning("skipped")
        return "done"

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert finelip("demo", "--quiet") == "done\n"
    assert not caplog.messages
    with pytest.warns(UserWarning, match="look out"):
        finelip("demo")
    assert caplog.messages == ["skipped"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is Linux's")
@pytest.mark.parametrize(("variable", "policy"), [("FINELIP_UNRELATED", "active"), ("GOMP_SPINCOUNT", "None")])
def test_a_command_tells_openmp_to_stay_awake_unless_the_user_told_it_something(variable: str, policy: str) -> None:
    program = (
        "import os; from finelip_fast.cli import main; main(['--version']); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, variable: "1000"},
    )
    assert run.stdout.splitlines()[-1] == policy
