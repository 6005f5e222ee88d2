"""Text from captions and names stays text: every character is visible, and Markdown does not interpret it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast._markup import in_markdown, visible

TEXTS = st.text() | st.text("</script>\"'&|`[]()\\\n\r\t \ud800\udfff\u202e\x00\x1bab", max_size=80)


@pytest.mark.parametrize("text", ["Ein Haus, größer als «zwei»", "שלום", "👩‍👩‍👧 with a red coat\nand a hat", "हिन्दी"])
def test_languages_are_left_alone(text: str) -> None:
    assert visible(text) == text


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\u202eb\ud800\x1b") == r"a\u202eb\ud800\x1b"


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
