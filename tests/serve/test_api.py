"""The API gives the library's answers, for any id and any metadata, and all errors have one format."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from starlette.testclient import TestClient

from finelip_fast import Retriever
from finelip_fast.hits import Hit, Hits
from finelip_fast.serve import schemas
from finelip_fast.serve.answers import json_bytes
from finelip_fast.serve.app import create_app
from finelip_fast.serve.collection import Found
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.settings import Limits, ServeSettings
from finelip_fast.serve.thumbnails import thumbnail_address

from .asgi import encoded, file_of, picture, talk

TEXT = "a red house with a flat roof"
ODD_IDS = ["a/b.png", "..", "../../etc/passwd", "50%.png", "a?b#c", '"><img src=x>', "a\udcff.png", "a b+c", "%2F", "é"]


def post(client: TestClient, path: str, values: Any, status: int = 200) -> Any:
    answer = client.post(path, json=values)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def ids_of(result: dict[str, Any]) -> list[str]:
    return [hit["id"] for hit in result["hits"]]


# Searching -----------------------------------------------------------------------------------------------------------


def test_a_search_is_the_librarys(client: TestClient, retriever: Retriever) -> None:
    answer = schemas.SearchResponse.model_validate(post(client, "/v1/search", {"text": [TEXT, ""], "k": 3}))
    assert answer.covered == 1.0
    for result, hits in zip(answer.results, retriever.search([TEXT, ""], k=3), strict=True):
        assert [hit.id for hit in result.hits] == [hit.id for hit in hits]
        assert [hit.score for hit in result.hits] == pytest.approx([hit.score for hit in hits], abs=1e-4)
        assert result.hits[0].path == hits[0].path
        assert result.tokens_cut == 0


def test_pictures_are_searched_by_as_base64_as_a_data_uri_and_as_a_file(client: TestClient) -> None:
    image = picture(4)
    results = post(client, "/v1/search", {"image": [encoded(image), f"data:image/png;base64,{encoded(image)}"], "k": 6})
    files = [("image", ("x.png", file_of(image), "image/png"))]
    form = client.post("/v1/search", data={"k": "6", "where": "", "mode": "exact"}, files=files).json()
    assert [ids_of(result) for result in (*results["results"], *form["results"])] == [ids_of(form["results"][0])] * 3
    assert ids_of(form["results"][0])[0] == "f.png"


def test_a_form_holds_texts_too(client: TestClient) -> None:
    files = {"text": (None, TEXT), "k": (None, "2")}
    assert client.post("/v1/search", files=files).json() == post(client, "/v1/search", {"text": TEXT, "k": 2})


def test_items_are_searched_by_their_stored_embeddings(client: TestClient) -> None:
    (result,) = post(client, "/v1/search", {"item": "b/c d.png"})["results"]
    assert (ids_of(result)[0], result["tokens"]) == ("b/c d.png", None)
    assert result["hits"][0]["global_score"] == pytest.approx(1, abs=1e-2)
    assert post(client, "/v1/search", {"item": ["b/c d.png", "nobody"]}, 404)["code"] == "no_such_item"


def test_offset_is_the_next_page_and_alpha_weighs(client: TestClient) -> None:
    (full_result,) = post(client, "/v1/search", {"text": TEXT, "k": 6})["results"]
    (rest,) = post(client, "/v1/search", {"text": TEXT, "k": 3, "offset": 3})["results"]
    assert rest["hits"] == full_result["hits"][3:]
    (by_cosine,) = post(client, "/v1/search", {"text": TEXT, "alpha": 1})["results"]
    assert all(hit["score"] == pytest.approx(hit["global_score"], abs=1e-6) for hit in by_cosine["hits"])
    (front,) = post(client, "/v1/search", {"text": TEXT, "where": "camera = 'front'"})["results"]
    assert ids_of(front) == ["a.png"]


def test_nothing_asked_is_nothing_found(client: TestClient) -> None:
    assert post(client, "/v1/search", {"text": []})["results"] == []


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"text": "a", "item": "b"}, 400, "invalid_request"),
        ({"text": "a", "k": 0}, 400, "invalid_request"),
        ({"text": "a", "k": "3"}, 400, "invalid_request"),
        ({"text": "a", "k": True}, 400, "invalid_request"),
        ({"text": "a", "alpha": 2}, 400, "invalid_request"),
        ({"text": "a", "mode": "fast"}, 400, "invalid_request"),
        ({"text": "a", "top_k": 3}, 400, "invalid_request"),
        ({"text": "a", "where": "camera ="}, 400, "invalid_input"),
        ({"image": "https://example.org/a.png"}, 400, "address"),
        ({"image": "data:image/png,abc"}, 400, "invalid_base64"),
        ({"image": encoded(picture(0))[:60]}, 400, "invalid_input"),
        ({"image": "AAAA"}, 400, "invalid_input"),
        ([], 400, "invalid_input"),
    ],
)
def test_what_it_does_not_take_is_refused(client: TestClient, values: Any, status: int, code: str) -> None:
    assert post(client, "/v1/search", values, status)["code"] == code


def test_a_refusal_names_the_field(client: TestClient) -> None:
    error = post(client, "/v1/search", {"text": "a", "k": -1}, 400)
    assert (error["param"], error["type"]) == ("k", "invalid_request_error")
    assert "got -1" in error["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"k": ' + b"9" * 10_000 + b"}", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"text": "a"}', "text/plain", 415),
        (b'{"text": "a"}', "application/x-www-form-urlencoded", 415),
        (b"", "", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=y", 400),
        (b"--y\r\n\r\n\r\n--y--", "multipart/form-data; boundary=y", 400),
    ],
)
def test_bodies_that_cannot_be_read(client: TestClient, body: bytes, kind: str, status: int) -> None:
    answer = client.post("/v1/search", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, set(answer.json())) == (status, {"error"}), answer.text


def test_too_many_parts(client: TestClient) -> None:
    files = [("image", (f"{number}.png", b"x")) for number in range(65)]
    assert client.post("/v1/search", files=files).json()["error"]["code"] == "too_many"
    fields = {f"a{number}": (None, "x") for number in range(400)}
    assert client.post("/v1/search", files=fields).json()["error"]["code"] == "too_many"


def test_a_picture_of_too_many_pixels(open_client: Callable[..., TestClient]) -> None:
    client = open_client(limits=Limits(pixels=1000))
    error = post(client, "/v1/search", {"image": encoded(picture(0))}, 413)
    assert (error["code"], error["param"]) == ("too_many_pixels", "image")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_broken_exif_hides_neither_a_picture_nor_its_size(
    open_client: Callable[..., TestClient], folder: Path, kind: str
) -> None:
    content = io.BytesIO()
    picture(0).save(content, kind, exif=b"Exif\0\0garbage")
    image = base64.b64encode(content.getvalue()).decode()
    explained = post(open_client(), "/v1/explain", {"text": TEXT, "image": image})
    assert (explained["width"], explained["height"]) == (48, 40)
    refusal = post(open_client(limits=Limits(pixels=1000)), "/v1/search", {"image": image}, 413)
    assert refusal["code"] == "too_many_pixels"


def test_a_bad_picture_ends_its_own_request_alone(client: TestClient) -> None:
    """Such a picture kills a worker of other servers while health checks still return 200."""
    for bad in (
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
        file_of(picture(0))[:-200],
        b"GIF89a\xff\xff\xff\xff",
        b"\xff\xd8\xff",
    ):
        answer = client.post("/v1/search", files=[("image", ("x", bad))])
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert client.get("/health/ready").status_code == 200
    assert post(client, "/v1/search", {"image": encoded(picture(0, (1, 1)))})["results"][0]["hits"]


# Scoring and explaining ----------------------------------------------------------------------------------------------


def test_scores_are_the_librarys(client: TestClient, retriever: Retriever) -> None:
    images, texts = [picture(0), picture(1)], [TEXT, "night", ""]
    answer = post(client, "/v1/score", {"images": [encoded(image) for image in images], "texts": texts})
    torch.testing.assert_close(torch.tensor(answer["scores"]), retriever.score(images, texts), atol=1e-4, rtol=0)
    assert post(client, "/v1/score", {"images": [], "texts": texts}, 400)["param"] == "images"


def test_an_explanation_is_the_librarys(client: TestClient, retriever: Retriever, folder: Path) -> None:
    text = f"  {TEXT}, and more" + " words" * 60
    by_item = post(client, "/v1/explain", {"text": text, "item": "a.png"})
    schemas.ExplainResponse.model_validate(by_item)
    expected = retriever.explain(Path(retriever.index.root or "") / "a.png", text)
    assert by_item["score"] == pytest.approx(expected.score, abs=1e-5)
    assert [text[word["start"] : word["end"]] for word in by_item["words"]] == [word.text for word in expected.words]
    assert text[by_item["beyond"] :].split() == ["words"] * text[by_item["beyond"] :].count("words")
    assert (by_item["width"], by_item["height"], len(by_item["maps"]["raw"]["maps"][0])) == (48, 40, 2 * 4 * 4)
    assert post(client, "/v1/explain", {"text": text, "image": encoded(picture(0))}) == by_item
    assert post(client, "/v1/explain", {"text": TEXT, "item": "nobody"}, 404)["code"] == "no_such_item"
    assert post(client, "/v1/explain", {"text": TEXT}, 400)["code"] == "invalid_request"
    assert post(client, "/v1/explain", {"text": "", "item": "a.png"})["words"] == []


@pytest.mark.parametrize("text", ["", "a red house", "Ünïcödé 🏠 house", "house " * 60, "house" * 300, " \n "])
def test_tokens_are_counted_where_the_context_ends(client: TestClient, retriever: Retriever, text: str) -> None:
    answer = post(client, "/v1/tokens", {"text": text})
    assert (answer["context_length"], answer["cut_at"] is None) == (40, answer["tokens"] <= 40)
    if answer["cut_at"] is not None:
        assert post(client, "/v1/tokens", {"text": text[: answer["cut_at"]]})["cut_at"] is None


# Items ---------------------------------------------------------------------------------------------------------------


def test_items_come_in_pages(client: TestClient) -> None:
    ids: list[str] = []
    after: str | None = None
    while True:
        answer = client.get("/v1/items", params={"limit": 4} | ({} if after is None else {"after": after})).json()
        schemas.ItemsResponse.model_validate(answer)
        assert answer["total"] == 6
        ids += [item["id"] for item in answer["items"]]
        if (after := answer["next"]) is None:
            break
    assert sorted(ids) == sorted(["a.png", "b/c d.png", "<img src=x>.png", "é?#%.png", "f.png", "g.png"])
    (item,) = client.get("/v1/items", params={"where": "camera = 'front'"}).json()["items"]
    assert (item["id"], item["metadata"]["year"]) == ("a.png", 2024)


def test_every_item_shows_its_thumbnail(client: TestClient) -> None:
    items = client.get("/v1/items").json()["items"]
    contents = set()
    for item in items:
        answer = client.get(item["thumbnail"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp"), item
        assert answer.headers["cache-control"] == "private, no-cache"
        contents.add(answer.content)
        again = client.get(item["thumbnail"], headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert len(contents) == 6
    assert client.get(f"{items[0]['thumbnail']}?side=161").json()["error"]["code"] == "no_such_side"


@pytest.mark.parametrize("id", [*ODD_IDS, "b/nothing.png", "../served index/catalogue.sqlite", "", "a.png/"])
def test_nothing_but_items_has_a_thumbnail(client: TestClient, id: str) -> None:
    sent = asyncio.run(talk(client.app, [], path=thumbnail_address(id), method="GET"))  # type: ignore[arg-type]
    assert sent[0]["status"] == 404
    assert json.loads(sent[1]["body"])["error"]["code"] == "no_such_item"


@pytest.mark.parametrize(
    "path", ["/v1/items/../../etc/passwd/thumbnail", "/v1/items/b/c d.png/thumbnail", "/static/../app.py"]
)
def test_an_address_is_one_segment(client: TestClient, path: str) -> None:
    sent = asyncio.run(talk(client.app, [], path=path, method="GET"))  # type: ignore[arg-type]
    assert sent[0]["status"] == 404


@pytest.mark.parametrize("id", ODD_IDS)
def test_any_id_is_asked_for_in_an_address(open_client: Callable[..., TestClient], monkeypatch: Any, id: str) -> None:
    client = open_client(writable=True)
    collection = client.app.state.serving.collection  # type: ignore[attr-defined]
    deleted: list[str] = []
    monkeypatch.setattr(collection, "writable", True)
    monkeypatch.setattr(collection, "delete", lambda ids: deleted.extend(ids))
    sent = asyncio.run(talk(client.app, [], path=f"/v1/items/{quote(os.fsencode(id), safe='')}", method="DELETE"))  # type: ignore[arg-type]
    assert (sent[0]["status"], deleted) == (200, [id])


def test_ids_and_metadata_of_any_kind_are_answered(client: TestClient, monkeypatch: Any) -> None:
    metadata = {
        "nan": float("nan"),
        "inf": [float("-inf")],
        "huge": 10**5000,
        "half": "\ud800",
        "deep": {"\udcff": None},
    }
    hits = Hits([Hit("a\udcff.png", 0.5, 0.5, None, metadata, path="/x/a\udcff.png")])
    monkeypatch.setattr(
        client.app.state.serving.collection,  # type: ignore[attr-defined]
        "search",
        lambda queries, *_, **__: Found([hits for _ in queries]),
    )
    answer = client.post("/v1/search", json={"text": TEXT})
    (hit,) = answer.json()["results"][0]["hits"]
    assert hit["id"] == "a\udcff.png"
    assert hit["thumbnail"] == "/v1/items/a%FF.png/thumbnail"
    assert (hit["metadata"]["nan"], hit["metadata"]["inf"], hit["metadata"]["half"]) == (None, [None], "\ud800")
    assert json_bytes({"a": 2**63}) == b'{"a":9223372036854775808}'


def test_it_is_read_only_unless_told(client: TestClient) -> None:
    answer = client.post("/v1/items", files=[("image", ("a.png", file_of(picture(9))))])
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "read_only")
    assert client.delete("/v1/items/a.png").status_code == 403
    assert client.get("/v1/info").json()["writable"] is False


def test_a_file_that_is_no_picture_is_told_and_the_others_are_added(checkpoint: Path, tmp_path: Path) -> None:
    sound, large = file_of(picture(1)), file_of(picture(2, (300, 200)))
    files = [
        ("image", (name, content))
        for name, content in [("a.png", sound), ("b.png", b"no picture"), ("c.png", large), ("d.png", sound[:-300])]
    ]
    values = json.dumps([{"place": name} for name in "abcd"])
    settings = ServeSettings(writable=True, limits=Limits(pixels=50_000))
    with Retriever(checkpoint, index=tmp_path / "index", device="cpu", engine="torch") as retriever:
        app = create_app(IndexCollection(retriever, tmp_path / "uploads"), settings)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            answer = client.post("/v1/items", files=files, data={"metadata": values})
            assert answer.status_code == 201
            added = schemas.AddResponse.model_validate(answer.json())
            assert added.added == 1
            assert [(item.name, item.id is None) for item in added.items] == [
                ("a.png", False),
                ("b.png", True),
                ("c.png", True),
                ("d.png", True),
            ]
            assert [bool(item.reason) for item in added.items] == [False, True, True, True]
            assert "at most 50000 pixels" in str(added.items[2].reason)
            (item,) = client.get("/v1/items").json()["items"]
            assert (item["id"], item["metadata"]["place"]) == (added.items[0].id, "a")
            again = client.post("/v1/items", files=files[:2]).json()
            assert (again["added"], again["items"][0]["id"]) == (0, item["id"])

            described = [{"place": "a", "note": "x" * (1 << 20)}, {"place": "b"}]
            answer = client.post("/v1/items", files=files[:2], data={"metadata": json.dumps(described)})
            assert (answer.status_code, answer.json()["items"][0]["id"]) == (201, item["id"]), "metadata of any length"

            none = client.post("/v1/items", files=files[1:])
            assert none.status_code == 400
            assert (none.json()["error"]["code"], none.json()["error"]["param"]) == ("nothing_added", "image")
            assert [item["id"] for item in none.json()["items"]] == [None] * 3
            assert all(f"{name}.png: " in none.json()["error"]["message"] for name in "bcd")
            assert client.get("/v1/info").json()["items"] == 1


# The page and the documentation --------------------------------------------------------------------------------------


def test_what_is_served_is_told(client: TestClient) -> None:
    info = client.get("/v1/info").json()
    schemas.InfoResponse.model_validate(info)
    assert (info["items"], info["context_length"], info["model"], info["warning"]) == (6, 40, "checkpoint", None)
    assert info["limits"]["k"] == 1000


def test_the_limits_that_are_told_are_the_documented_ones(client: TestClient) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert {name: float(value) for name, value in documented.items()} == client.get("/v1/info").json()["limits"]


def test_the_page_and_its_files_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    script = client.get("/static/serve.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/static/serve.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304
    for name in ("serve.html", "nothing.js", "..%2f..%2fapp.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_head_is_answered_as_get_is(client: TestClient) -> None:
    paths = ["/", "/docs", "/static/serve.js", "/openapi.json", "/health/live", "/health/ready", "/metrics"]
    for path in (*paths, "/v1/info", "/v1/items", "/v1/models", "/v1/items/a.png/thumbnail"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"]), path
    assert client.head("/v1/search").status_code == 405
    assert not [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "head" in methods]


def test_the_documentation_comes_from_here_alone(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page.replace("http-equiv", "")
    assert "<script>" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "docs.js"):
        assert f"/static/{name}" in page
        assert client.get(f"/static/{name}").status_code == 200


def test_every_route_is_documented(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    routes = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert routes >= {
        ("post", "/v1/search"),
        ("post", "/v1/items"),
        ("delete", "/v1/items/{id}"),
        ("get", "/v1/items/{id}/thumbnail"),
        ("post", "/v1/embeddings"),
        ("get", "/health/ready"),
    }
    assert "422" not in json.dumps(schema)
    references = set(json.dumps(schema).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(schema["components"]["schemas"])
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            assert route.get("description"), (path, method)
            if path.startswith("/v1/"):
                assert "FaultResponse" in json.dumps(route["responses"]["400"])


def test_every_example_is_answered(client: TestClient) -> None:
    bodies = {
        path: methods["post"]["requestBody"]["content"].get("application/json")
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        if "post" in methods
    }
    assert [path for path, body in bodies.items() if body is None] == ["/v1/items"]
    for path, body in bodies.items():
        for example in body["examples"].values() if body else ():
            answer = client.post(path, json=example["value"])
            assert answer.status_code == 200, (example, answer.text)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/search", 405), ("GET", "/v2", 404), ("PUT", "/", 405)]
)
def test_what_there_is_not_is_refused_in_the_same_shape(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, set(answer.json())) == (status, {"error"})
