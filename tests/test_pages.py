"""A page shows the text of captions and names, and does not interpret it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

import finelip_fast
from finelip_fast._pages import environment

FOLDER = Path(finelip_fast.__file__).parent / "data" / "pages"
TEXTS = st.text() | st.text("</script>\"'&{{%}}\n\r\t \ud800\udfff\u202e\x00\x1bab", max_size=80)
CELL = environment().from_string(
    '<p title="{{ text }}">{{ text }}</p><script type="application/json">{{ [text]|tojson }}</script>'
)


class Reader(HTMLParser):
    """Collect the text and the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@settings(settings.get_profile("fuzz"))
@given(TEXTS)
def test_a_text_is_one_text_of_a_page(text: str) -> None:
    page = CELL.render(text=text)
    page.encode()
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert [tag for tag, _ in reader.tags] == ["p", "script"]
    assert list(reader.tags[0][1]) == ["title"]
    if text and text.isprintable():
        assert "".join(reader.text[:-1]) == reader.tags[0][1]["title"] == text


def test_a_value_that_is_missing_is_no_empty_text() -> None:
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        CELL.render()


def test_pages_need_nothing_from_elsewhere_and_have_no_script_or_style_of_their_own() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|@import|url\(|//cdn", text), path.name
        if path.suffix == ".html":
            assert not re.search(r"\bstyle=|\bon[a-z]+=|\|\s*safe\b|autoescape", text), path.name
    assert sorted(path.name for path in FOLDER.glob("*.css")) == [
        "colours.css",
        "explanation.css",
        "serve.css",
        "style.css",
    ]
