"""The direction of imports, read from the sources and checked against one table."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import REPOSITORY, ROOT, Import, circles, find_imports, find_modules, floors

# Each row may import from itself and from the rows above. A new module needs a place here.
LAYERS = [
    {
        *("_addresses", "_arguments", "_command_line", "_decode", "_files", "_json", "_markup", "_pages", "_pixels"),
        *("_quantities", "_raw", "_terminal", "_typed", "_versions", "config", "errors"),
        *("folders", "picture_files", "picture_tables"),
    },
    {"kernels"},
    {
        *(
            "vocabulary",
            "tokenizer",
            "preprocess",
            "transformer",
            "encoders",
            "siglip",
            "aggregator",
            "model",
            "frozen",
        ),
        "checkpoint",
        *("embed", "metrics", "ranking", "records", "datasets", "runtimes"),
    },
    {"engines", "index"},
    {
        "collection",
        "explain",
        "hits",
        "ingest",
        "known_checkpoints",
        "reports",
    },  # these use only the model, or the index; the retriever combines both
    {"embedder", "retriever"},
    {"evaluation", "studies", "demo", "info", "verify", "distributed", "diffusion"},
    {"serve", "client"},
    {"cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# These may import up to the model modules; only the command line (and studies, for training) may import them.
BESIDE = {"training", "export"}
STUDIES_TRAIN = ("studies", "training")
MODEL_LAYER = LAYER["model"]


MODULES = find_modules()


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return find_imports(MODULES)


def complain(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(map(str, wrong))


def test_the_imports_are_found(imports: list[Import]) -> None:
    """The import finder sees known imports: relative, through the package, and inside functions."""
    triples = {(import_.importer, import_.imported, import_.in_function) for import_ in imports}
    assert ("model", "aggregator", False) in triples
    assert ("datasets.scenes.scenes", "datasets.scenes.words", False) in triples
    assert ("engines.torch", "checkpoint.__init__", False) in triples
    assert ("engines.choice", "engines.torch", True) in triples
    assert ("cli.train", "training.train", True) in triples
    assert ("embedder", "kernels.__init__", False) in triples


def test_every_module_has_a_place() -> None:
    rooms = {name.split(".")[0] for name in MODULES} - {ROOT}
    unknown = sorted(rooms - set(LAYER) - BESIDE)
    assert not unknown, f"give {unknown} a place in the table of this test"


def test_imports_point_down(imports: list[Import]) -> None:
    wrong = []
    for import_ in imports:
        importer, imported = import_.rooms
        if importer in (imported, ROOT) or imported in BESIDE | {ROOT}:
            continue  # covered by other tests
        highest = MODEL_LAYER if importer in BESIDE else LAYER[importer]
        if LAYER[imported] > highest:
            wrong.append(import_)
    complain(wrong)


def test_nothing_imports_the_public_names(imports: list[Import]) -> None:
    complain([import_ for import_ in imports if import_.imported == ROOT])


def test_the_public_names_come_from_below_the_command_line(imports: list[Import]) -> None:
    allowed = {name for names in LAYERS[: LAYER["retriever"] + 1] for name in names} | {"client"}
    complain([import_ for import_ in imports if import_.importer == ROOT and import_.rooms[1] not in allowed])


def test_kernels_import_the_ground_floor_alone_and_no_model(imports: list[Import]) -> None:
    allowed = ("kernels", *(LAYERS[0] - {"config"}))
    complain([import_ for import_ in imports if import_.rooms[0] == "kernels" and import_.rooms[1] not in allowed])


def test_training_and_export_are_imported_by_the_command_line_and_studies_alone(imports: list[Import]) -> None:
    """The command line imports them lazily, because its other commands need neither."""
    into = [import_ for import_ in imports if import_.rooms[1] in BESIDE and import_.rooms[0] != import_.rooms[1]]
    complain(
        [
            import_
            for import_ in into
            if not (import_.rooms[0] == "cli" and import_.in_function) and import_.rooms != STUDIES_TRAIN
        ]
    )


def test_there_are_no_circles(imports: list[Import]) -> None:
    """Imports inside functions count: if they are needed to break a cycle, one thing is split over two files."""
    arrows: dict[str, set[str]] = {}
    for import_ in imports:
        if import_.imported != import_.importer:
            arrows.setdefault(import_.importer, set()).add(import_.imported)
    assert circles(arrows) == []


def test_the_drawing_finds_circles_and_floors() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "e": {"d"}}
    assert circles(arrows) == [["b", "c"]]
    assert floors(arrows) == [["d"], ["b", "c", "e"], ["a"]]
    assert floors({"a": {"b"}}) == [["b"], ["a"]]


def test_tests_lie_where_the_source_lies() -> None:
    tests = REPOSITORY / "tests"
    places = {Path(*module.split(".")[:-1]) for module in MODULES} | {
        Path(name) for name in ("bench", "docs", "examples")
    }
    assert {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} <= places
