"""An index cannot load a checkpoint that this user has not opened."""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import closing
from pathlib import Path

import pytest

import finelip_fast
from finelip_fast import Retriever
from finelip_fast.checkpoint import fingerprint
from finelip_fast.cli import main
from finelip_fast.errors import StoreError
from finelip_fast.index import Index, IndexSpec
from finelip_fast.known_checkpoints import checkpoint_of, note


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("known") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_layers=1), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of a user who has opened nothing yet."""
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "known_checkpoints"


MARK = "0" * 64


def test_an_index_is_opened_by_its_own_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Retriever(checkpoint, index="index", device="cpu", engine="torch") as retriever:
        retriever.add_texts(["a house"], progress=False)
    with Retriever.open("index", device="cpu", alpha=0.5) as retriever:
        assert retriever.engine.source == str(checkpoint)
        assert (len(retriever), retriever.alpha) == (1, 0.5)
    with pytest.raises(StoreError, match="there is no index at nothing: make one with Retriever"):
        Retriever.open("nothing")
    assert not Path("nothing").exists()
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "of someone else"))
    with monkeypatch.context() as patch:
        patch.setattr("finelip_fast.embedder.open_engine", lambda *_, **__: pytest.fail("a checkpoint was opened"))
        with pytest.raises(
            StoreError, match=r"has not opened on this machine.*in Python: Retriever\(checkpoint, index="
        ):
            Retriever.open("index")
    with Retriever(checkpoint, index="index", device="cpu"):
        pass
    with Retriever.open("index", device="cpu") as retriever:
        assert len(retriever) == 1


def test_an_index_of_the_bundled_checkpoint_is_opened_by_it() -> None:
    with Retriever(index="index", device="cpu"):
        pass
    with Retriever.open("index", device="cpu") as retriever:
        assert retriever.engine.source == ""


def received(source: str | Path, mark: str = MARK, folder: str = "index") -> Path:
    """Create an index folder as if received from someone else."""
    with closing(Index(IndexSpec(mark, 4, 8), folder, source=str(source))):
        return Path(folder)


def test_what_was_never_opened_is_refused_and_its_remedy_works(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Retriever(checkpoint, index="index", device="cpu").index) as index:
        spec = index.spec
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "of someone else"))  # the folder was passed on to someone else

    def must_not_load(*_: object, **__: object) -> None:
        pytest.fail("a checkpoint was opened that only the index names")

    with monkeypatch.context() as patch:
        patch.setattr("finelip_fast.embedder.open_engine", must_not_load)
        patch.setattr("finelip_fast.distributed.bulk.Retriever", must_not_load)
        Path("queries.jsonl").write_text('{"text": "a"}')
        for command in (
            ["search", "a house"],
            ["add", str(tmp_path)],
            ["index", "bulk", str(tmp_path)],
            ["index", "tune", "--queries", "queries.jsonl"],
        ):
            assert main([*command, "--index", "index", "--quiet"]) == 2
            message = capsys.readouterr().err
            assert f"names the checkpoint '{checkpoint}', which this user has not opened on this machine" in message
    options = shlex.split(message[message.index("--checkpoint") : message.index(", or its current location")])
    search = ["search", "a house", "--index", "index", "--device", "cpu"]
    assert main([*search, *options]) == 0
    assert main(search) == 0  # the checkpoint is remembered
    capsys.readouterr()
    moved = shutil.copytree(checkpoint, "elsewhere")
    assert main([*search, "--checkpoint", str(moved)]) == 0
    assert checkpoint_of("index") == str(tmp_path / "elsewhere")  # the place opened last
    received(checkpoint, spec.checkpoint, "other")
    assert checkpoint_of("other") == str(tmp_path / "elsewhere")


def test_the_bundled_checkpoint_needs_no_consent() -> None:
    assert checkpoint_of("nowhere") is None
    assert checkpoint_of(received("")) is None


def test_a_known_name_with_another_fingerprint_is_refused(checkpoint: Path) -> None:
    note(str(checkpoint), fingerprint(checkpoint))
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(received(checkpoint))


def test_a_checkpoint_that_changed_since_is_refused_by_the_index(
    make_model, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, "mine")
    Retriever("mine", index="index", device="cpu").index.close()
    finelip_fast.save(make_model(seed=1, context_length=40, vision_layers=1, text_layers=1), "mine")
    assert main(["search", "a house", "--index", "index", "--device", "cpu"]) == 2
    assert "is opened by" in capsys.readouterr().err


@pytest.mark.parametrize("link", [False, True], ids=["inside", "by a link"])
def test_a_checkpoint_that_came_with_the_index_is_always_asked_for(tmp_path: Path, link: bool) -> None:
    folder = received("org/name")
    (folder / "checkpoint").mkdir()
    source = tmp_path / "link" if link else folder.absolute() / "checkpoint"
    if link:
        source.symlink_to(folder.absolute() / "checkpoint")
    note(str(source), MARK)
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(folder)


@pytest.mark.parametrize("mark", ["", "../../x", "A" * 64, "0" * 63, "0" * 64 + "\n", "é" * 64])
def test_a_fingerprint_is_no_path(mark: str, cache: Path, tmp_path: Path) -> None:
    note("mine", MARK)
    for file in (cache / ".txt", cache / f"{'A' * 64}.txt", tmp_path / "x.txt"):
        file.write_text("mine")
        file.chmod(0o600)
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(received("mine", mark))


def test_what_another_may_have_written_is_not_believed(cache: Path, tmp_path: Path) -> None:
    folder = received("mine")
    note("mine", MARK)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert checkpoint_of(folder) == "mine"
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(StoreError, match="which this user has not opened"):
            checkpoint_of(folder)
    file.rename(tmp_path / "a downloaded file")
    (tmp_path / "a downloaded file").chmod(0o600)
    file.symlink_to(tmp_path / "a downloaded file")
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(folder)
    note("mine", MARK)  # written again
    assert checkpoint_of(folder) == "mine"
    if os.geteuid() == 0:
        os.chown(file, 65534, -1)
        with pytest.raises(StoreError, match="which this user has not opened"):
            checkpoint_of(folder)


@pytest.mark.parametrize("content", [b"", b"x" * (1 << 17)], ids=["empty", "too large"])
def test_a_damaged_note_is_none(cache: Path, content: bytes) -> None:
    note("mine", MARK)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(received("mine"))


def test_a_name_that_is_no_utf8_is_remembered(tmp_path: Path) -> None:
    name = os.fsdecode(b"/caf\xe9")
    note(name, MARK)
    assert checkpoint_of(received(name)) == name


def test_without_a_cache_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "file"))
    note("mine", MARK)
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of(received("mine"))

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FINELIP_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    note("mine", MARK)
    with pytest.raises(StoreError, match="which this user has not opened"):
        checkpoint_of("index")
