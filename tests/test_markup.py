"""Whatever a caption or a name holds, a page shows it and does not obey it."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast._markup import in_html, in_markdown

HOSTILE = (
    "</p></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`|[a](javascript:b)\ud800\x00\u202e\x1b[2J"
)
TEXTS = st.text() | st.text("</script>\"'&|`[]()\\\n\r\t \ud800\udfff\u202e\x00\x1bab", max_size=80)


class Reader(HTMLParser):
    """The text and the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", [("none", [("none", None)])]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))


@settings(settings.get_profile("fuzz"))
@given(TEXTS)
def test_a_text_is_one_text_of_a_page(text: str) -> None:
    page = f'<p title="{in_html(text)}">{in_html(text)}</p>'
    page.encode()
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert [tag for tag, _ in reader.tags] == ["none", "p"]
    assert reader.tags[1][1][0][0] == "title"
    if text.isprintable():
        assert reader.text == reader.tags[1][1][0][1] == text


@pytest.mark.parametrize("text", ["Ein Haus, größer als «zwei»", "שלום", "👩‍👩‍👧 with a red coat\nand a hat", "हिन्दी"])
def test_languages_are_left_alone(text: str) -> None:
    assert in_html(text) == text


def test_what_cannot_be_seen_is_shown() -> None:
    assert in_html("a\u202eb\ud800\x1b") == r"a\u202eb\ud800\x1b"


@settings(settings.get_profile("fuzz"))
@given(TEXTS)
def test_a_text_is_one_cell_of_a_table(text: str) -> None:
    cell = in_markdown(text)
    cell.encode()
    assert len(cell.splitlines()) <= 1
    bare = cell.replace("\\\\", "")
    for mark in ("|", "`", "<", "*"):
        assert bare.count(mark) == bare.count(f"\\{mark}")
    assert "](" not in bare


def test_the_usual_cells_stay_as_they_are() -> None:
    for text in ("i2t R@1 [95 %]", "+1.0 [-0.5, +2.0]", "models/ours", "scenes:test", "0.812 ± 0.003", "image>text"):
        assert in_markdown(text) == text
