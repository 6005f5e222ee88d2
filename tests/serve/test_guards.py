"""Authorisation, rate and time limits; and headers, logs and metrics of every response."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from finelip_fast.errors import InputError, StoreError
from finelip_fast.serve import health
from finelip_fast.serve.batching import Overloaded
from finelip_fast.serve.guards import check_exposure, host_name
from finelip_fast.serve.settings import Limits, ServeSettings

from .asgi import part, talk

KEY = "a-key-of-some-length"
SEARCH = {"text": "a red house", "k": 2}
OpenClient = Callable[..., TestClient]


def fault(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


CHUNKED = [(b"transfer-encoding", b"chunked")]


# Who may ask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "a b", "localhost@evil", "[::1"]
)
def test_another_name_is_refused(client: TestClient, host: str) -> None:
    fault(client.get("/v1/info", headers={"Host": host}), 421, "wrong_host")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "photos.example", "localhost."]
)
def test_its_own_names_are_not(open_client: OpenClient, host: str) -> None:
    client = open_client(hosts=("photos.example",))
    assert client.get("/v1/info", headers={"Host": host}).status_code == 200


def test_any_address_will_do_where_all_are_listened_on(open_client: OpenClient) -> None:
    client = open_client(host="0.0.0.0", api_key=KEY)
    answers = [client.get("/health/live", headers={"Host": host}) for host in ("192.168.0.7:8000", "evil.example")]
    assert [answer.status_code for answer in answers] == [200, 421]


def test_names_are_read_out_of_headers() -> None:
    assert [host_name(host) for host in ("A.b:80", "[::1]:80", "a:b", "a:1:2", "")] == ["a.b", "::1", None, None, None]


def test_a_strange_page_can_neither_write_nor_read(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "https://127.0.0.1:8001"):
        fault(client.post("/v1/search", json=SEARCH, headers={"Origin": origin}), 403, "cross_site")
    answer = client.get("/v1/info", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    fault(client.options("/v1/search", headers=preflight), 405, "method")
    assert client.post("/v1/search", json=SEARCH, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


def test_a_named_page_can(open_client: OpenClient) -> None:
    origin = "https://pages.example"
    client = open_client(origins=(origin,), api_key=KEY)
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = client.options("/v1/search", headers=preflight)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == origin
    headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
    answer = client.post("/v1/search", json=SEARCH, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    answer = client.get("/v1/info", headers={"Origin": origin})
    assert answer.status_code == 401  # the page can read the status
    assert answer.headers["access-control-allow-origin"] == origin


def test_a_key_opens(open_client: OpenClient) -> None:
    client = open_client(api_key=KEY)
    for path in ("/v1/info", "/metrics", "/v1/items", "/nowhere"):
        for headers in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": "Bearer é"},
        ):
            answer = client.get(path, headers={name: value.encode() for name, value in headers.items()})
            assert fault(answer, 401, "invalid_api_key")["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
    assert client.get("/v1/info", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
    for path in ("/health/live", "/health/ready", "/docs", "/openapi.json", "/static/style.css"):
        assert client.get(path).status_code == 200, path


def test_others_reach_it_only_with_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(InputError, match="expected an API key to listen on"):
            check_exposure(ServeSettings(host=host))
        check_exposure(ServeSettings(host=host, api_key=KEY))
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        check_exposure(ServeSettings(host=host))
    for key in ("", "short", "a key with some spaces", "schlüssel-von-zwanzig"):
        with pytest.raises(InputError, match="printable ASCII"):
            check_exposure(ServeSettings(api_key=key))
    assert KEY not in repr(ServeSettings(api_key=KEY))


# What every answer says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/info", "/nowhere", "/docs", "/static/style.css", "/health/live"])
def test_every_answer_tells_browsers_to_be_strict(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


def test_a_request_keeps_its_id(client: TestClient) -> None:
    assert client.get("/health/live", headers={"X-Request-ID": "a.B-1_"}).headers["x-request-id"] == "a.B-1_"
    for strange in ("a b", "x" * 129, "<b>", ""):
        assert len(client.get("/health/live", headers={"X-Request-ID": strange}).headers["x-request-id"]) == 32
    answer = client.post("/v1/search", json=SEARCH)
    assert [stage.split(";")[0] for stage in answer.headers["server-timing"].split(", ")] == [
        "encode",
        "search",
        "total",
    ]


def test_the_log_has_a_line_a_request_without_what_was_searched(open_client: OpenClient, caplog: Any) -> None:
    def lines(client: TestClient) -> list[dict[str, Any]]:
        caplog.clear()
        client.post("/v1/search?secret=1", json=SEARCH, headers={"X-Request-ID": "me"})
        client.get("/nowhere")
        return [json.loads(record.message) for record in caplog.records if record.name.endswith("access")]

    with caplog.at_level(logging.INFO, "finelip_fast.serve.access"):
        searched, nowhere = lines(open_client())
        assert {key: searched[key] for key in ("method", "path", "status", "request_id")} == {
            "method": "POST",
            "path": "/v1/search",
            "status": 200,
            "request_id": "me",
        }
        assert (nowhere["status"], nowhere["code"]) == (404, "no_such_route")
        assert "red house" not in caplog.text
        assert lines(open_client(log_queries=True))[0]["queries"] == [SEARCH["text"]]


def test_a_mistake_of_ours_is_told_to_the_log_alone(client: TestClient, caplog: Any, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret of /etc")

    monkeypatch.setattr(client.app.state.serving.pipeline, "search", fail)
    answer = client.post("/v1/search", json=SEARCH, headers={"X-Request-ID": "broken"})
    assert fault(answer, 500, "internal")["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert any("broken" in record.message and record.exc_info for record in caplog.records)
    monkeypatch.undo()
    assert client.post("/v1/search", json=SEARCH).status_code == 200


def test_a_damaged_index_is_the_operators_to_know(client: TestClient, caplog: Any, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("segment /home/me/index/7 is damaged")

    monkeypatch.setattr(client.app.state.serving.collection, "search", fail)
    answer = client.post("/v1/search", json=SEARCH)
    fault(answer, 503, "unavailable")
    assert "/home" not in answer.text
    assert "segment /home/me/index/7 is damaged" in caplog.text
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "failing"})


# How much, and for how long ------------------------------------------------------------------------------------------


def test_bounds_are_told(open_client: OpenClient) -> None:
    limits = Limits(texts=2, characters=9, k=10, where=9, images=1, pixels=100, items=3, body=50_000)
    client = open_client(limits=limits)

    def refused(status: int, code: str, values: dict[str, Any]) -> str:
        return str(fault(client.post("/v1/search", json=values), status, code)["message"])

    assert "at most 2 texts" in refused(413, "too_many", {"text": ["a"] * 3})
    assert "at most 9 characters" in refused(400, "text_too_long", {"text": "a" * 10})
    assert "at most 10, got 11" in refused(400, "k_too_large", {"text": "a", "k": 6, "offset": 5})
    assert "at most 9 characters" in refused(400, "filter_too_long", {"text": "a", "where": "x" * 10})
    assert "at most 50000 bytes" in refused(413, "body_too_large", {"text": "a" * 60_000})
    fault(client.get("/v1/items?limit=4"), 400, "limit_too_large")
    fault(client.get("/v1/items?limit=x"), 400, "invalid_request")


def test_a_body_without_a_length_is_bounded_too(open_client: OpenClient) -> None:
    client = open_client(limits=Limits(body=1000))

    def chunks() -> Any:
        for _ in range(100):
            yield b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}'

    answer = client.post("/v1/search", content=chunks(), headers={"Content-Type": "application/json"})
    fault(answer, 413, "body_too_large")


def test_refused_bodies_leave_their_room(open_client: OpenClient) -> None:
    """Memory grows with refused requests in other servers."""
    client = open_client(limits=Limits(body=1000))
    headers = {"Content-Type": "application/json"}
    for body in (b"x" * 900, b"x" * 2000, b'{"text": 3}' + b" " * 800):
        for _ in range(20):
            assert client.post("/v1/search", content=body, headers=headers).status_code in (400, 413)
    assert client.post("/v1/search", json=SEARCH).status_code == 200


def test_more_than_fits_waits_outside(open_client: OpenClient) -> None:
    app = open_client(limits=Limits(body=1000, body_seconds=0.5)).app

    async def run() -> list[int]:
        held = [asyncio.ensure_future(talk(app, [part(b"x" * 990)], headers=CHUNKED)) for _ in range(4)]
        await asyncio.sleep(0.1)
        sent = await talk(app, [part(b"x" * 990), part(b"", more_body=False)], headers=CHUNKED)
        assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
        return [sent[0]["status"], *(messages[0]["status"] for messages in await asyncio.gather(*held))]

    assert asyncio.run(run()) == [429, 408, 408, 408, 408]


def test_a_body_that_comes_slowly_is_given_up(open_client: OpenClient) -> None:
    app = open_client(limits=Limits(body_seconds=0.2)).app
    sent = asyncio.run(talk(app, [part(b"{"), 0.15, part(b'"text"'), 0.15, part(b":")], headers=CHUNKED))
    assert sent[0]["status"] == 408
    assert dict(sent[0]["headers"])[b"connection"] == b"close"
    assert json.loads(sent[1]["body"])["error"]["type"] == "timeout_error"


def test_a_client_that_goes_away_frees_its_place(open_client: OpenClient, monkeypatch: Any) -> None:
    app: Any = open_client().app
    begun, ended = asyncio.Event(), []

    async def embed(*_: Any, **__: Any) -> Any:
        begun.set()
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    monkeypatch.setattr(app.state.serving.pipeline, "embed_texts", embed)
    body = json.dumps(SEARCH).encode()
    for messages in (
        [part(body, more_body=False), begun, {"type": "http.disconnect"}],
        [part(body[:5]), {"type": "http.disconnect"}],
    ):
        assert asyncio.run(asyncio.wait_for(talk(app, messages, headers=CHUNKED), 300)) == []
    assert ended == ["cancelled"]


def test_a_request_has_a_deadline(open_client: OpenClient, monkeypatch: Any) -> None:
    client = open_client(timeout=0.1)
    server = client.app.state.serving  # pyright: ignore

    async def embed(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(300)

    monkeypatch.setattr(server.pipeline, "embed_texts", embed)
    assert fault(client.post("/v1/search", json=SEARCH), 504, "deadline")["type"] == "timeout_error"
    server.settings = replace(server.settings, timeout=300)  # what follows is not refused for being slow
    assert client.get("/v1/info").status_code == 200


# Health and metrics --------------------------------------------------------------------------------------------------


def test_ready_means_that_it_searches(client: TestClient, monkeypatch: Any) -> None:
    searches: list[Any] = []
    search = client.app.state.serving.collection.search  # pyright: ignore
    monkeypatch.setattr(
        client.app.state.serving.collection,  # pyright: ignore
        "search",
        lambda *words, **options: searches.append(words) or search(*words, **options),
    )
    monkeypatch.setattr(health, "_SECONDS", 3600.0)
    for _ in range(5):
        assert client.get("/health/ready").json() == {"status": "ready"}
    assert len(searches) == 1
    client.app.state.serving.state = "draining"  # pyright: ignore
    assert client.get("/health/ready").json() == {"status": "draining"}
    fault(client.post("/v1/search", json=SEARCH), 503, "not_ready")
    assert client.get("/health/live").status_code == 200


def test_a_full_queue_is_no_failure(client: TestClient, monkeypatch: Any, caplog: Any) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise Overloaded("expected at most 256 items in the queue", 3)

    monkeypatch.setattr(client.app.state.serving.pipeline, "embed_texts", refuse)  # pyright: ignore
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json(), "Retry-After" in answer.headers) == (503, {"status": "full"}, True)
    assert "not ready" not in caplog.text


def test_it_is_warm_before_it_answers(open_client: OpenClient, retriever: Any, monkeypatch: Any) -> None:
    """The first search times out in other servers because the model is not loaded yet."""
    calls: list[str] = []
    for name in ("encode_text", "encode_image"):
        original = getattr(retriever.engine, name)
        monkeypatch.setattr(
            retriever.engine, name, lambda x, name=name, original=original: calls.append(name) or original(x)
        )
    open_client()
    assert {"encode_text", "encode_image"} <= set(calls)


def test_metrics_count_what_happens(client: TestClient) -> None:
    client.post("/v1/search", json=SEARCH)
    client.post("/v1/search", json={"text": 3})
    client.get("/v1/items/x/thumbnail")
    text = client.get("/metrics").text
    assert 'finelip_request_seconds_count{method="POST",route="/v1/search",status="200"} 1.0' in text
    assert 'finelip_request_seconds_count{method="GET",route="/v1/items/{id:path}/thumbnail",status="404"} 1.0' in text
    assert 'finelip_refusals_total{code="invalid_request"} 1.0' in text
    assert 'finelip_stage_seconds_count{route="/v1/search",stage="encode"} 1.0' in text
    assert "finelip_items 6.0" in text
    assert 'finelip_info{engine="torch' in text
    assert "finelip_in_flight 1.0" in text  # this very request
