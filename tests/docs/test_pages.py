"""Pages generated when the site is built, and links that work in both the repository and the site."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../../bench/results/studies/length.md)", "[a](../results/studies/length.md)"),
        ("[a](../bench/results/epyc-2-core/README.md)", "[a](results/epyc-2-core/README.md)"),
        ("[a](../../examples/search_folder.py)", "[a](../examples/search_folder.py)"),
        ("[a](../../README.md#quality)", "[a](../index.md#quality)"),
        ("[a](../CONTRIBUTING.md)", "[a](contributing.md)"),
        ("[a](../../Dockerfile)", "[a](../Dockerfile)"),
        ("[a](method.md), [b](https://a.b/../README.md)", "[a](method.md), [b](https://a.b/../README.md)"),
    ],
)
def test_links_out_of_the_documentation_lead_into_the_site(link: str, expected: str) -> None:
    assert pages.on_page_markdown(link, page=None) == expected


def test_links_of_the_front_page_are_those_of_the_site() -> None:
    text = "![a](docs/search.png) [b](docs/how-to/photos.md) [c](bench/results/x.json) [d](CHANGELOG.md)"
    assert pages.on_page_markdown(pages._from_root(text), page=None) == (
        "![a](search.png) [b](how-to/photos.md) [c](results/x.json) [d](changelog.md)"
    )


def test_the_command_line_has_a_section_for_each_command() -> None:
    page = pages.command_line()
    names = re.findall(r"^## finelip (.+)$", page, re.MULTILINE)
    assert {"demo", "search", "eval compare", "index check"} <= set(names)
    assert len(names) == len(set(names)) == page.count("```text")


def test_links_in_the_repository_lead_somewhere() -> None:
    """Links in the site are checked when it is built; this test is for readers of the files."""
    for path in [pages.REPOSITORY / "README.md", *(pages.REPOSITORY / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / Path(target)).exists(), f"{path}: {target}"
