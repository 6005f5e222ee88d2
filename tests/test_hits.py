"""Hits: a list that prints and displays itself safely, whatever its items are named."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from finelip_fast import hits as module
from finelip_fast.hits import Hit, Hits


def hit(name: str, **metadata: object) -> Hit:
    return Hit(name, 0.51, 0.5, 0.55, metadata)


def thumbnails(html: str) -> list[Image.Image]:
    contents = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="">', html)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in contents]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (640, 320), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_hits_are_a_list() -> None:
    rows = [hit("a"), hit("b")]
    assert Hits(rows) == rows
    assert isinstance(Hits(rows), list)
    assert [item.id for item in Hits(rows)] == ["a", "b"]
    assert Hits() == []


def test_parts_of_hits_are_hits() -> None:
    hits = Hits([hit("a"), hit("b"), hit("c")])
    for part in (hits[1:], hits[::-1], hits + hits[:1], hits.copy()):
        assert isinstance(part, Hits)
    assert [item.id for item in hits[1:] + hits[:1]] == ["b", "c", "a"]
    assert hits[-1] == hit("c")


def test_hits_can_be_in_a_set() -> None:
    assert len({hit("a", year=2024), hit("a", year=2024), hit("b")}) == 2
    assert hit("a", year=2024) != hit("a", year=2025)


def test_hits_print_as_lines_that_a_terminal_shows() -> None:
    assert str(Hits([hit("a"), hit("b\x1b[2J\n")])).split("\n") == [
        "  1  0.5100  (global 0.5000, fine 0.5500)  a",
        r"  2  0.5100  (global 0.5000, fine 0.5500)  b\x1b[2J\n",
    ]
    assert str(Hits()) == "no hits"


def test_verdicts_are_told_in_words() -> None:
    hits = Hits([Hit("a", 0.5, 0.5, None, {}, stands_out=value) for value in (0.95, 0.5, 0.01)])
    assert [hit.verdict for hit in hits] == ["stands out", "perhaps", "does not stand out"]
    assert all(hit.verdict in line for hit, line in zip(hits, str(hits).splitlines(), strict=True))
    assert "nothing here matches" not in str(hits) + hits._repr_html_()
    assert str(Hits(hits[2:])).splitlines()[-1].startswith("nothing here matches: ")
    assert "nothing here matches" in Hits(hits[2:])._repr_html_()
    assert hit("a").verdict is None


def test_a_notebook_shows_thumbnails(picture: str) -> None:
    (thumbnail,) = thumbnails(Hits([hit(picture), hit("text-1", caption="a house")])._repr_html_())
    assert thumbnail.size == (160, 80)
    red, green, blue = thumbnail.convert("RGB").getpixel((80, 40))
    assert red > 200
    assert max(green, blue) < 60


def test_what_strangers_named_is_no_markup() -> None:
    html = Hits([hit("<script>alert(1)</script>\u202e", **{"<b>": "<img src=x onerror=alert(1)>\x00"})])._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html
    assert "\x00" not in html


@pytest.mark.parametrize(
    "name", ["", "missing.jpg", "\0", "x" * 5000, "//host/share/a.png", "\\\\host\\a.png", "\ud800.jpg"]
)
def test_a_hit_without_a_picture_is_shown_without(name: str) -> None:
    html = Hits([hit(name)])._repr_html_()
    assert html.count("<tr>") == 2
    assert thumbnails(html) == []
    html.encode()


def test_a_damaged_picture_is_shown_without(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    assert thumbnails(Hits([hit(str(tmp_path / "a.jpg")), hit(str(tmp_path))])._repr_html_()) == []


def test_what_a_notebook_keeps_is_bounded(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 5)
    monkeypatch.setattr(module, "_MOST_THUMBNAILS", 2)
    html = Hits([hit(picture, text="y" * 10_000)] * 8)._repr_html_()
    assert len(thumbnails(html)) == 2
    assert "and 3 more" in html
    assert html.count("y") < 5 * 320


def test_without_trained_aggregators_there_is_no_fine_score() -> None:
    hits = Hits([Hit("a", 0.5, 0.5, None, {})])
    assert str(hits) == "  1  0.5000  (global 0.5000)  a"
    assert "<td>0.5000</td><td>0.5000</td><td></td>" in hits._repr_html_()
