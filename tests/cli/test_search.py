"""The output of a search: a page with thumbnails, explanations, pictures in the terminal, scores in words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast.cli import main, preview

NAMES = ("a #1%20.png", "b<i>.png", "deep/c.png")
TEXT = "a red <house> & its door"


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of three pictures, embedded by a model with random weights."""
    folder = tmp_path_factory.mktemp("search")
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder / "checkpoint")
    for number, name in enumerate(NAMES):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).resize((60, 30)).save(folder / "photos" / name)
    words = ["add", folder / "photos", "--checkpoint", folder / "checkpoint", "--index", folder / "index", "--quiet"]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def search(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a search in an empty folder and returns its exit code and output."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["search", *words, "--index", str(folder / "index"), "--checkpoint", str(folder / "checkpoint")])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Addresses that have been opened in a browser."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not addresses.append(address))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return addresses


def addresses(page: str) -> list[str]:
    return [unescape(address) for address in re.findall(r'href="([^"]+)"', page)]


def test_a_page_shows_what_was_found(search, folder: Path) -> None:
    code, out, err = search(TEXT, "--html", "out.html")
    assert (code, err) == (0, "out.html\n")
    hits = json.loads(search(TEXT, "--json")[1])
    assert [line.split(")  ")[1] for line in out.splitlines()] == [hit["id"] for hit in hits]
    page = Path("out.html").read_text(encoding="utf-8")
    assert "a red &lt;house&gt; &amp; its door" in page
    assert "b&lt;i&gt;.png" in page
    assert "<i>" not in page
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    files = [url2pathname(urlsplit(address).path) for address in addresses(page)]
    assert files == [hit["path"] for hit in hits], "a thumbnail leads to its picture, whatever its name"
    for hit in hits:
        for name in ("score", "global_score", "fine_score"):
            assert f"{hit[name]:.4f}" in page
        assert hit["metadata"]["sha256"] in page
    assert "<dt>fine</dt>" in page


def test_a_page_shows_the_picture_that_was_searched_with(search, folder: Path) -> None:
    image = str(folder / "photos" / NAMES[1])
    assert search("--image", image, "--html", "out.html", "--json")[0] == 0
    page = Path("out.html").read_text(encoding="utf-8")
    assert 'alt="the picture that was searched with"' in page
    assert page.count('<img src="data:image/jpeg;base64,') == 4


def test_a_page_says_that_nothing_was_found(search) -> None:
    code, out, err = search(TEXT, "--html", "out.html", "--where", "width > 1000")
    assert (code, out, err) == (0, "", "the filter width > 1000 matches none of the 3 items\nout.html\n")
    assert "no hits" in Path("out.html").read_text(encoding="utf-8")


def test_the_result_is_printed_before_a_page_that_cannot_be_written(search) -> None:
    code, out, err = search(TEXT, "--html", "x" * 300, "--paths")
    assert (code, len(out.splitlines())) == (2, 3)
    assert err.startswith("error: cannot write xxx")


def test_a_page_that_has_no_place_is_refused_before_the_search(search) -> None:
    for name in ("nowhere/out.html", "", "."):
        code, out, err = search(TEXT, "--html", name)
        assert (code, out) == (2, "")
        assert err == f"error: expected --html as a file in an existing folder, got {name!r}\n"


def test_a_page_is_opened(search, opened: list[str], tmp_path: Path) -> None:
    assert search(TEXT, "--html", "out #1.html", "--open")[0] == 0
    assert opened == [(tmp_path / "out #1.html").as_uri()]
    assert not list((tmp_path / "temporary").iterdir())
    assert search(TEXT, "--open")[0] == 0
    page = Path(url2pathname(urlsplit(opened[1]).path))
    assert page.parent.parent == tmp_path / "temporary"
    assert TEXT in unescape(page.read_text(encoding="utf-8"))
    assert page.parent.stat().st_mode & 0o077 == 0, "nobody else reads what was searched for"


def test_without_a_browser_the_page_is_named(search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    with pytest.warns(UserWarning, match=r"no browser was found to open out\.html"):
        assert search(TEXT, "--html", "out.html", "--open")[0] == 0


def test_why_is_explained_beside_the_page(search) -> None:
    assert search(TEXT, "--html", "out: 100%.html", "--why", "2")[0] == 0
    links = addresses(Path("out: 100%.html").read_text(encoding="utf-8"))
    pages = [unquote(link) for link in links if not link.startswith("file:")]
    assert pages == ["out: 100%-why-1.html", "out: 100%-why-2.html"]
    assert not any(urlsplit(link).scheme for link in links if not link.startswith("file:"))
    for name in pages:
        assert "Why this picture" in Path(name).read_text(encoding="utf-8")
    assert sorted(path.name for path in Path().glob("*.html")) == sorted([*pages, "out: 100%.html"])


def test_what_cannot_be_explained_is_shown_without(search, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*_: object) -> None:
        raise finelip_fast.errors.InputError("no model in PyTorch")

    monkeypatch.setattr(finelip_fast.Retriever, "explain", explain)
    with pytest.warns(UserWarning, match="hit 1 is not explained: no model in PyTorch"):
        assert search(TEXT, "--html", "out.html", "--why", "1")[0] == 0
    assert "why-1" not in Path("out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([TEXT, "--why", "1"], "expected --why with --html FILE or --open, got --why 1 alone"),
        (["--image", "a.png", "--html", "x.html", "--why", "1"], "expected --why with a description, got --image"),
        ([TEXT, "--preview", "--json"], "expected --preview alone, got --json with it"),
        ([TEXT, "--preview", "--paths"], "expected --preview alone, got --paths with it"),
        ([TEXT, "--preview"], "expected --preview in a terminal, got a file or a pipe; --html FILE"),
    ],
)
def test_options_that_do_not_go_together_are_refused(search, words: list[str], message: str) -> None:
    code, out, err = search(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_package_is_named(search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_in_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    assert "pip install 'finelip-fast[preview]'" in search(TEXT, "--preview")[2]


def in_terminal(folder: Path, *words: str) -> str:
    """Return the output of a search in a terminal of 80 columns without support for pictures."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 800, 480))
    command = [sys.executable, "-P", "-m", "finelip_fast.cli", "search", TEXT, *words]
    options = ["--index", str(folder / "index"), "--checkpoint", str(folder / "checkpoint"), "--device", "cpu"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    printed = b""
    with subprocess.Popen(
        [*command, *options], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(terminal)
        try:
            while content := os.read(controller, 1 << 16):
                printed += content
        except OSError:  # Linux's signal that the other end is closed
            pass
        assert process.stderr is not None
        message = process.stderr.read()
    os.close(controller)
    assert process.returncode == 0, message
    return printed.decode()


def test_a_terminal_is_told_what_scores_mean(search, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(search(TEXT)[1].splitlines()) == 3, "a file gets hits alone"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = search(TEXT, "--alpha", "0.3")[1].splitlines()
    assert lines[3] == ""
    assert [line.split()[0] for line in lines[4:]] == ["score", "global", "fine"]
    assert "0.3 times global plus 0.7 times fine" in lines[4]
    assert len(search(TEXT, "--quiet")[1].splitlines()) == 3
    assert len(search(TEXT, "--paths")[1].splitlines()) == 3
    assert len(json.loads(search(TEXT, "--json")[1])) == 3


def test_a_terminal_shows_thumbnails(folder: Path) -> None:
    pytest.importorskip("textual_image")
    hits = in_terminal(folder, "--preview", "--quiet").replace("\r", "").split("\n")
    blocks = [line.count("▀") for line in hits]
    # Cells are 10 by 20 pixels, so 8 rows need 16 columns times the aspect ratio of the picture.
    assert blocks == [*[32] * 8, 0, *[32] * 8, 0, *[32] * 8, 0, 0]
    assert [line.split()[0] for line, count in zip(hits, blocks, strict=True) if line and not count] == ["1", "2", "3"]
