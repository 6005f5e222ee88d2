"""The client with a real server: its answers over HTTP equal those of a local retriever."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from finelip_fast import AsyncClient, Client, ImageError, InputError, Retriever, ServerError, TruncationWarning
from finelip_fast.serve.app import create_app
from finelip_fast.serve.opening import Opening
from finelip_fast.serve.settings import ServeSettings

from .asgi import picture, running

TEXT = "a red house with two floors"


@pytest.fixture(scope="module")
def start(checkpoint: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts a server on an index folder and returns its address."""
    with ExitStack() as servers:

        def run(index: Path, uploads: Path | None = None, **settings: object) -> str:
            opening = Opening(
                index=str(index),
                checkpoint=str(checkpoint),
                engine="torch",
                device="cpu",
                uploads=None if uploads is None else str(uploads),
            )
            return servers.enter_context(running(create_app(opening.open(), ServeSettings(**settings))))  # type: ignore[arg-type]

        yield run


@pytest.fixture(scope="module")
def url(start, folder: Path) -> str:
    return start(folder)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_hits_are_those_of_the_retriever(client: Client, retriever: Retriever) -> None:
    expected = retriever.search([TEXT, "a bus"], k=4)
    results = client.search([TEXT, "a bus"], k=4)
    assert [[hit.id for hit in hits] for hits in results] == [[hit.id for hit in hits] for hits in expected]
    for hit, expected_hit in zip(results[0], expected[0], strict=True):
        assert (hit.metadata, hit.path, hit.mode, hit.stands_out) == (
            *(expected_hit.metadata, expected_hit.path, expected_hit.mode, expected_hit.stands_out),
        )
        assert hit.score == pytest.approx(expected_hit.score, abs=1e-4)
    image = picture(3)
    assert client.search(image=image, k=1)[0].id == retriever.search(image=image, k=1)[0].id
    assert [hit.id for hit in client.search(TEXT, where="camera = 'front'")] == ["a.png"]


def test_arrays_are_those_of_the_retriever(client: Client, retriever: Retriever) -> None:
    texts, images = [TEXT, ""], [picture(0), picture(1)]
    expected = retriever.encode_texts(texts, convert_to_numpy=True)
    np.testing.assert_allclose(client.encode_texts(texts), expected, atol=1e-4)
    expected = retriever.encode_images(images, convert_to_numpy=True)
    np.testing.assert_allclose(client.encode_images(images), expected, atol=1e-4)
    np.testing.assert_allclose(client.score(images, texts), retriever.score(images, texts).numpy(), atol=1e-4)


def test_items_info_and_explanations(client: Client, retriever: Retriever) -> None:
    assert [item.id for item in client.items()] == list(retriever.index.ids)
    assert [item.id for item in client.items(where="year = 2024")] == ["a.png"]
    assert client.info()["items"] == len(retriever)
    hit = client.search(TEXT, k=1)[0]
    assert hit.path is not None
    of_item, of_file = client.explain(hit, TEXT), client.explain(hit.path, TEXT)
    assert [word["text"] for word in of_item["words"]] == TEXT.split()
    assert of_item["score"] == pytest.approx(of_file["score"], abs=1e-4)


def test_what_the_server_refuses(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="where"):
        client.search(TEXT, where="(((")
    with pytest.raises(InputError, match="mode"):
        client.search(TEXT, mode="fast")  # type: ignore[call-overload]
    with pytest.raises(InputError):
        client.search(image=b"no picture")
    with pytest.raises(ImageError, match="cannot read"):
        client.search(image=tmp_path / "none.png")
    with pytest.raises(ServerError, match="--writable") as caught:
        client.delete("a.png")
    assert caught.value.status == 403
    assert caught.value.code is not None
    with pytest.warns(TruncationWarning):
        client.search("a house " * 100, k=1)


def test_an_asynchronous_client_asks_at_once(url: str, retriever: Retriever) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(url) as client:
            hits = await asyncio.gather(*(client.search(TEXT, k=1) for _ in range(8)))
            assert {answer[0].id for answer in hits} == {retriever.search(TEXT, k=1)[0].id}
            return [item.id async for item in client.items()]

    assert asyncio.run(ask()) == list(retriever.index.ids)


def test_pictures_are_added_found_and_deleted(start, checkpoint: Path, tmp_path: Path) -> None:
    with Retriever(checkpoint, index=tmp_path / "index", device="cpu", engine="torch") as retriever:
        retriever.add_images([picture(0)], ids=["first"], progress=False)
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    url = start(tmp_path / "index", tmp_path / "uploads", writable=True, api_key="a-key-of-16-or-more")
    with pytest.raises(ServerError, match="FINELIP_API_KEY"), Client(url) as client:
        client.search(TEXT)
    with Client(url, api_key="a-key-of-16-or-more") as client:
        report = client.add_images(tmp_path / "photos", metadata=[{"n": 1}, {"n": 2}])
        assert (len(report.added), report.skipped) == (2, [])
        assert client.search(image=picture(2), k=1)[0].id == report.added[1]
        content = io.BytesIO()
        picture(4).save(content, "PNG")
        of_bytes = client.add_images(content.getvalue())
        client.delete([*of_bytes.added, report.added[0]])
        assert {item.id for item in client.items()} == {"first", report.added[1]}
        with pytest.raises(InputError):
            client.delete(report.added[0])


def test_the_command_line_asks_the_server(url: str, retriever: Retriever) -> None:
    command = [sys.executable, "-P", "-m", "finelip_fast.cli", "search", TEXT, "--server", url, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [hit["id"] for hit in json.loads(result.stdout)] == [hit.id for hit in retriever.search(TEXT)]


def test_the_documentation_does_what_it_says(start, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """The program in ``docs/how-to/serve.md`` runs against a server of its own."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
    (code,) = re.findall(
        r"^```python\n(from finelip_fast.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "photos").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    picture(9).save(tmp_path / "photo.jpg")
    with Retriever(checkpoint, index=tmp_path / "index", device="cpu", engine="torch") as retriever:
        retriever.add_folder(tmp_path / "photos", progress=False)
    url = start(tmp_path / "index", tmp_path / "uploads", writable=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8000", url), names)
    assert names["scores"].shape == (1, 2)  # type: ignore[attr-defined]
    assert len(names["added"]) == 1  # type: ignore[arg-type]
