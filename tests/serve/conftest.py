"""An index of drawn pictures in a folder, and an application that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import finelip_fast
from finelip_fast import Retriever
from finelip_fast.serve.app import create_app
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.settings import ServeSettings

from .asgi import picture

CONTEXT = 40


@pytest.fixture(scope="session")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture(scope="session")
def folder(checkpoint: Path, tmp_path_factory) -> Path:
    """An index of six pictures: the first with metadata, one named like HTML, and one in a subfolder."""
    pictures = tmp_path_factory.mktemp("served pictures")
    (pictures / "b").mkdir()
    for seed, name in enumerate(["a.png", "b/c d.png", "<img src=x>.png", "é?#%.png", "f.png", "g.png"]):
        picture(seed).save(pictures / name)
    (pictures / "a.png.json").write_text('{"camera": "front", "year": 2024}')
    index = tmp_path_factory.mktemp("served index")
    with Retriever(checkpoint, index=index, device="cpu", engine="torch") as retriever:
        retriever.add_folder(pictures, progress=False)
    return index


@pytest.fixture(scope="session")
def retriever(checkpoint: Path, folder: Path) -> Iterator[Retriever]:
    with Retriever(checkpoint, index=folder, device="cpu", engine="torch") as retriever:
        yield retriever


@pytest.fixture
def open_client(retriever: Retriever) -> Iterator[Callable[..., TestClient]]:
    """Return a function that starts an application on the index with given settings, and returns a client."""
    clients: list[TestClient] = []

    def opened(**settings: object) -> TestClient:
        app = create_app(IndexCollection(retriever), ServeSettings(**settings))
        client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield opened
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(open_client: Callable[..., TestClient]) -> TestClient:
    return open_client()
