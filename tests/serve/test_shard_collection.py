"""Served shards: one collection to search and browse, with missing shards reported."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

import finelip_fast
from finelip_fast import Client, Retriever
from finelip_fast.distributed import Shards
from finelip_fast.engines import Engine, open_engine
from finelip_fast.errors import InputError, StoreError
from finelip_fast.serve.app import create_app
from finelip_fast.serve.collection import Upload
from finelip_fast.serve.settings import ServeSettings
from finelip_fast.serve.shard_collection import ShardCollection

from .asgi import picture, running


@pytest.fixture(scope="module")
def engine(make_model, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("shards") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder)
    return open_engine("torch", folder, "cpu")


@pytest.fixture(scope="module")
def folders(engine: Engine, tmp_path_factory) -> list[Path]:
    """Two folders of pictures, with an index each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in "ab":
        (folder / f"photos-{shard}").mkdir()
        for number in range(3):
            values = np.random.default_rng([number, ord(shard)]).integers(0, 256, (2, 2, 3), np.uint8)
            image = Image.fromarray(values).resize((48, 40), Image.Resampling.BICUBIC)
            image.save(folder / f"photos-{shard}" / f"{shard}{number}.png")
            sidecar = folder / f"photos-{shard}" / f"{shard}{number}.json"
            sidecar.write_text(f'{{"shard": "{shard}", "number": {number}}}')
        with Retriever(engine.source, engine="torch", device="cpu", index=folder / shard) as retriever:
            retriever.add_folder(folder / f"photos-{shard}", progress=False)
    return [folder / shard for shard in "ab"]


@pytest.fixture(scope="module")
def served(engine: Engine, folders: list[Path]) -> Iterator[ShardCollection]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with closing(ShardCollection(engine, Shards(folders, partial="mark", cpus=0))) as collection:
        yield collection


def test_shards_are_searched_and_looked_at(served: ShardCollection, engine: Engine, folders: list[Path]) -> None:
    result = served.search(engine.embed_texts(["a red house", "night"]), 6, alpha=0.5)
    assert (result.covered, result.missing, [len(hits) for hits in result.hits]) == (1, {}, [6, 6])
    for hits in result.hits:
        for hit in hits:
            assert hit.shard == str(folders["ab".index(hit.metadata["shard"])])
            assert hit.score == pytest.approx(0.5 * hit.global_score + 0.5 * hit.fine_score, abs=1e-5)
            assert served.picture(hit.id) == served.picture(hit.id, hit.shard) == Path(hit.path)
            assert Path(hit.path).is_file()
    assert served.picture("nothing") is None
    assert len(served) == 6
    stored = served.embeddings_of(["b1.png", "nothing"])
    assert stored.keys() == {"b1.png"}
    assert served.search(stored["b1.png"][None], 1).hits[0][0].id == "b1.png"
    fields = {field.name: field for field in served.fields()}
    assert sorted(fields["shard"].values) == ["a", "b"]
    assert (fields["number"].least, fields["number"].greatest) == (0, 2)
    explanation = served.explain(served.picture("a0.png"), "a red house")
    assert explanation.alpha == served.alpha == 0.8
    by_cosine = ShardCollection(engine, served._shards, alpha=1)
    (hits,) = by_cosine.search(stored["b1.png"][None], 6).hits
    assert [hit.score for hit in hits] == pytest.approx([hit.global_score for hit in hits])
    with pytest.raises(InputError, match=r"expected alpha in \[0, 1\], got 2"):
        served.search(stored["b1.png"][None], 1, alpha=2)
    with pytest.raises(InputError, match=r"expected alpha in \[0, 1\], got 2"):
        ShardCollection(engine, served._shards, alpha=2)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6, 100])
def test_shards_are_listed_one_after_another(served: ShardCollection, limit: int) -> None:
    ids, after = [], None
    while True:
        items, after = served.items(limit=limit, after=after)
        ids += [item.id for item in items]
        if after is None:
            break
        assert len(items) == limit
    assert ids == [f"{shard}{number}.png" for shard in "ab" for number in range(3)]
    assert [item.id for item in served.items(where="shard = 'b'")[0]] == ["b0.png", "b1.png", "b2.png"]
    for wrong in ("", "x", "7:", "0:x", "-1:"):
        with pytest.raises(InputError, match="expected after to be the cursor of a previous page"):
            served.items(after=wrong)


def test_shards_are_not_written_to(served: ShardCollection) -> None:
    assert not served.writable
    for change in (lambda: served.add([Upload(b"")]), lambda: served.delete(["a0.png"])):
        with pytest.raises(InputError, match=r"shards can only be searched.* --writable"):
            change()


def test_a_shard_that_is_gone_is_told(
    served: ShardCollection, engine: Engine, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard on another machine is still searched; operations that need its folder raise an error."""
    elsewhere: dict[str, Any] = {str(folders[0]): served._local_indexes()[str(folders[0])]}
    monkeypatch.setattr(served, "_local_indexes", lambda: elsewhere)
    hits = served.search(engine.embed_texts(["night"]), 6).hits[0]
    assert len(hits) == 6
    assert {hit.path is None for hit in hits if hit.id.startswith("b")} == {True}
    assert served.picture("b0.png") is None
    assert {field.name for field in served.fields()} == {"number", "shard"}
    for call in (served.items, lambda: served.embeddings_of(["a0.png"])):
        with pytest.raises(StoreError, match=r"the folder of the shard .*/b is not on this machine"):
            call()


def test_an_id_that_two_shards_hold_is_two_items(engine: Engine, tmp_path: Path) -> None:
    """Each hit has its own picture, explanation and embedding, and each item its own line of the listing."""
    pytest.importorskip("ray")
    for shard, size in (("a", (48, 40)), ("b", (40, 48))):
        (tmp_path / f"photos-{shard}").mkdir()
        picture(ord(shard), size).save(tmp_path / f"photos-{shard}" / "same.png")
        with Retriever(engine.source, engine="torch", device="cpu", index=tmp_path / shard) as retriever:
            retriever.add_folder(tmp_path / f"photos-{shard}", progress=False)
    folders = [tmp_path / shard for shard in "ab"]
    with (
        closing(ShardCollection(engine, Shards(folders, partial="mark", cpus=0))) as collection,
        running(create_app(collection, ServeSettings())) as url,
        Client(url) as client,
        httpx2.Client(base_url=url) as http,
    ):
        hits = client.search("a red house")
        assert {hit.shard for hit in hits} == set(map(str, folders))
        answered = http.post("/v1/search", json={"text": "a red house"}).json()["results"][0]["hits"]
        for items in (answered, http.get("/v1/items").json()["items"]):
            for item in items:
                assert Path(item["path"]) == tmp_path / f"photos-{Path(item['shard']).name}" / "same.png"
                with Image.open(io.BytesIO(http.get(item["thumbnail"]).content)) as thumbnail:
                    assert (thumbnail.width > 40) == (item["shard"] == str(folders[0]))
        for hit in hits:
            assert (client.explain(hit, "red")["width"] > 40) == (hit.shard == str(folders[0]))
            query = {"item": hit.id, "shard": hit.shard, "k": 1}
            (best,) = http.post("/v1/search", json=query).json()["results"][0]["hits"]
            assert (best["shard"], best["global_score"]) == (hit.shard, pytest.approx(1, abs=1e-2))
        elsewhere = http.post("/v1/search", json={"item": "same.png", "shard": "/elsewhere"})
        assert (elsewhere.status_code, "of the shard '/elsewhere'" in elsewhere.text) == (404, True)
        alone = http.post("/v1/search", json={"text": "red", "shard": str(folders[0])})
        assert (alone.status_code, alone.json()["error"]["param"]) == (400, "shard")


def test_shards_of_another_checkpoint_are_refused(served: ShardCollection, make_model, tmp_path: Path) -> None:
    finelip_fast.save(make_model(seed=1, context_length=40, vision_layers=1, text_width=32), tmp_path / "other")
    with pytest.raises(StoreError, match="open them with the checkpoint that made them"):
        ShardCollection(open_engine("torch", tmp_path / "other", "cpu"), served._shards)


def test_a_folder_that_is_gone_leaves_the_items_of_the_others(
    served: ShardCollection, engine: Engine, folders: list[Path]
) -> None:
    """Paths of hits, thumbnails, fields and the version are those of the indexes that are still here."""
    versions = [served._local_indexes()[str(folder)].version for folder in folders]
    folders[0].rename(folders[0].with_name("away"))
    try:
        (hits,) = served.search(engine.embed_texts(["a red house"]), 6).hits
        assert not {hit.path for hit in hits if hit.metadata["shard"] == "b"} & {None}
        assert served.picture("a0.png") is None
        assert Path(served.picture("b0.png")).name == "b0.png"
        assert {field.name: field.values for field in served.fields()}["shard"] == ["b"]
        assert served.version() == versions[1]
        with TestClient(create_app(served, ServeSettings()), base_url="http://127.0.0.1:8000") as client:
            assert client.get("/v1/info").json()["index_version"] == versions[1]
    finally:
        folders[0].with_name("away").rename(folders[0])
    assert served.version() == sum(versions)
