"""Embeddings in the format that OpenAI's clients send and read."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from starlette.testclient import TestClient

from finelip_fast import Retriever
from finelip_fast.serve import schemas
from finelip_fast.serve.app import create_app
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.settings import ServeSettings

from .asgi import encoded, picture, running

TEXTS = ["a red house", "a blue bus waits beside the tall tree"]


def embed(client: TestClient, status: int = 200, **values: Any) -> Any:
    answer = client.post("/v1/embeddings", json=values)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_what_openais_client_sends_is_answered(client: TestClient, retriever: Retriever) -> None:
    """The client requests base64 by default, and sends fields that a server may not know."""
    request = {
        "input": TEXTS,
        "model": "checkpoint",
        "encoding_format": "base64",
        "user": "me",
        "something": {"new": 1},
    }
    answer = embed(client, **request)
    schemas.EmbeddingsResponse.model_validate(answer)
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), dtype="float32") for row in answer["data"]]
    expected = retriever.encode_texts(TEXTS, convert_to_numpy=True)[:, 0]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert [row["index"] for row in answer["data"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 4
    as_numbers = embed(client, input=TEXTS, encoding_format="float", model=None)
    np.testing.assert_allclose([row["embedding"] for row in as_numbers["data"]], expected, atol=1e-5)


def test_all_rows_of_texts_and_pictures_in_their_order(client: TestClient, retriever: Retriever) -> None:
    image = encoded(picture(0))
    inputs = [TEXTS[0], {"image": image}, {"image": f"data:image/png;base64,{image}"}]
    answer = embed(client, input=inputs, multi_vector=True, encoding_format="base64")
    shape = (retriever.engine.config.tokens, retriever.engine.config.embed_dim)
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4").reshape(row["shape"]) for row in answer["data"]]
    assert [row.shape for row in rows] == [shape] * 3
    np.testing.assert_allclose(rows[0], retriever.encode_texts(TEXTS[0], convert_to_numpy=True)[0], atol=1e-5)
    np.testing.assert_allclose(rows[1], retriever.encode_images([picture(0)], convert_to_numpy=True)[0], atol=1e-5)
    np.testing.assert_array_equal(rows[1], rows[2])
    as_numbers = embed(client, input=TEXTS[0], multi_vector=True)["data"][0]["embedding"]
    assert np.shape(as_numbers) == shape
    single = embed(client, input={"image": image})["data"][0]["embedding"]
    np.testing.assert_allclose(single, rows[1][0], atol=1e-5)


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ({"input": []}, 400, "empty_input"),
        ({"input": [1, 2, 3]}, 400, "tokens"),
        ({"input": [[1, 2], [3]]}, 400, "tokens"),
        ({"input": "a", "dimensions": 7}, 400, "invalid_dimensions"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model_not_found"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_request"),
        ({"input": {"image": "http://example.org/a.png"}}, 400, "address"),
        ({"input": {"image": "!"}}, 400, "invalid_base64"),
        ({"input": None}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
        ({"input": ["a"] * 257}, 413, "too_many"),
    ],
)
def test_what_it_does_not_do_is_refused(client: TestClient, values: dict[str, Any], status: int, code: str) -> None:
    assert embed(client, status, **values)["code"] == code


def test_an_empty_text_is_a_text(client: TestClient) -> None:
    assert len(embed(client, input="")["data"]) == 1


def test_its_model_is_listed(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get(f"/v1/models/{model['id']}").json()
    assert client.get("/v1/models/gpt-5").json()["error"]["code"] == "model_not_found"


def test_openais_own_client_is_answered(retriever: Retriever) -> None:
    key = "a-key-of-16-or-more"
    app = create_app(IndexCollection(retriever), ServeSettings(api_key=key))
    with running(app) as address, OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
        (model,) = client.models.list()
        assert client.models.retrieve(model.id) == model
        expected = retriever.encode_texts(TEXTS, convert_to_numpy=True)[:, 0]
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(model=model.id, input=TEXTS, **options)
            rows = [row.embedding for row in answer.data]
            if "base64" in options.values():  # it decodes base64 only if it was not explicitly requested
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            np.testing.assert_allclose(rows, expected, atol=1e-5)
        (row,) = client.embeddings.create(
            model="finelip", input=TEXTS[0], extra_body={"multi_vector": True, "encoding_format": "float"}
        ).data
        assert np.shape(row.embedding) == (retriever.engine.config.tokens, len(expected[0]))
        assert answer.usage.total_tokens > 4
        with pytest.raises(NotFoundError, match="expected model 'checkpoint'") as refusal:
            client.embeddings.create(model="text-embedding-3-small", input="a")
        assert refusal.value.code == "model_not_found"
        with pytest.raises(BadRequestError, match="at least one input"):
            client.embeddings.create(model=model.id, input=[])
