"""Every code block in the documentation works: each is run as printed, in page order.

A block that cannot run here gives the reason in a comment before it: ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import finelip_fast
from finelip_fast import cli
from finelip_fast.datasets import Scenes

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block that begins after ``line`` lines; ``reason`` explains why it is not run, or is None."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        reason, language, code = match.groups()
        yield Block(text.count("\n", 0, match.start(3)), language, code, reason)


def page_parameter(path: Path) -> Any:
    """Return a page as a test parameter; exporting and training are marked as slow."""
    marks = [pytest.mark.slow] if path.name in ("adapt.md", "export.md", "train.md") else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's files: a checkpoint, some photos, and the scenes of the demo."""
    folder = tmp_path_factory.mktemp("documentation")
    finelip_fast.save(finelip_fast.load(), folder / "my-model")
    scenes = Scenes("test", 400, image_size=256)
    for name, number in {
        "photos/a.png": 0,
        "photos/b.png": 1,
        "photo.jpg": 2,
        "demo/scenes/test-000264.png": 264,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scenes[number].draw().save(folder / name)
    return folder


@pytest.mark.filterwarnings("ignore:the bundled model knows drawn street scenes only")  # some pages search these
@pytest.mark.parametrize("page", [page_parameter(path) for path in PAGES])
def test_a_page_does_what_it_says(
    page: Path,
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(material, folder)
    if page.name == "generate.md":  # needs a pipeline as wide as the checkpoint
        pipelines = request.getfixturevalue("tiny_pipelines")
        pipelines.xl(width=finelip_fast.load().config.text_width).save_pretrained(folder / "my-pipeline")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        if block.reason is None and block.language == "python":
            run_python(block, page, names)
        elif block.reason is None and block.language == "sh":
            for line in block.code.splitlines():
                run_line(line, f"{page.name}, line {block.line}: {line}", capsys, monkeypatch)


def run_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    tree = ast.parse(block.code, str(page))
    ast.increment_lineno(tree, block.line)
    exec(compile(tree, str(page), "exec"), names)


def run_line(line: str, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line, comments=True) or [""]
    if program == "make":  # run by continuous integration; takes longer than a test
        assert f"make {arguments[0]}" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8"), where
    elif program == "export":
        monkeypatch.setenv(*arguments[0].split("=", 1))
    elif program:
        assert program == "finelip", f"{where}: say why it cannot be run, <!-- not run: REASON -->"
        capsys.readouterr()
        code = cli.main(arguments)
        assert code == 0, f"{where}\n{capsys.readouterr().err}"


def test_blocks_are_read_with_their_reasons(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\n```\n\n<!-- not run: why -->\n```sh\nfinelip tune\n```\n")
    assert list(blocks(page)) == [Block(3, "python", "x = 1\n", None), Block(8, "sh", "finelip tune\n", "why")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_block_has_a_language_that_is_checked(page: Path) -> None:
    """A block without a language would silently not be run."""
    for block in blocks(page):
        assert block.language in ("python", "sh", "json", "text"), f"{page.name}, line {block.line}: name its language"
