"""Exports to a failing disk: the error gives the reason, nothing is half written, and existing files are kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import finelip_fast
from finelip_fast.cli import main
from finelip_fast.engines import open_engine
from finelip_fast.errors import EngineError, InputError, WriteError
from finelip_fast.export import graphs, to_onnx, to_trt
from finelip_fast.export.release import being_written, export_path, hashes
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.export.to_trt import export_trt
from finelip_fast.runtimes.manifest import find, read

resource = pytest.importorskip("resource", reason="limits of files are Unix's")

PAIRS = "scenes:test:8"


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("writing") / "checkpoint"
    finelip_fast.save(make_model(context_length=24, vision_layers=1, text_layers=1), folder)
    export_onnx(folder, data=PAIRS, progress=False)
    return folder


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "checkpoint"))


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit the size of any written file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("size", "external"), [(0, False), (100_000, False), (1000, True)])
def test_a_full_disk_is_an_error_and_costs_nothing(
    checkpoint: Path, size: int, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if external:
        monkeypatch.setattr(graphs, "LARGEST_FILE", 0)
    with full_disk(size), pytest.raises(WriteError, match=r"cannot write .*image\.onnx"):
        export_onnx(checkpoint, data=PAIRS, progress=False, again=True)
    assert names(checkpoint / "exports") == ["onnx-fp32"]
    assert open_engine("onnx", checkpoint, "cpu").embed_texts(["a cat"]).isfinite().all()


def test_a_manifest_that_does_not_fit_leaves_the_earlier_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = to_onnx.finish

    def finish(*arguments: object) -> None:
        with full_disk(100):
            real(*arguments)

    monkeypatch.setattr(to_onnx, "finish", finish)
    before = read(checkpoint / "exports" / "onnx-fp32")
    with pytest.raises(WriteError, match=r"cannot write .*onnx-fp32: File too large"):
        export_onnx(checkpoint, data=PAIRS, progress=False, again=True)
    assert find(checkpoint, "onnx") == ([before], {})
    assert names(checkpoint / "exports") == ["onnx-fp32"]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "build", lambda *_, **__: pytest.fail("it worked for nothing"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(WriteError, match=f"cannot write {out}: Not a directory"):
        export_onnx(checkpoint, out=out, data=PAIRS, progress=False)
    assert main(["export", "onnx", str(checkpoint), "--out", str(out), "--quiet", "--data", PAIRS]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {out}: Not a directory")


def test_an_export_that_cannot_take_its_place_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "earlier").touch()
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(WriteError, match=r"cannot write .*out: No space left on device"), being_written(folder, False):
        pass
    assert names(tmp_path) == ["out"]
    assert names(folder) == ["earlier"]


def test_errors_of_the_work_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="refused"), being_written(tmp_path / "out", True):
        raise EngineError("refused")
    assert names(tmp_path) == ["failed-out"]
    with pytest.raises(ZeroDivisionError), being_written(tmp_path / "out", True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["failed-out"]


def test_plans_are_there_still_when_their_proof_does_not_fit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans used to be moved away first, and deleted together with the files that could not be written."""
    plans = tmp_path / "plans"
    plans.mkdir()
    (plans / "image.plan").write_bytes(b"x" * 5000)
    onnx_manifest = read(checkpoint / "exports" / "onnx-fp32").manifest
    files = hashes(plans)

    class Found:
        manifest = type(onnx_manifest)(
            "trt", "fp16", onnx_manifest.checkpoint, onnx_manifest.config, files, {}, {"module": "tensorrt"}
        )

    monkeypatch.setattr(to_trt, "read", lambda folder: Found)
    monkeypatch.setattr(to_trt.runtime, "machine", lambda **_: None)
    monkeypatch.setattr(to_trt.runtime, "expected_options", lambda *_: {})
    monkeypatch.setattr(to_trt, "_check_but_proof", lambda *_, **__: None)
    monkeypatch.setattr(to_trt, "_compare", lambda *_: to_onnx.parity.Report("fp16"))
    with full_disk(1000), pytest.raises(WriteError, match=r"cannot write .*plans: File too large"):
        to_trt.prove_trt(checkpoint, plans, progress=False)
    assert names(tmp_path) == ["checkpoint", "plans"]
    assert names(plans) == ["image.plan"]
    with pytest.raises(EngineError, match="the fp16 export is refused"):
        to_trt.prove_trt(checkpoint, plans, progress=False)
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("export", [export_onnx, export_trt])
def test_a_folder_with_other_contents_is_refused_before_the_work(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[..., Path]
) -> None:
    """An export replaces a whole folder, so its name must not be mistaken for that of the folder to put it in."""
    monkeypatch.setattr(to_onnx.checkpoints, "load", lambda *_: pytest.fail("it worked for nothing"))
    monkeypatch.setattr(to_trt, "find_target", lambda *_: None)
    before = names(checkpoint)
    with pytest.raises(
        InputError, match=r"got '.*checkpoint', which has other contents \(config\.json, exports, model"
    ):
        export(checkpoint, out=checkpoint, data=PAIRS, progress=False)
    assert names(checkpoint) == before


def test_new_empty_and_earlier_folders_may_be_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty", checkpoint / "exports" / "onnx-fp32"):
        assert export_path(folder, keep_failed=True) == folder
    monkeypatch.chdir(tmp_path / "empty")
    assert export_path(".", keep_failed=True) == tmp_path / "empty"


def test_a_users_graphs_and_files_are_not_taken_for_an_export(tmp_path: Path) -> None:
    for name in ("yolo.onnx", "survey.data"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(InputError, match=f"other contents .{name}"):
            export_path(folder, keep_failed=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"got the file '.*notes\.txt'"):
        export_path(tmp_path / "notes.txt", keep_failed=False)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", r"expected out to be a path, got ''"),
        ("a\0b", "without NUL characters"),
        ("x" * 300, r"expected a folder for the export, got 'xxx.*too long; give another --out \(out=\)"),
    ],
)
def test_what_names_no_folder_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        export_onnx(checkpoint, out=out, data=PAIRS, progress=False)


def test_a_name_of_the_maximum_length_is_written_to(tmp_path: Path) -> None:
    folder = export_path(tmp_path / ("x" * 255), keep_failed=False)
    with being_written(folder, keep_failed=False) as partial:
        (partial / "image.onnx").touch()
    assert names(folder) == ["image.onnx"]


def test_a_link_to_a_folder_means_that_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert export_path(tmp_path / "link", keep_failed=False) == tmp_path / "disk"


def test_what_is_kept_of_a_failure_replaces_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "failed-out").mkdir()
    (tmp_path / "failed-out" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"got '.*failed-out', which has other contents \(notes\.txt\)"):
        export_path(tmp_path / "out", keep_failed=True)
    assert export_path(tmp_path / "out", keep_failed=False) == tmp_path / "out"
