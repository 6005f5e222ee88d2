"""What messages advise can be followed: every ``finelip`` command that they name is one, with the options that they name."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from finelip_fast import Retriever, cli

REPOSITORY = Path(__file__).parent.parent
# A command's words are in lower case; behind them stand options, FILES in capitals, and what a message fills in.
COMMAND = re.compile(r"finelip ((?:[a-z0-9]+(?:-[a-z]+)* ?)+)((?: ?(?:--?[a-z][a-z-]*|[A-Z]{3,}[A-Z_.]*|\0))*)")


def messages() -> Iterator[tuple[str, str]]:
    """Every text of the sources that is no docstring, and where it is; ``\\0`` stands for what is filled in."""
    for folder in ("finelip_fast", "kernels", "training", "export"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
            inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    text = "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                    text = node.value
                else:
                    continue
                if "finelip " in text:
                    yield f"{path.relative_to(REPOSITORY)}, line {node.lineno}", text


def options_of_commands() -> dict[str, set[str]]:
    commands = {}
    for name, command in cli.finelip.commands.items():
        inside = command.commands if isinstance(command, click.Group) else {}
        commands |= {name: command} | {f"{name} {inner}": command for inner, command in inside.items()}
    return {
        name: {
            flag
            for param in command.get_params(click.Context(command, **command.context_settings))
            for flag in param.opts
        }
        for name, command in commands.items()
    }


def advised() -> list[tuple[str, str, list[str]]]:
    """Where, the words of the command with what may be prose behind them, and its options."""
    return [
        (where, match[1].strip(), re.findall(r"--?[a-z][a-z-]*", match[2]))
        for where, text in messages()
        for match in COMMAND.finditer(text)
    ]


@pytest.mark.parametrize(("where", "words", "options"), advised())
def test_the_commands_that_messages_name_can_be_run(where: str, words: str, options: list[str]) -> None:
    known = options_of_commands()
    first, second = words.split()[0], " ".join(words.split()[:2])
    name = second if second in known else first
    assert name in known, f"{where}: there is no command finelip {words}"
    assert set(options) <= known[name], f"{where}: finelip {name} has no {options}"


def test_the_commands_are_found() -> None:
    named = {words for _, words, _ in advised()}
    assert {"index repair", "search"} <= {" ".join(words.split()[:2]) for words in named}
    assert any("--index" in options for _, _, options in advised())


def test_the_extras_that_messages_name_can_be_installed() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for folder in ("finelip_fast", "kernels", "training", "export", "docs")
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".md")
        for match in re.finditer(r"finelip[-_]fast\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in match[1].split(",")
    }
    assert {"heic", "raw", "watch"} <= named <= extras.keys()


def damage_a_row(folder: Path) -> None:
    (segment,) = (folder / "segments").glob("*.safetensors")
    content = bytearray(segment.read_bytes())
    content[600] ^= 64  # behind the header, in the first item's embedding
    segment.write_bytes(content)


def damage_the_catalogue(folder: Path) -> None:
    (folder / "catalogue.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4000))


@pytest.mark.parametrize("damage", [damage_a_row, damage_the_catalogue])
def test_what_is_advised_for_a_damaged_index_mends_it(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "an index"
    retriever = Retriever(index=folder, engine="torch", device="cpu")
    retriever.add_texts(["a red house", "a blue car"], progress=False)
    retriever.index.close()
    damage(folder)
    search = ["search", "a house", "--index", str(folder), "--engine", "torch", "--quiet"]
    assert cli.main(search) == 2
    error = capsys.readouterr().err
    advice = re.search(r"finelip (index repair --index '[^']+'(?: --restore)?)", error)
    assert advice, error
    assert cli.main(shlex.split(advice[1])) == 0
    assert cli.main(search) == 0
