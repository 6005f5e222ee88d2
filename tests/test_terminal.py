"""Untrusted text is shown on a terminal, but not interpreted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast._terminal import paragraph, printable, printable_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo, größer 写真 😀.png", "a photo, größer 写真 😀.png"),
        ("a\nb\r", "a\\nb\\r"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("a\udcff", "a\\udcff"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text(st.characters()))
def test_any_text_is_one_line_that_can_be_printed(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    line.encode()


def test_lines_of_a_message_cannot_be_taken_for_messages() -> None:
    assert paragraph("a\n  b\n\nerror: c\r\x1b[A") == "a\n  b\n  error: c\\r\\x1b[A"
    assert printable_lines("a\tb\n c\x1b") == "a\\tb\n c\\x1b"
