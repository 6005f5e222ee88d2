"""The code base as a house, drawn from its imports: rooms, the floors on which they stand, and circles.

``python docs/house.py`` lists them; tests/test_layering.py contains the rules. A room is a module or folder directly in
``finelip_fast``, or a mapped folder. Imports inside functions count; imports only for type checkers do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parent.parent
MAPPED = ("kernels", "training", "export")
ROOT = "__init__"  # the public names


class Import(NamedTuple):
    """An import of one of our modules: ``importer`` and ``imported`` are dotted names below ``finelip_fast``."""

    importer: str
    imported: str
    in_function: bool
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.importer), room_of(self.imported)

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


class BareImportError(Exception):
    """A mapped folder is imported by its bare name, which loads a second copy of it."""


def room_of(module: str) -> str:
    return module.split(".")[0]


def find_modules() -> dict[str, Path]:
    """Map dotted names below ``finelip_fast`` (packages end in ``.__init__``) to files, including the mapped folders."""
    folders = {"": REPOSITORY / "finelip_fast"} | {name: REPOSITORY / name for name in MAPPED}
    return {
        ".".join([*([prefix] if prefix else []), *path.relative_to(folder).with_suffix("").parts]): path
        for prefix, folder in folders.items()
        for path in sorted(folder.rglob("*.py"))
    }


def find_imports(modules: Mapping[str, Path]) -> list[Import]:
    """
    Raises:
        BareImportError: A mapped folder is imported by its bare name; says where.
    """
    return [
        import_
        for module, path in modules.items()
        for import_ in _imports_of(module, ast.parse(path.read_text(encoding="utf-8"), str(path)), modules)
    ]


def _imports_of(module: str, tree: ast.AST, modules: Mapping[str, Path], in_function: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["finelip_fast", *module.split(".")]
            base = [*package[: -node.level], *filter(None, [node.module])] if node.level else [node.module or ""]
            targets = [".".join([*base, alias.name]) for alias in node.names]
        for target in targets:
            first, *rest = target.split(".")
            if first == "finelip_fast":
                yield Import(module, _resolve(rest, modules), in_function, node.lineno)
            elif first in MAPPED:
                raise BareImportError(f"{module}, line {node.lineno}: imports {first}; write finelip_fast.{first}")
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports_of(module, node, modules, in_function or is_function)


def _resolve(parts: list[str], modules: Mapping[str, Path]) -> str:
    """Return our module that a dotted path leads to; a name inside a module leads to the module."""
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in modules:
                return name
        parts = parts[:-1]
    return ROOT


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Find the sets of names that reach each other (Tarjan's strongly connected components), largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for onward in sorted(arrows.get(name, ())):
            if onward not in index:
                visit(onward)
                low[name] = min(low[name], low[onward])
            elif onward in stack:
                low[name] = min(low[name], index[onward])
        if low[name] == index[name]:
            circle = []
            while not circle or circle[-1] != name:
                circle.append(stack.pop())
            if len(circle) > 1:
                components.append(sorted(circle))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return sorted(components, key=len, reverse=True)


def floors(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Place each room on the lowest floor that its imports allow; rooms in a circle stand together."""
    together = {name: circle[0] for circle in circles(arrows) for name in circle}
    names = set(arrows) | {name for onward in arrows.values() for name in onward}
    height: dict[str, int] = {}

    def rise(name: str) -> int:
        group = together.get(name, name)
        if group not in height:
            height[group] = 0  # for paths that lead back into the circle
            members = [room for room in names if together.get(room, room) == group]
            below = {onward for member in members for onward in arrows.get(member, ())} - set(members)
            height[group] = 1 + max(map(rise, below), default=-1)
        return height[group]

    levels = {name: rise(name) for name in names}
    return [
        sorted(name for name, level in levels.items() if level == floor) for floor in range(max(levels.values()) + 1)
    ]


def main() -> None:
    modules = find_modules()
    between: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for import_ in find_imports(modules):
        importer, imported = import_.rooms
        if import_.imported != import_.importer:
            files.setdefault(import_.importer, set()).add(import_.imported)
        if importer != imported and ROOT not in (importer, imported):
            between.setdefault(importer, set()).add(imported)
    rooms = {room_of(module) for module in modules} - {ROOT}
    drawn = floors(between)
    print(f"{len(rooms)} rooms on {len(drawn)} floors, {sum(map(len, between.values()))} arrows between them")
    for number, names in reversed(list(enumerate(drawn))):
        print(f"  {number}  {'  '.join(names)}")
    for unit, arrows in (("rooms", between), ("files", files)):
        for circle in circles(arrows):
            print(f"circle of {unit}: {' -> '.join(circle)}")


if __name__ == "__main__":
    main()
