"""The demo: the bundled model finds scenes that it was not trained on, and the page shows them."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finelip_fast import Retriever
from finelip_fast.demo import DemoReport, _characters_within, run_demo
from finelip_fast.errors import InputError, WriteError
from finelip_fast.index import stored_index
from finelip_fast.tokenizer import encode_batch

SCENES = 40
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collect the image sources; fail if tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        values = dict(attributes)
        assert len(values) == len(attributes)
        if tag == "img":
            assert values["alt"]
            self.sources.append(values["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        # In HTML, the next cell or row implicitly closes the previous one.
        while self.open and self.open[-1] != tag and self.open[-1] in ("td", "th", "tr", "p"):
            self.open.pop()
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> DemoReport:
    return run_demo(tmp_path_factory.mktemp("demo"), scenes=SCENES, progress=False)


def test_long_descriptions_find_their_pictures(report: DemoReport) -> None:
    assert report.scenes == SCENES
    names = list(report.rows)
    assert names[1:] == [
        names[0].replace("combined", "global only"),
        "77 tokens, combined",
        "77 tokens, global only",
    ]
    recalls = [metrics["t2i_recall@1"] for metrics in report.rows.values()]
    assert recalls[0] > 0.85
    assert recalls[0] > recalls[2]
    assert recalls[0] > recalls[3]
    for metrics in report.rows.values():
        for way in ("i2t", "t2i"):
            assert 0 <= metrics[f"{way}_recall@1"] <= metrics[f"{way}_recall@5"] <= metrics[f"{way}_recall@10"] <= 1


def test_the_report_prints_its_numbers(report: DemoReport) -> None:
    text = str(report)
    assert f"{report.rows[next(iter(report.rows))]['t2i_recall@1']:.3f}" in text
    assert f"{SCENES} pictures indexed in" in text
    assert report.page in text


def test_the_page_is_whole(report: DemoReport) -> None:
    path = Path(report.page)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.count["section"] == 16
    assert len(page.sources) == 16 * 2 * 5
    assert all((path.parent / source).is_file() for source in page.sources)
    assert 'class="right"' in text
    assert 'class="cut"' in text
    assert "http" not in text  # works offline


def test_a_second_run_uses_what_is_there(report: DemoReport) -> None:
    again = run_demo(Path(report.page).parent, scenes=SCENES, queries=2, progress=False)
    assert again.rows == report.rows
    assert Page(Path(again.page).read_text(encoding="utf-8")).count["section"] == 2


@pytest.mark.parametrize("options", [{"scenes": 0}, {"scenes": -1}, {"queries": 0}], ids=str)
def test_nothing_to_show_is_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected (scenes|queries) of at least 1, got"):
        run_demo(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("context_length", [3, 4, 5, 9, 100])
def test_what_fits_a_context_ends_with_a_word(context_length: int) -> None:
    caption = "A red house, with two floors & a <flat> roof."
    prefix = caption[: _characters_within(caption, context_length)]
    assert caption.startswith(prefix)
    assert prefix == caption or caption[len(prefix)] == " " or prefix == ""
    assert encode_batch([prefix], 1000).lengths <= context_length
    longer = " ".join(caption.split(" ")[: len(prefix.split()) + 1])
    assert prefix == caption or encode_batch([longer], 1000).lengths > context_length


def test_a_folder_that_is_no_index_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "notes.txt").write_text("mine")
    run_demo(tmp_path, scenes=1, queries=1, progress=False)
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"


def test_pictures_and_pages_of_others_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    Image.new("RGB", (8, 8)).save(path)
    with Retriever(index=tmp_path / "index") as retriever:
        retriever.add_files([path], progress=False)
    with pytest.raises(InputError, match=r"but .*index holds 'mine\.png'; give another one \(--out\)"):
        run_demo(tmp_path, scenes=1, progress=False)
    assert stored_index(tmp_path / "index").ids == ["mine.png"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(InputError, match=r"but it holds .*index\.html; give another one"):
        run_demo(tmp_path / "site", scenes=1, progress=False)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file/scenes: Not a directory"):
        run_demo(tmp_path / "file", scenes=1)


def test_its_index_shows_pictures_and_has_what_to_filter_by(report: DemoReport) -> None:
    """A server's page needs both."""
    folder = Path(report.page).parent
    with Retriever(index=folder / "index") as retriever:
        hits = retriever.search("snow at night", where="weather = 'snow' or time = 'night'", k=3)
        assert len(hits) == 3
        for hit in hits:
            assert hit.path is not None
            assert Path(hit.path).is_file()


@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_can_be_read_by_all_and_on_a_phone(
    report: DemoReport, browser: Any, check_access: Callable[[Any, str], None], width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, reduced_motion="reduce")
    try:
        page.goto(Path(report.page).as_uri())
        check_access(page, "the demo")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.locator(".row img").evaluate_all("images => images.map((image) => image.clientWidth)")
        assert min(sizes) >= 100
    finally:
        page.close()
