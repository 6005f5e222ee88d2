"""Pages generated when the site is built: the front page, the command line, and recorded results.

This is an MkDocs hook (``mkdocs.yml``). Nothing is stored twice: the front page is the README, records are the files in
``bench/results``, and links between pages are written for the repository, so they work there too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from house import MAPPED, REPOSITORY
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from finelip_fast.cli import finelip

RESULTS = REPOSITORY / "bench" / "results"

# Repository files, by the pages that they become.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
COPIED = {"results": RESULTS, "examples": REPOSITORY / "examples"}
# Single files that pages link to, which lie at the site's root.
FILES = ("Dockerfile", "compose.yaml", "bench/counted.py")

_INSTALLED = tempfile.TemporaryDirectory(prefix="finelip-docs-")

COMMAND_LINE = "reference/command-line.md"
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?(.*?)</code>")


def command_line() -> str:
    """Write the page of all commands in Markdown: the output of each ``--help``."""
    return "# The command line\n\n" + "\n".join(
        f"## finelip {name}\n\n```text\n{command.get_help(context)}\n```\n" for name, command, context in commands()
    )


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """Yield each visible command, with its words after ``finelip``."""

    def walk(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
        if not isinstance(command, click.Group):
            yield context.command_path.partition(" ")[2], command, context
            return
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                settings = {**child.context_settings, "terminal_width": 100}
                yield from walk(child, click.Context(child, context, name, **settings))

    yield from walk(finelip, click.Context(finelip, info_name="finelip"))


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> None:
    """Show mkdocstrings the package as installed, with the folders that are mapped into it."""
    installed = Path(_INSTALLED.name) / "finelip_fast"
    if not installed.exists():  # it exists when a server rebuilds the site
        installed.mkdir()
        for path in [*(REPOSITORY / "finelip_fast").iterdir(), *(REPOSITORY / name for name in MAPPED)]:
            (installed / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_INSTALLED.name]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for file in _generated_files(config):
        files.append(file)
    return files


def _generated_files(config: Any) -> Iterator[File]:
    yield File.generated(config, COMMAND_LINE, content=command_line())
    for page, source in PAGES.items():
        yield File.generated(config, page, content=_from_root((REPOSITORY / source).read_text(encoding="utf-8")))
    for name in FILES:
        yield File.generated(config, Path(name).name, abs_src_path=str(REPOSITORY / name))
    for name, folder in COPIED.items():
        for path in sorted(folder.rglob("*.*")):
            if path.suffix != ".pyc":
                uri = f"{name}/{path.relative_to(folder).as_posix()}"
                yield File.generated(config, uri, abs_src_path=str(path))


def _from_root(text: str) -> str:
    """Rewrite the links of a page from the repository's root so that they work on the site."""
    text = re.sub(r"\]\((?=bench/results/|examples/|CHANGELOG|CONTRIBUTING)", "](../", text)
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Redirect links that leave ``docs/`` to pages of the site."""
    up = r"\]\(((?:\.\./)*)\.\./"
    markdown = re.sub(up + "bench/results/", r"](\1results/", markdown)
    markdown = re.sub(up + "examples/", r"](\1examples/", markdown)
    markdown = re.sub(up + "README.md", r"](\1index.md", markdown)
    markdown = re.sub(up + "(Dockerfile|compose.yaml)", r"](\1\2", markdown)
    return re.sub(up + "(CHANGELOG|CONTRIBUTING).md", lambda link: f"]({link[1]}{link[2].lower()}.md", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show cross references in docstrings, which are written for Sphinx, as plain names."""
    return _ROLE.sub(r"<code>\1</code>", html)
