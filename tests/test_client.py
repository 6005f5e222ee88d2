"""The client of a server: its requests, its handling of responses, and its behaviour if there are none."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast import AsyncClient, Client, Hits, ImageError, InputError, ServerError
from finelip_fast.client import RemoteItem

URL = "http://127.0.0.1:8000"
HIT = {
    "id": "a/ä.png",
    "score": 0.9,
    "global_score": 0.8,
    "fine_score": None,
    "stands_out": 0.95,
    "verdict": "stands out",
    "metadata": {"camera": "front"},
    "mode": "exact",
    "path": "/photos/a/ä.png",
    "thumbnail": "/v1/items/a%2F%C3%A4.png/thumbnail",
    "shard": None,
}


def result(*hits: dict[str, Any], cut: int = 0) -> dict[str, Any]:
    return {"hits": list(hits), "note": None, "tokens": 300, "tokens_cut": cut}


def searched(*results: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"results": list(results), "covered": 1.0, "missing": {}, **values}


def refused(status: int, message: str = "expected this, got that", headers: Any = None) -> httpx2.Response:
    fault = {"message": message, "type": "t", "code": "short", "param": None, "request_id": "abc"}
    return httpx2.Response(status, json={"error": fault}, headers={"X-Request-ID": "abc", **(headers or {})})


class Server:
    """Respond with each answer in turn, then repeat the last one."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx2.Response):  # copied because a response can be read only once
            return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)
        return httpx2.Response(200, json=answer)

    def body(self, number: int = -1) -> Any:
        return json.loads(self.requests[number].content)


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a function that calls a client method by name, for both the sync and the async client."""
    monkeypatch.delenv("FINELIP_API_KEY", raising=False)
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    def call(server: Server, name: str, *arguments: Any, **options: Any) -> Any:
        server.pauses = pauses
        if request.param == "sync":
            with Client(URL, **options.pop("client", {})) as client:
                client._http._transport = httpx2.MockTransport(server)
                value = getattr(client, name)(*arguments, **options)
                return list(value) if name == "items" else value

        async def run() -> Any:
            async with AsyncClient(URL, **options.pop("client", {})) as client:
                client._http._transport = httpx2.MockTransport(server)
                value = getattr(client, name)(*arguments, **options)
                return [item async for item in value] if name == "items" else await value

        with monkeypatch.context() as patch:
            patch.setattr("finelip_fast.client.clients.asyncio.sleep", sleep)
            return asyncio.run(run())

    return call


def test_a_search_gives_hits_as_a_retriever_does(ask) -> None:
    server = Server(searched(result(HIT)))
    hits = ask(server, "search", "a house", k=np.int64(3), where="camera = 'front'", alpha=0.5)
    assert isinstance(hits, Hits)
    assert hits[0].verdict == "stands out"
    assert (hits[0].id, hits[0].fine_score, hits[0].metadata) == ("a/ä.png", None, {"camera": "front"})
    assert str(server.requests[0].url) == f"{URL}/v1/search"
    assert server.body() == {
        "text": ["a house"],
        "k": 3,
        "mode": "auto",
        "where": "camera = 'front'",
        "alpha": 0.5,
    }


def test_many_queries_are_sent_in_parts(ask) -> None:
    server = Server(searched(*[result(HIT)] * 64), searched(*[result()] * 6))
    hits = ask(server, "search", ["a house"] * 70)
    assert [len(answer) for answer in hits] == [1] * 64 + [0] * 6
    assert [len(server.body(number)["text"]) for number in (0, 1)] == [64, 6]
    assert ask(server, "search", []) == []
    assert len(server.requests) == 2


def test_several_queries_come_in_any_iterable(ask) -> None:
    for texts in (iter(["a", "b"]), np.array(["a", "b"])):
        server = Server(searched(result(HIT), result()))
        assert [len(hits) for hits in ask(server, "search", texts)] == [1, 0]
        assert server.body()["text"] == ["a", "b"]


def test_a_closed_client_says_so() -> None:
    with Client(URL) as client:
        pass
    for use in (lambda: client.search("a house"), client.info, client.__enter__):
        with pytest.raises(ServerError, match=rf"this client of {URL} is closed: open another, Client\('{URL}'\)"):
            use()


def test_pictures_are_sent_whole(ask, tmp_path: Path) -> None:
    image = Image.new("RGBA", (5, 3), (200, 10, 10, 128))
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    server = Server(searched(*[result(HIT)] * 4))
    turned = Image.new("CMYK", (5, 3))
    turned.getexif()[0x0112] = 6  # a quarter turn
    ask(server, "search", image=[tmp_path / "a.png", str(tmp_path / "a.png"), content, turned])
    *files, drawn = (base64.b64decode(text) for text in server.body()["image"])
    assert files == [content] * 3
    assert Image.open(io.BytesIO(drawn)).size == (3, 5)
    assert isinstance(ask(Server(searched(result(HIT))), "search", image=image), Hits)
    for source in (tmp_path / "none.png", np.zeros((3, 3)), tmp_path):
        with pytest.raises(ImageError):
            ask(server, "search", image=source)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "I", "I;16", "I;16B", "F"]
)
def test_a_picture_of_any_mode_has_the_pixels_that_a_retriever_sees(ask, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8), "RGBA")
    if mode in ("I", "I;16", "I;16B", "F"):
        values = np.arange(0, 64_000, 1000).reshape(8, 8)
        image = Image.fromarray(values.astype(np.int32) if mode != "F" else (values / 64_000).astype(np.float32))
        image = image if mode in ("I", "F") else image.convert("I;16")
        if mode == "I;16B":
            image = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    elif mode in ("La", "PA"):
        image = image.convert("LA").convert(mode)
    elif mode != "RGBA":
        image = image.convert({"RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    assert image.mode == mode
    image.getexif()[0x0112] = 6  # a quarter turn
    server = Server(searched(result(HIT)))
    ask(server, "search", image=image)
    received = finelip_fast.open_image(base64.b64decode(server.body()["image"][0]))
    np.testing.assert_array_equal(np.asarray(received), np.asarray(finelip_fast.open_image(image)))


def test_a_picture_that_cannot_be_read_ends_no_upload(ask) -> None:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(content, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    broken_exif = Image.open(io.BytesIO(content.getvalue()))
    truncated = Image.open(io.BytesIO(content.getvalue()[:5000]))
    out_of_range = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    item = {"id": "a.png", "name": "a.png", "reason": None}
    server = Server(httpx2.Response(201, json={"added": 1, "items": [item]}))
    report = ask(server, "add_images", [truncated, broken_exif, out_of_range])
    assert report.added == ["a.png"]
    (first, second) = report.skipped
    assert first[0] == "image-0"
    assert re.match("cannot read PIL image of mode RGB: .*truncated", first[1])
    assert "convert them to uint8" in second[1]
    assert b'filename="image-1"' in server.requests[0].content
    with pytest.raises(ImageError, match="cannot read PIL image of mode RGB"):
        ask(server, "search", image=Image.open(io.BytesIO(content.getvalue()[:5000])))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "expected either text or image"),
        (("a",), {"image": b"x"}, "got both"),
        (("a",), {"k": 0}, "expected k of at least 1"),
        (("a",), {"alpha": float("nan")}, "expected alpha in"),
        (({1},), {}, "expected text of type str, got 1"),
        ((5,), {}, "expected text of type str, got 5"),
        (({"a": 1},), {}, "expected text to be a list, got {'a': 1}"),
    ],
)
def test_what_is_known_to_be_wrong_is_not_sent(ask, arguments: Any, options: Any, message: str) -> None:
    server = Server(searched())
    with pytest.raises(InputError, match=message):
        ask(server, "search", *arguments, **options)
    assert not server.requests


def test_cut_texts_and_missing_shards_are_told(ask) -> None:
    with pytest.warns(finelip_fast.TruncationWarning, match="1 of 2 texts .* 17 tokens") as caught:
        ask(Server(searched(result(HIT), result(HIT, cut=17))), "search", ["a", "b"])
    assert caught[0].filename == __file__
    missing = searched(result(HIT), covered=0.5, missing={"/data/b": "no answer"})
    with pytest.warns(finelip_fast.PartialAnswerWarning, match=r"50.0% of the items.*/data/b: no answer"):
        ask(Server(missing), "search", "a")


def test_arrays_come_back_as_they_were(ask) -> None:
    expected = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("<f4")
    data = [
        {"object": "embedding", "index": n, "embedding": base64.b64encode(rows).decode(), "shape": [3, 4]}
        for n, rows in enumerate(expected)
    ]
    server = Server({"data": data})
    embeddings = ask(server, "encode_texts", ["a", "b"])
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, expected)
    assert server.body() == {"input": ["a", "b"], "encoding_format": "base64", "multi_vector": True}
    assert ask(server, "encode_images", [b"1", b"2"], batch_size=2).shape == (2, 3, 4)
    assert server.body()["input"] == [{"image": "MQ=="}, {"image": "Mg=="}]
    assert ask(server, "encode_texts", []).shape == (0, 0, 0)


def test_scores_of_many_pairs_are_one_matrix(ask) -> None:
    expected = np.arange(66 * 65, dtype=np.float32).reshape(66, 65)

    def part(rows: slice, columns: slice) -> dict[str, Any]:
        return {"scores": expected[rows, columns].tolist()}

    halves = (slice(0, 64), slice(64, None))
    server = Server(*(part(rows, columns) for rows in halves for columns in halves))
    assert np.array_equal(ask(server, "score", [b"x"] * 66, ["a"] * 65), expected)


def test_an_explanation_is_of_a_picture_or_a_hit(ask) -> None:
    server = Server({"score": 0.5})
    hits = ask(Server(searched(result(HIT))), "search", "a house")
    assert ask(server, "explain", hits[0], "a house") == {"score": 0.5}
    assert server.body() == {"text": "a house", "item": "a/ä.png"}
    ask(server, "explain", b"x", "a house")
    assert server.body() == {"text": "a house", "image": "eA=="}


def test_pictures_are_added(ask, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    items = [
        {"id": "a.png", "name": "a.png", "reason": None},
        {"id": None, "name": "b.png", "reason": "cannot read b.png"},
    ]
    server = Server(httpx2.Response(201, json={"added": 1, "items": items}))
    report = ask(server, "add_images", tmp_path, metadata=[{"n": 1}, {"n": 2}])
    assert report.added == ["a.png"]
    assert report.skipped == [("b.png", "cannot read b.png")]
    body = server.requests[0].content
    for part in (b'filename="a.png"', b'[{"n": 1}, {"n": 2}]'):
        assert part in body
    missing = ask(server, "add_images", [tmp_path / "none.png"])
    assert (missing.added, missing.skipped[0][0]) == ([], "none.png")
    assert len(server.requests) == 1, "a picture that cannot be read here is not sent"
    refused = {"error": {"message": "cannot read b.png"}, "added": 0, "items": items[1:]}
    server = Server(httpx2.Response(201, json={"added": 1, "items": items[:1]}), httpx2.Response(400, json=refused))
    report = ask(server, "add_images", tmp_path, batch_size=1)
    assert (report.added, report.skipped) == (["a.png"], [("b.png", "cannot read b.png")])
    with pytest.raises(InputError, match="expected metadata for 2 pictures, got 1"):
        ask(server, "add_images", [b"1", b"2"], metadata=[{}])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refused(400, "expected metadata to be an object"), "expected metadata to be an object"),
        (refused(413, "expected at most 64 files; send fewer"), "expected at most 64 files; send fewer"),
        (refused(415, "expected Content-Type multipart/form-data"), "expected Content-Type multipart/form-data"),
    ],
)
def test_a_refused_upload_is_an_input_error(ask, answer: httpx2.Response, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ask(Server(answer), "add_images", [b"1"], metadata=[{}])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "path"),
    [("a/b c.png", "a%2Fb%20c%2Epng"), ("..", "%2E%2E"), ("ä?#", "%C3%A4%3F%23"), ("a\udcff", "a%FF")],
)
def test_an_id_is_one_segment_of_a_path(ask, name: str, path: str) -> None:
    server = Server({"removed": 1})
    ask(server, "delete", name)
    assert server.requests[0].url.raw_path.decode() in (f"/v1/items/{path}", f"/v1/items/{path.replace('%2E', '.')}")
    assert not server.requests[0].url.raw_path.endswith(b"/..")
    for wrong in ("", 3, "\ud800"):
        with pytest.raises(InputError, match="expected ids"):
            ask(server, "delete", [wrong])


def test_what_no_address_can_hold_is_an_input_error(ask) -> None:
    server = Server({"removed": 1})
    with pytest.raises(
        InputError, match=r"expected an id, a filter or a cursor that fits into an address.*; shorten it"
    ):
        ask(server, "delete", "x" * 100_000)
    assert not server.requests


def test_items_are_listed_page_by_page(ask) -> None:
    stored = {"id": "a", "metadata": {"n": 1}, "path": None, "thumbnail": None}
    server = Server(
        {"items": [stored], "total": 2, "next": "after a"}, {"items": [{**stored, "id": "b"}], "total": 2, "next": None}
    )
    assert ask(server, "items", where="n = 1") == [RemoteItem("a", {"n": 1}, None), RemoteItem("b", {"n": 1}, None)]
    assert [dict(request.url.params) for request in server.requests] == [
        {"where": "n = 1"},
        {"where": "n = 1", "after": "after a"},
    ]


@pytest.mark.parametrize("status", [400, 404, 413, 415])
def test_what_a_server_refuses_is_an_input_error(ask, status: int) -> None:
    with pytest.raises(InputError, match="expected this, got that"):
        ask(Server(refused(status)), "search", "a")


@pytest.mark.parametrize(("status", "remedy"), [(401, "FINELIP_API_KEY"), (403, "--writable"), (500, "expected this")])
def test_other_refusals_say_what_to_do(ask, status: int, remedy: str) -> None:
    with pytest.raises(ServerError, match=f"expected this, got that.*{remedy}|{remedy}") as caught:
        ask(Server(refused(status)), "search", "a")
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (status, "short", "abc")


def test_a_full_server_is_asked_again_when_it_says(ask) -> None:
    server = Server(
        refused(429, headers={"Retry-After": "1"}), refused(503, headers={"Retry-After": "2"}), {"items": 3}
    )
    assert ask(server, "info") == {"items": 3}
    assert [pause for pause in server.pauses if pause] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "name", "requests"),
    [
        (refused(429, headers={"Retry-After": "1"}), "info", 3),
        (refused(503, headers={"Retry-After": "3600"}), "info", 1),
        (refused(503, headers={"Retry-After": "soon"}), "info", 1),
        (refused(503), "info", 1),
        (refused(500, headers={"Retry-After": "1"}), "info", 1),
        (refused(429, headers={"Retry-After": "1"}), "delete", 1),
        (refused(429, headers={"Retry-After": "1"}), "add_images", 1),
    ],
)
def test_asking_again_is_bounded_and_changes_nothing(ask, answer: Any, name: str, requests: int) -> None:
    server = Server(answer)
    arguments: dict[str, tuple[Any, ...]] = {"delete": ("a",), "add_images": ([b"x"],)}
    with pytest.raises(ServerError):
        ask(server, name, *arguments.get(name, ()))
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(200, text="<html>hello</html>"),
        httpx2.Response(502, text="bad gateway"),
        httpx2.Response(302, headers={"location": "http://elsewhere/"}),
        httpx2.Response(200, json=[1]),
        httpx2.Response(500, json={"error": "a text"}),
        {"results": [{}]},
        searched(),
        {},
    ],
)
def test_another_server_is_told_from_ours(ask, answer: Any) -> None:
    server = Server(answer)
    with pytest.raises(ServerError, match="expected the answer of finelip serve"):
        ask(server, "search", "a")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (httpx2.ConnectError("refused"), "no server answers at .*refused.*start it with finelip serve"),
        (httpx2.ReadTimeout(""), "did not answer within 7 seconds"),
        (httpx2.RemoteProtocolError("gone"), "broke: gone"),
    ],
)
def test_a_connection_that_fails_is_explained(ask, fault: Exception, message: str) -> None:
    server = Server(fault)
    with pytest.raises(ServerError, match=message) as caught:
        ask(server, "search", "a", client={"timeout": 7})
    assert caught.value.status is None
    assert len(server.requests) == 1


def test_the_key_is_sent_and_never_shown(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server({})
    monkeypatch.setenv("FINELIP_API_KEY", "from-the-environment")
    ask(server, "info")
    ask(server, "info", client={"api_key": "from-an-argument"})
    assert [request.headers["authorization"] for request in server.requests] == [
        "Bearer from-the-environment",
        "Bearer from-an-argument",
    ]
    client = Client(URL, api_key="from-an-argument")
    assert "argument" not in repr(client)
    assert b"from-an-argument" in pickle.dumps(client)
    assert b"environment" not in pickle.dumps(Client(URL))
    again = pickle.loads(pickle.dumps(client))
    assert (again.url, again.timeout, again._http.headers["authorization"]) == (URL, 30, "Bearer from-an-argument")
    for wrong in ("a b", "ä", "", 3, "a\nb"):
        with pytest.raises(InputError, match="expected api_key"):
            Client(URL, api_key=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "localhost",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a/?q=1",
        "http://a b",
        3,
        None,
        "http://u:p@a",
        "http://[::1",
        "http://a\n",
    ],
)
def test_an_address_that_is_none_is_refused(url: Any) -> None:
    with pytest.raises(InputError, match=r"such as http://127\.0\.0\.1:8000"):
        Client(url)


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:1/x", "http://127.0.0.1:1/x"),
        ("ftp://a", ""),
        ("a b", ""),
    ],
)
def test_an_address_without_a_scheme_is_completed_in_the_error(url: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        Client(url)
    assert str(caught.value).endswith(f"got {url!r}" + (near and f"; did you mean {near}?"))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "3", True])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InputError, match="expected timeout"):
        AsyncClient(URL, timeout=timeout)


@pytest.mark.parametrize(
    ("url", "trusted"),
    [(URL, False), ("http://localhost:1", False), ("http://[::1]:1", False), ("https://a.example", True)],
)
def test_a_proxy_of_the_environment_gets_nothing_of_this_machine(
    url: str, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    with Client(url) as client:
        assert client._http.trust_env is trusted
        assert bool(client._http._mounts) is trusted


def test_a_prefix_of_the_address_is_kept() -> None:
    server = Server({})
    with Client("http://127.0.0.1:8000/photos/") as client:
        client._http._transport = httpx2.MockTransport(server)
        client.info()
    assert str(server.requests[0].url) == "http://127.0.0.1:8000/photos/v1/info"


def test_a_client_imports_no_pytorch() -> None:
    code = "import sys, finelip_fast; finelip_fast.Client('http://a'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True) == "False False\n"
