"""Any command line either works or ends with an explained error."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finelip_fast
from finelip_fast import cli


def command(name: str) -> click.Command:
    """Return the command with a name of one or two words."""
    first, _, second = name.partition(" ")
    known = cli.finelip.commands
    return known[name] if name in known else known[first].commands[second]


# With the arguments they need; without commands that take long or need a GPU or other machines.
COMMANDS = {
    "search": ["a house", "--index", "index"],
    "serve": ["--index", "index"],
    "add": ["photos", "--index", "index"],
    "list": ["--index", "index"],
    "remove": ["photos/b.png", "--index", "index"],
    "index check": ["--index", "index"],
    "index maintain": ["--index", "index"],
    "index move-root": ["photos", "--index", "index"],
    "index repair": ["--index", "index"],
    "index field": ["camera", "--index", "index"],
    "index snapshot": ["copy", "--index", "index"],
    "index tune": ["--index", "index", "--queries", "queries.jsonl"],
    "index plan": ["--items", "10", "--checkpoint", "checkpoint"],
    "eval": ["scenes:test:2", "--checkpoint", "checkpoint"],
    "eval compare": ["result.json", "result.json"],
    "explain": ["photos/a.png", "a red house", "--checkpoint", "checkpoint"],
    "convert": ["checkpoint", "converted"],
    "info": [],
    "completion": ["bash"],
    "study": [],
}
OPTIONS = {
    name: sorted(flag for param in command(name).params for flag in param.opts if flag[0] == "-") for name in COMMANDS
}
NUMBERS = [
    "-1",
    "0",
    "1",
    "3",
    "9" * 30,
    "-" + "9" * 20,
    "1e400",
    "nan",
    "-inf",
    "2.5",
    "True",
    "1k",
    "-1/2",
    "4/4",
    "1/0",
]
NAMES = [
    *(
        "",
        ".",
        "nowhere",
        "file/x",
        "index",
        "photos",
        "photos/a.png",
        "checkpoint",
        "checkpoint/config.json",
        "~nobody-here/x",
    ),
    *("x" * 5000, "a\0b", "\udcff", "\ud800", "\x1b[2J", "\n", "--", "-", "@file", "pipe", "lost.jsonl"),
    *(
        "scenes:test:2",
        "scenes:test:-1",
        "scenes:test:" + "9" * 20,
        "jsonl:photos/a.png",
        "jsonl:pipe",
        "open_clip:",
        "hf-hub:",
    ),
    *("auto", "torch", "onnx", "trt", "cpu", "cuda:99", "meta", "fp32", "int8", "exact", "two-stage", "sketch"),
    *("id = 'a'", 'id = "a', "n >= 1e999", "(" * 500, "a=b", "="),
]
# Without the path separator, so that nothing outside the test's folder is named.
TEXTS = st.text(st.characters(blacklist_characters="/"), max_size=40)
ARGUMENTS = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NAMES), TEXTS)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words = list(COMMANDS[name])
    if words and draw(st.booleans()):
        words[draw(st.integers(0, len(words) - 1))] = draw(ARGUMENTS)
    for option in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=3)):
        words += [option] if draw(st.integers(0, 9)) == 0 else [option, draw(ARGUMENTS)]
    return [*name.split(), *words]


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Iterator[Path]:
    """The working folder, with an index; names cannot reach a hub."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def offline(*_: object, **__: object) -> None:
            raise OSError("offline")

        patch.setattr("huggingface_hub.snapshot_download", offline)
        patch.setattr("open_clip.download_pretrained", offline)
        patch.setattr("webbrowser.open", lambda _: True)
        patch.setattr("watchfiles.watch", lambda *_, **__: iter(()))  # normally endless
        server = ModuleType("finelip_fast.serve.run")
        server.serve = lambda *_, ready: None  # type: ignore[attr-defined]  # nothing listens
        patch.setitem(sys.modules, server.__name__, server)
        patch.setattr("finelip_fast.serve.run", server, raising=False)
        patch.setattr("tempfile.tempdir", str(folder))
        finelip_fast.save(make_model(context_length=40, vision_layers=1, text_layers=1), "checkpoint")
        Path("photos").mkdir()
        for n, name in enumerate("abc"):
            pixels = np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"photos/{name}.png")
        Path("file").touch()
        Path("queries.jsonl").write_text('{"text": "a house"}\n')
        assert cli.main(["add", "photos", "--checkpoint", "checkpoint", "--index", "index", "--quiet"]) == 0
        yield folder


@pytest.mark.filterwarnings("ignore:the bundled model knows drawn street scenes only")
@settings(settings.get_profile("fuzz"))
@given(arguments=command_lines())
def test_a_command_line_is_done_or_explained(folder: Path, arguments: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert code in (0, 2)
    if code == 2:
        assert "error: " in err.getvalue()
