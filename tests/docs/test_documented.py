"""The documentation covers every public name, command and option."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pages
import pytest

import finelip_fast
from finelip_fast import kernels

DOCS = Path(__file__).parents[2] / "docs"
PROSE = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def reference_page(page: str) -> str:
    """Return the text of a page of the reference."""
    return (DOCS / "reference" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", finelip_fast.__all__)
def test_a_public_name_stands_in_the_reference(name: str) -> None:
    entries = re.findall(r"^::: finelip_fast\.([\w.]+)$", reference_page("python.md"), re.MULTILINE)
    value = getattr(finelip_fast, name)
    module = f"{getattr(value, '__module__', '')}.".removeprefix("finelip_fast.")
    assert any(entry in (name, f"{module}{name}", module.rstrip(".")) for entry in entries), (
        f"add ::: finelip_fast.{name}"
    )
    assert value.__doc__


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_kernel_stands_in_the_reference(name: str) -> None:
    (members,) = re.findall(r"members: \[(.*)\]", reference_page("kernels.md"))
    assert name in members.split(", ")
    assert getattr(kernels, name).__doc__


def test_every_environment_variable_stands_in_the_reference() -> None:
    sources = [
        path
        for folder in ("finelip_fast", "kernels", "training", "export")
        for path in sorted((DOCS.parent / folder).rglob("*.py"))
    ]
    known = {name for path in sources for name in re.findall(r'"(FINELIP_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    assert len(known) >= 5
    assert known <= set(re.findall(r"^\| `(\w+)` \|", reference_page("environment.md"), re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "command", "context"), [pytest.param(*entry, id=entry[0]) for entry in pages.commands()]
)
def test_a_command_is_documented(name: str, command: click.Command, context: click.Context) -> None:
    """A command and its options have help texts, and the pages say when to use the command."""
    assert command.get_short_help_str()
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"finelip {name}: {parameter.opts} has no help"
    prose = "\n".join(path.read_text(encoding="utf-8") for path in PROSE)
    assert re.search(rf"finelip {name}\b", prose), f"no page tells when to use finelip {name}"
