"""Remedies in messages work: every ``finelip`` command that they name exists, with the options that they name."""

from __future__ import annotations

import ast
import pickle
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast import Retriever, cli
from finelip_fast.datasets import Scenes, open_dataset
from finelip_fast.errors import FineLIPError
from finelip_fast.explain import explain
from finelip_fast.folders import list_images
from finelip_fast.metrics import best_ranks
from finelip_fast.model import FineLIP
from finelip_fast.picture_tables import read_rows
from finelip_fast.tokenizer import encode_batch, expected_truncation, tokenize

REPOSITORY = Path(__file__).parent.parent
# Words of a command are in lower case, followed by options, FILES in capitals, and placeholders.
COMMAND = re.compile(r"finelip ((?:[a-z0-9]+(?:-[a-z]+)* ?)+)((?: ?(?:--?[a-z][a-z-]*|[A-Z]{3,}[A-Z_.]*|\0))*)")


def messages() -> Iterator[tuple[str, str]]:
    """Yield every non-docstring text of the sources and its location; ``\\0`` stands for a placeholder."""
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
    """Return location, words of the command (possibly followed by prose), and its options."""
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


def unquoted(node: ast.JoinedStr) -> Iterator[str]:
    """Yield the values that a message inserts unquoted after ``--index``, where a shell would split a name with a space."""
    for before, part in pairwise(node.values):
        is_index = isinstance(before, ast.Constant) and str(before.value).endswith("--index ")
        if is_index and isinstance(part, ast.FormattedValue) and "quote" not in ast.unparse(part.value):
            yield ast.unparse(part.value)


def test_the_commands_that_messages_name_quote_folders() -> None:
    for path in sorted((REPOSITORY / "finelip_fast").rglob("*.py")):
        strings = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr))
        assert not [name for node in strings for name in unquoted(node)], path


def test_the_commands_are_found() -> None:
    commands = {words for _, words, _ in advised()}
    assert {"index repair", "search"} <= {" ".join(words.split()[:2]) for words in commands}
    assert any("--index" in options for _, _, options in advised())


def test_the_extras_that_messages_name_can_be_installed() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advised_extras = {
        extra
        for folder in ("finelip_fast", "kernels", "training", "export", "docs")
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".md")
        for match in re.finditer(r"finelip[-_]fast\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in match[1].split(",")
    }
    assert {"heic", "raw", "watch"} <= advised_extras <= extras.keys()


def damage_a_row(folder: Path) -> None:
    (segment,) = (folder / "segments").glob("*.safetensors")
    content = bytearray(segment.read_bytes())
    content[600] ^= 64  # after the header, in the first item's embedding
    segment.write_bytes(content)


def damage_the_catalogue(folder: Path) -> None:
    (folder / "catalogue.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4000))


@pytest.mark.filterwarnings("ignore:.* has no copy of its catalogue:UserWarning")
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


# Calls ----------------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Objects that the calls use: a model with and one without trained aggregators, and a folder for files."""

    model: FineLIP
    untrained: FineLIP
    folder: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def picture(self, name: str) -> Path:
        Image.new("RGB", (40, 30), "red").save(self.folder / name)
        return self.folder / name

    def retriever(self, name: str | None = None) -> Retriever:
        if not (self.folder / "checkpoint").exists():
            finelip_fast.save(self.model, self.folder / "checkpoint")
        index = None if name is None else self.folder / name
        return Retriever(self.folder / "checkpoint", engine="torch", device="cpu", index=index)


@pytest.fixture(scope="module")
def models(make_model: Callable[..., FineLIP]) -> tuple[FineLIP, FineLIP]:
    return make_model(context_length=40), make_model(context_length=40, trained_aggregators=False)


@pytest.fixture
def world(models: tuple[FineLIP, FineLIP], tmp_path: Path) -> World:
    return World(*models, tmp_path)


class Case(NamedTuple):
    """A refused call, the advice in its error, and calls that follow the advice."""

    refused: Callable[[World], Any]
    advice: str
    mended: list[Callable[[World], Any]]


LONG = "a red house with two floors and a blue car before it"
RED = np.full((30, 40, 3), 200, np.uint8)
CAPTIONS = '{"image": "a.png", "caption": "a house"}'
NO_ANSWER, SCORES = torch.tensor([[True, False], [False, False]]), torch.rand(2, 2)


def cut() -> None:
    with expected_truncation():
        tokenize(LONG, 8, overflow="truncate")


CASES = {
    "windows": Case(lambda _: tokenize(LONG, 8, overflow="window"), "use encode_batch, which also returns the text",
                    [lambda _: encode_batch(LONG, 8, overflow="window").owner]),
    "a long caption": Case(lambda _: tokenize(LONG, 8, overflow="error"),
                           "shorten it, raise context_length if the model allows, or pass overflow='truncate'",
                           [lambda _: tokenize(LONG[:11], 8, overflow="error"),
                            lambda _: tokenize(LONG, 16, overflow="error"), lambda _: cut()]),
    "bytes": Case(lambda _: tokenize(LONG.encode()), "; convert it first",
                  [lambda _: tokenize(LONG.encode().decode())]),
    "no text": Case(lambda _: tokenize(["a", None]), 'convert it to a str ("" stands for no text)',
                    [lambda _: tokenize(["a", ""])]),
    "characters": Case(lambda _: tokenize("a" * 300_000), "; shorten it", [lambda _: tokenize(("a" * 300_000)[:50], 77)]),
    "no context": Case(lambda _: tokenize("a", 2), "pass the model's own, such as 256", [lambda _: tokenize("a", 256)]),
    "an address": Case(lambda world: world.model.preprocess("http://a/b.png"), "download it first and pass its path or bytes",
                       [lambda world: world.model.preprocess(world.picture("b.png")),
                        lambda world: world.model.preprocess(world.picture("b.png").read_bytes())]),
    "a folder": Case(lambda world: world.model.preprocess(world.folder), "finelip_fast.folders.list_images(",
                     [lambda world: world.picture("a.png") and list_images(world.folder)[0]]),
    "colours last": Case(lambda world: world.model.preprocess(torch.from_numpy(RED)), ": x.permute(2, 0, 1)",
                         [lambda world: world.model.preprocess(torch.from_numpy(RED).permute(2, 0, 1))]),
    "colours first": Case(lambda world: world.model.preprocess(RED.transpose(2, 0, 1)), ": x.transpose(1, 2, 0)",
                          [lambda world: world.model.preprocess(RED)]),
    "floats": Case(lambda world: world.model.preprocess(RED.astype(float)), "divide them by their maximum",
                   [lambda world: world.model.preprocess(RED.astype(float) / 255)]),
    "integers": Case(lambda world: world.model.preprocess(RED.astype(int)), "; convert them to uint8",
                     [lambda world: world.model.preprocess(RED.astype(int).astype(np.uint8))]),
    "another format": Case(lambda world: world.model.preprocess(world.picture("a.pcx")), "got PCX; convert it",
                           [lambda world: world.model.preprocess(world.picture("a.png"))]),
    "a picture in text": Case(lambda world: world.model.preprocess(world.write("a.ppm", "P3 1 1 255 9 9 9")),
                              "expected a binary PPM, got a plain-text PPM; convert it",
                              [lambda world: world.model.preprocess(world.picture("a.ppm"))]),
    "pixels": Case(lambda world: world.model.encode_image(torch.zeros(1, 3, 30, 40)), "use model.preprocess",
                   [lambda world: world.model.encode_image(world.model.preprocess(RED)[None])]),
    "alpha": Case(lambda world: world.untrained.config.choose_alpha(0.5), "leave alpha out, or train the aggregators",
                  [lambda world: world.untrained.config.choose_alpha(None),
                   lambda world: world.model.config.choose_alpha(0.5)]),
    "a map": Case(lambda world: explain(world.untrained, RED, "a house").heatmap("house", tokens="aggregated"),
                  "expected tokens='raw'",
                  [lambda world: explain(world.untrained, RED, "a house").heatmap("house", tokens="raw")]),
    "no answer": Case(lambda _: best_ranks(SCORES, NO_ANSWER), "omit such queries",
                      [lambda _: best_ranks(SCORES[:1], NO_ANSWER[:1])]),
    "a size": Case(lambda _: Scenes("test", size=-1), "leave it out for the split's own size", [lambda _: Scenes("test")]),
    "encoding": Case(lambda world: open_dataset(f"jsonl:{world.write('a.jsonl', CAPTIONS.encode('utf-16'))}"),
                     "expected UTF-8 text: UTF-16; save it as UTF-8",
                     [lambda world: open_dataset(f"jsonl:{world.write('a.jsonl', CAPTIONS)}")]),
    "a picture's address": Case(
        lambda world: open_dataset(f"jsonl:{world.write('a.jsonl', CAPTIONS.replace('a.png', 'http://a/a.png'))}"),
        "expected a picture that is a file, got 'http://a/a.png'; download it first",
        [lambda world: open_dataset(f"jsonl:{world.write('a.jsonl', CAPTIONS)}")]),
    "a table's address": Case(
        lambda world: list(read_rows(world.write("a.csv", "image\nhttp://a/a.png\n"))), "download it first",
        [lambda world: list(read_rows(world.write("a.csv", "image\na.png\n")))]),
    "a table's column": Case(
        lambda world: list(read_rows(world.write("a.csv", "where\na.png\n"))), "name it with image_field (--image-field)",
        [lambda world: list(read_rows(world.write("a.csv", "where\na.png\n"), image_field="where"))]),
    "ids": Case(lambda world: world.retriever().add_texts(["a"], ids=[1], progress=False), "convert it first",
                [lambda world: world.retriever().add_texts(["a"], ids=["1"], progress=False)]),
    "a pickle": Case(lambda world: pickle.dumps(world.retriever()), "open it with index=FOLDER",
                     [lambda world: pickle.loads(pickle.dumps(world.retriever("index"))).close()]),
    "no index": Case(lambda world: Retriever.open(world.folder / "index"), "make one with Retriever(checkpoint, index=",
                     [lambda world: (world.retriever("index").close(), Retriever.open(world.folder / "index").close())]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_that_is_mended_as_advised_succeeds(world: World, case: Case) -> None:
    with pytest.raises(FineLIPError, match=re.escape(case.advice)):
        case.refused(world)
    for mended in case.mended:
        mended(world)


def test_pictures_that_take_too_much_memory_are_shrunk_saved_otherwise_or_allowed_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, replacement = world.folder / "large.png", world.folder / "other.jpg"
    Image.new("RGB", (3000, 2000)).save(large)
    ending = r"or allow more MiB with --decode-memory or FINELIP_PICTURE_MEMORY$"
    for limit, advice in (
        ("30", rf"; shrink it, save it as a baseline JPEG, {ending}"),
        ("10", f"; shrink it, {ending}"),
    ):
        monkeypatch.setenv("FINELIP_PICTURE_MEMORY", limit)
        with pytest.raises(FineLIPError, match=advice):
            world.model.preprocess(large)
        with Image.open(large) as image:
            (image if "JPEG" in advice else image.resize((300, 200))).save(replacement)
        world.model.preprocess(replacement)
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", "1024")
    world.model.preprocess(large)


def test_what_is_left_out_of_a_folder_is_taken_by_include(world: World) -> None:
    (world.folder / "photos" / "@eaDir").mkdir(parents=True)
    world.picture("photos/@eaDir/a.png")
    with world.retriever("index") as retriever:
        ((_, reason),) = retriever.add_folder(world.folder / "photos", progress=False).skipped
        name = re.search(r"\(--include '(.+)' takes it\)", reason)
        assert name, reason
        assert retriever.add_folder(world.folder / "photos", include=[name[1]], progress=False).added == 1


def test_the_root_of_pictures_that_were_moved_is_set(world: World) -> None:
    photos, elsewhere = world.folder / "photos", world.folder / "elsewhere"
    photos.mkdir()
    world.picture("photos/a.png")
    with world.retriever("an index") as retriever:
        retriever.add_folder(photos, progress=False)
        (hit,) = retriever.search("a house", k=1)
        photos.rename(elsewhere)
        for refused in (
            lambda: retriever.explain(hit, "a house"),
            lambda: retriever.add_folder(elsewhere, progress=False),
        ):
            with pytest.raises(FineLIPError) as caught:
                refused()
            advice = re.search(r"finelip (index move-root FOLDER --index '[^']+')", str(caught.value))
            assert advice, caught.value
        retriever.explain(elsewhere / "a.png", "a house")  # "pass the picture itself"
        words = [str(elsewhere) if word == "FOLDER" else word for word in shlex.split(advice[1])]
        assert cli.main([*words, "--quiet"]) == 0
        (hit,) = retriever.search("a house", k=1)
        retriever.explain(hit, "a house")
        assert str(retriever.add_folder(elsewhere, progress=False)) == "0 added, 0 skipped"
