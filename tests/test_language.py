"""CONTRIBUTING's rules on words that can be checked from the sources: names, descriptions of arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FOLDERS = ("finelip_fast", "kernels", "training", "export", "bench", "docs", "examples", "tests")
PATHS = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))

# Pronouns, participles used as nouns, and demonstratives: none says what a variable holds or what a function returns.
POINTING = re.compile(
    r"asked|both|done|each|every|few|found|given|gone|good|here|kept|made|many|more|named|now|"
    r"one|other|others|ours|own|read|said|same|seen|shown|some|taken|that|theirs|them|there|"
    r"these|they|this|those|told|wanted|what|which|who|whole|whose|written"
)
# Arguments are described by noun phrases: "name of the file", not "Of the file."; so are the subjects of docstrings.
NOT_A_NOUN = re.compile(r"^ +\*{0,2}[a-z_]\w*(?: \([^)]*\))?: (?:As|At|By|For|From|In|Of|On|To|Which|With)\b")
FRAGMENT = re.compile(r"(?:As|At|But|By|For|From|In|Of|On|That|Those|To|With)\b")


def variables(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names of variables and arguments in functions."""
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)))
    for node in chain.from_iterable(map(ast.walk, functions)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names of functions; to read is something that a function does."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.strip("_") != "read":
            yield node.name, node.lineno


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", PATHS, ids=[str(path.relative_to(REPOSITORY)) for path in PATHS])
def test_names_say_what_they_stand_for_and_docstrings_are_no_fragments(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = chain(variables(tree), functions(tree))
    pointing = [f"line {line}: {name}" for name, line in names if POINTING.fullmatch(name.strip("_"))]
    assert not pointing, "name what they hold or return: " + ", ".join(pointing)
    lines = [line.strip() for text in docstrings(tree) for line in text.splitlines() if NOT_A_NOUN.match(line)]
    assert not lines, "describe by noun phrases:\n" + "\n".join(lines)
    summaries = [text.partition("\n")[0] for text in docstrings(tree) if FRAGMENT.match(text)]
    assert not summaries, "say what it is or does:\n" + "\n".join(summaries)
