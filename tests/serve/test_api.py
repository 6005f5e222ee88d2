"""The API answers as the library does, with any id and any metadata, and refuses in one shape."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from finelip_fast import Retriever
from finelip_fast.serve import schemas

TEXT = "a red house with a flat roof"


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def post(client: TestClient, path: str, values: Any, status: int = 200) -> Any:
    answer = client.post(path, json=values)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_search_is_the_librarys(client: TestClient, retriever: Retriever) -> None:
    answer = schemas.SearchResponse.model_validate(post(client, "/v1/search", {"text": [TEXT, ""], "k": 3}))
    assert answer.covered == 1.0
    for result, hits in zip(answer.results, retriever.search([TEXT, ""], k=3), strict=True):
        assert [hit.id for hit in result.hits] == [hit.id for hit in hits]
        assert [hit.score for hit in result.hits] == pytest.approx([hit.score for hit in hits], abs=1e-4)
        assert result.hits[0].path == hits[0].path
        assert result.tokens_cut == 0


def test_the_rest_answers(client: TestClient) -> None:
    hit = post(client, "/v1/search", {"text": TEXT, "k": 1})["results"][0]["hits"][0]
    assert client.get(hit["thumbnail"]).headers["content-type"] == "image/webp"
    schemas.InfoResponse.model_validate(client.get("/v1/info").json())
    schemas.ExplainResponse.model_validate(post(client, "/v1/explain", {"text": TEXT, "item": hit["id"]}))
    assert schemas.TokensResponse.model_validate(post(client, "/v1/tokens", {"text": TEXT})).cut_at is None
    cut = schemas.TokensResponse.model_validate(post(client, "/v1/tokens", {"text": "house " * 60}))
    assert (cut.tokens, cut.cut_at) == (62, 38 * len("house "))
    assert client.get("/static/style.css").status_code == 200
