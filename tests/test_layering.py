"""Which way imports may point: read from the sources, held to one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent

# Each row may import its own row and those above. A new module needs a place here.
LAYERS = [
    {
        *("_command_line", "_decode", "errors", "_files", "_json", "_markup"),
        *("_arguments", "_terminal", "_typed", "config"),
    },
    {"kernels"},
    {
        *("tokenizer", "preprocess", "encoders", "aggregator", "model", "checkpoint"),
        *("embed", "metrics", "records", "datasets", "runtimes"),
    },
    {"engines", "index"},
    {"explain", "ingest", "known_checkpoints"},  # of the model alone, and of the index; the retriever offers both
    {"retriever"},
    {"evaluation", "studies", "demo", "info", "distributed"},
    {"cli", "_eval_commands", "_explain_command", "_index_commands", "_study_command"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
BESIDE = {
    "training",
    "export",
}  # may import up to the model modules; only the command line and, of training, studies may import them
STUDIES_TRAIN = ("studies", "training")
MODEL_LAYER = LAYER["model"]
ROOT = "__init__"  # the public names; nothing imports them from there


class Import(NamedTuple):
    """One import of ours: ``importer`` and ``imported`` are dotted names below ``finelip_fast``."""

    importer: str
    imported: str
    in_function: bool
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        """The first parts of both names, which the table speaks of."""
        return self.importer.split(".")[0], self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


def find_modules() -> dict[str, Path]:
    """Dotted names below ``finelip_fast`` (packages end in ``.__init__``) to files, the mapped folders included."""
    folders = {"": REPOSITORY / "finelip_fast"} | {
        name: REPOSITORY / name for name in ("kernels", "training", "export")
    }
    return {
        ".".join([*([prefix] if prefix else []), *path.relative_to(folder).with_suffix("").parts]): path
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = find_modules()


def resolve(parts: list[str]) -> str:
    """The module of ours that a dotted path leads to; a name inside a module leads to the module."""
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in MODULES:
                return name
        parts = parts[:-1]
    return ROOT


def imports_of(module: str, tree: ast.AST, in_function: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["finelip_fast", *module.split(".")]
            base = [*package[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
            targets = [".".join([*base, alias.name]) for alias in node.names]
        for target in targets:
            first, *rest = target.split(".")
            if first == "finelip_fast":
                yield Import(module, resolve(rest), in_function, node.lineno)
            elif first in ("kernels", *BESIDE):
                pytest.fail(
                    f"{module}, line {node.lineno}: imports {first} by its bare name; write finelip_fast.{first}"
                )
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports_of(module, node, in_function or is_function)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [
        one
        for module, path in MODULES.items()
        for one in imports_of(module, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    ]


def complain(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(map(str, wrong))


def test_the_imports_are_found(imports: list[Import]) -> None:
    """The reader of imports sees what is known to be there: relative, through the package, and inside functions."""
    found = {(one.importer, one.imported, one.in_function) for one in imports}
    assert ("model", "aggregator", False) in found
    assert ("datasets.scenes.scenes", "datasets.scenes.words", False) in found
    assert ("engines.torch", "checkpoint.__init__", False) in found
    assert ("engines.choice", "engines.torch", True) in found
    assert ("cli", "training.train", True) in found
    assert ("retriever", "kernels.__init__", False) in found


def test_every_module_has_a_place() -> None:
    rooms = {name.split(".")[0] for name in MODULES} - {ROOT}
    unknown = sorted(rooms - set(LAYER) - BESIDE)
    assert not unknown, f"give {unknown} a place in the table of this test"


def test_imports_point_down(imports: list[Import]) -> None:
    wrong = []
    for one in imports:
        importer, imported = one.rooms
        if importer in (imported, ROOT) or imported in BESIDE | {ROOT}:
            continue  # other tests hold these
        highest = MODEL_LAYER if importer in BESIDE else LAYER[importer]
        if LAYER[imported] > highest:
            wrong.append(one)
    complain(wrong)


def test_nothing_imports_the_public_names(imports: list[Import]) -> None:
    complain([one for one in imports if one.imported == ROOT])


def test_the_public_names_come_from_below_the_command_line(imports: list[Import]) -> None:
    allowed = {name for names in LAYERS[: LAYER["retriever"] + 1] for name in names}
    complain([one for one in imports if one.importer == ROOT and one.rooms[1] not in allowed])


def test_kernels_import_the_ground_floor_alone_and_no_model(imports: list[Import]) -> None:
    allowed = ("kernels", *(LAYERS[0] - {"config"}))
    complain([one for one in imports if one.rooms[0] == "kernels" and one.rooms[1] not in allowed])


def test_training_and_export_are_imported_by_the_command_line_and_studies_alone(imports: list[Import]) -> None:
    """By the command line late: its other commands need neither."""
    into = [one for one in imports if one.rooms[1] in BESIDE and one.rooms[0] != one.rooms[1]]
    complain([one for one in into if not (one.rooms[0] == "cli" and one.in_function) and one.rooms != STUDIES_TRAIN])


def test_there_are_no_circles(imports: list[Import]) -> None:
    """Imports at the top of modules, followed from each module, never lead back to it."""
    onward: dict[str, set[str]] = {}
    for one in imports:
        if not one.in_function:
            onward.setdefault(one.importer, set()).add(one.imported)
    for start in onward:
        reached, ahead = set(), list(onward[start])
        while ahead:
            module = ahead.pop()
            assert module != start, f"{start} imports itself by way of {sorted(reached)}"
            if module not in reached:
                reached.add(module)
                ahead += onward.get(module, ())
