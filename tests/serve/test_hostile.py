"""Two thousand hostile requests: none gets a 500, and afterwards the server answers as before."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from .asgi import encoded, file_of, picture, talk

REQUESTS = 2000
HEADERS = [
    b"authorization",
    b"content-length",
    b"content-type",
    b"cookie",
    b"expect",
    b"if-none-match",
    b"origin",
    b"range",
    b"transfer-encoding",
    b"x-forwarded-for",
    b"x-request-id",
]
TEXTS = [
    "",
    "a",
    "\x00",
    "\ud800",
    "‮",
    "a" * 30_000,
    "../" * 50,
    "'; drop table items; --",
    "%",
    "{{7*7}}",
    "<script>",
    "🏠" * 999,
]
WHERES = [
    "camera = 'front'",
    "a" * 5000,
    "(" * 500,
    "not " * 300 + "a = 1",
    "a = 1e999",
    "a in ()",
    "'",
    "year >= ",
    "a.b.c = null",
]
NUMBERS = [0, -1, 1, 3, 10**9, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, True, None]
PATHS = [
    "/v1/search",
    "/v1/score",
    "/v1/explain",
    "/v1/tokens",
    "/v1/embeddings",
    "/v1/items",
    "/v1/models/a",
    "/v1/info",
]
ASKED = [
    "/",
    "/docs",
    "/static/",
    "/static/serve.js",
    "/metrics",
    "/health/ready",
    "/openapi.json",
    "/v1",
    "/v1/items//thumbnail",
    "*",
]


class Attacker:
    """A seeded generator of requests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        image = encoded(picture(1))
        self._pictures = [
            image,
            image[:90],
            "data:image/png;base64," + image,
            "http://localhost/a.png",
            "file:///etc/passwd",
            "====",
        ]

    def value(self, depth: int = 0) -> Any:
        pick = self._random.choice
        kind = self._random.randrange(8 if depth < 3 else 5)
        if kind < 5:
            return pick(
                [
                    pick(TEXTS),
                    pick(WHERES),
                    pick(NUMBERS),
                    pick(self._pictures),
                    pick(["auto", "exact", "base64", "a.png"]),
                ]
            )
        if kind == 5:
            return [self.value(depth + 1) for _ in range(self._random.randrange(4))]
        if kind == 6:
            return {self.word(): self.value(depth + 1) for _ in range(self._random.randrange(4))}
        return [self.value(depth + 1)] * pick([1, 3, 300])

    def word(self) -> str:
        words = [
            "text",
            "image",
            "item",
            "k",
            "offset",
            "mode",
            "where",
            "alpha",
            "images",
            "texts",
            "input",
            "model",
            "dimensions",
        ]
        return self._random.choice([*words, "encoding_format", "multi_vector", "metadata", "id", "__class__", ""])

    def bytes(self, most: int = 60) -> bytes:
        return self._random.randbytes(self._random.randrange(most))

    def damaged(self, content: bytes) -> bytes:
        for _ in range(self._random.choice([0, 0, 1, 3])):
            at = self._random.randrange(len(content) + 1)
            content = content[:at] + self.bytes(5) + content[at + self._random.randrange(6) :]
        return content

    def form(self) -> tuple[bytes, bytes]:
        parts = []
        for _ in range(self._random.randrange(1, 6)):
            name = self._random.choice([self.word().encode(), self.bytes(9), b"image"])
            file = self._random.choice([b"", b'; filename="x.png"', b'; filename="../../x"', b"; filename*=UTF-8''%ff"])
            content = self._random.choice(
                [self.bytes(200), file_of(picture(2)), str(self.value(2)).encode("utf-8", "replace")]
            )
            parts.append(
                b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + file + b"\r\n\r\n" + content + b"\r\n"
            )
        return b"multipart/form-data; boundary=" + self._random.choice([b"B", b"B", b"C", b""]), b"".join(
            [*parts, b"--B--\r\n"]
        )

    def path(self) -> bytes:
        kind = self._random.randrange(6)
        if kind == 0:
            return (
                b"/v1/items/"
                + self.bytes(30).hex("%").encode()
                + self._random.choice([b"", b"/thumbnail", b"/thumbnail/", b"%2Fthumbnail"])
            )
        if kind == 1:
            odd = ["%", "%zz", "..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a.png", "x" * 5000, "%2e%2e", "a/b", ""]
            return f"/v1/items/{self._random.choice(odd)}/thumbnail".encode()
        if kind == 2:
            return self._random.choice(ASKED).encode()
        return self._random.choice(PATHS).encode()

    def query(self) -> bytes:
        names = [b"side", b"limit", b"after", b"where", b"x", b""]
        pairs = [
            self._random.choice(names)
            + b"="
            + self._random.choice([b"1", b"-1", b"160", b"", b"%ff", b"%00", b"9" * 30, self.bytes(9)])
        ]
        return b"&".join(pairs * self._random.randrange(3))

    def request(self) -> tuple[list[Any], dict[str, Any]]:
        """Return messages and scope in the form that :func:`talk` takes."""
        content_type = self._random.choice([b"application/json"] * 6 + [b"text/html", b"", self.bytes(9)])
        if self._random.randrange(4) == 0:
            content_type, body = self.form()
        else:
            body = json.dumps({self.word(): self.value() for _ in range(self._random.randrange(4))}).encode()
        if self._random.randrange(40) == 0:
            body = self._random.choice([b"[" * 50_000, b'{"a":' * 9000, b"9" * 9000, b"\xef\xbb\xbf{}", b"NaN"])
        body = self.damaged(body)
        headers = [(self._random.choice(HEADERS), self.bytes(20)) for _ in range(self._random.randrange(3))]
        headers = [*headers, (b"content-type", content_type), (b"transfer-encoding", b"chunked")]
        cut = self._random.randrange(len(body) + 1)
        messages = [
            {"type": "http.request", "body": body[:cut], "more_body": True},
            {"type": "http.request", "body": body[cut:], "more_body": False},
        ]
        if self._random.randrange(25) == 0:
            messages[self._random.randrange(1, 3) :] = [{"type": "http.disconnect"}]
        raw = self.path()
        method = self._random.choice(["POST"] * 6 + ["GET"] * 4 + ["DELETE", "PUT", "OPTIONS", "HEAD", "BREW"])
        path = raw.decode("ascii", "replace")
        return messages, {
            "method": method,
            "path": path,
            "raw_path": raw,
            "query_string": self.query(),
            "only_headers": headers,
        }


@pytest.mark.parametrize("writable", [False, True])
def test_hostile_requests_leave_it_answering(
    open_client: Callable[..., TestClient], monkeypatch: Any, writable: bool
) -> None:
    client = open_client(timeout=20.0, writable=writable)
    app: Any = client.app
    collection = app.state.serving.collection
    if writable:  # the index is shared with other tests and must not change
        monkeypatch.setattr(collection, "writable", True)
        monkeypatch.setattr(collection, "add", lambda uploads: [])
        monkeypatch.setattr(collection, "delete", lambda ids: None)
    before = client.post("/v1/search", json={"text": "a red house"}).json()
    attacker = Attacker(seed=writable)
    statuses: dict[int, int] = {}

    async def attack() -> None:
        for _ in range(REQUESTS // 2 // 10):
            requests = [attacker.request() for _ in range(10)]
            answers = await asyncio.gather(*(talk(app, messages, **scope) for messages, scope in requests))
            for (messages, scope), sent in zip(requests, answers, strict=True):
                status = sent[0]["status"] if sent else 0
                statuses[status] = statuses.get(status, 0) + 1
                assert status != 500, (messages, scope, sent)
                if status >= 400:
                    assert json.loads(sent[1]["body"])["error"]["message"], (messages, scope)

    assert client.portal is not None
    client.portal.call(attack)
    assert statuses[200] > REQUESTS // 50
    assert statuses[400] > REQUESTS // 50
    assert client.get("/health/ready").status_code == 200
    assert client.post("/v1/search", json={"text": "a red house"}).json() == before
    assert "finelip_in_flight 1.0" in client.get("/metrics").text
