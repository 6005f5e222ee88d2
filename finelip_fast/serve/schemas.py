"""Requests and answers of the API, as OpenAPI documents them.

Pictures are sent as base64 in JSON, with or without a ``data:`` prefix, or as files of a multipart form. The bounds of a
server (:class:`finelip_fast.serve.settings.Limits`) are checked where requests are handled.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finelip_fast.hits import Verdict
from finelip_fast.index.search import Mode

Text = Annotated[str, Field(description="A description; an empty one is a query like any other.")]
Picture = Annotated[str, Field(description="An encoded picture in base64, or a data URI of one.")]


SHARD = "Folder of the shard that holds it, as in `shard` of a hit; null: the first that has such an item."


class Request(BaseModel):
    """Request from a client; unknown names are refused, so that none is silently ignored."""

    model_config = ConfigDict(extra="forbid")


class SearchRequest(Request):
    """Queries of one kind: texts, pictures, or items of the index to find similar items for."""

    text: Text | list[Text] | None = None
    image: Picture | list[Picture] | None = None
    item: str | list[str] | None = Field(None, description="Id of an item: search with its stored embedding.")
    shard: str | None = Field(None, description=f"With `item`: {SHARD[0].lower()}{SHARD[1:]}")
    k: int = Field(10, ge=1, description="Number of hits of each query.")
    offset: int = Field(0, ge=0, description="Number of best hits to leave out, for the next page.")
    mode: Mode = "auto"
    where: str | None = Field(None, description="Filter on the metadata, such as `camera = 'front' and year >= 2024`.")
    alpha: float | None = Field(None, ge=0, le=1, description="Weight of the global score; null: the checkpoint's.")


class FoundItem(BaseModel):
    """A hit; the scores are those of :class:`finelip_fast.Hit`."""

    id: str
    score: float
    global_score: float
    fine_score: float | None
    stands_out: float | None
    verdict: Verdict | None
    metadata: dict[str, Any]
    mode: str
    path: str | None = Field(description="File of the picture on the server's machine.")
    thumbnail: str | None = Field(description="Address of a small copy of the picture; null where there is no file.")
    shard: str | None = Field(None, description="Folder of the shard that holds it.")


class SearchResult(BaseModel):
    """Hits of one query, best first."""

    hits: list[FoundItem]
    note: str | None = Field(description="Says so where nothing matches: the best hit does not stand out.")
    tokens: int | None = Field(description="Tokens of a text, before it was cut to the context.")
    tokens_cut: int | None = Field(description="Tokens of a text beyond the context, which the model does not read.")


class SearchResponse(BaseModel):
    """One result for each query, in order."""

    results: list[SearchResult]
    covered: float = Field(description="Share of the items that were searched; below 1 where shards did not answer.")
    missing: dict[str, str] = Field(description="Shards that did not answer, and why.")


class ScoreRequest(Request):
    """Pictures and texts to compare with each other, without the index."""

    images: list[Picture] = Field(min_length=1)
    texts: list[Text] = Field(min_length=1)
    alpha: float | None = Field(None, ge=0, le=1)


class ScoreResponse(BaseModel):
    """A row of scores for each picture, with a column for each text."""

    scores: list[list[float]]


class ExplainRequest(Request):
    """A text, and either a picture or an item of the index that is one."""

    text: Text
    image: Picture | None = None
    item: str | None = None
    shard: str | None = Field(None, description=f"With `item`: {SHARD[0].lower()}{SHARD[1:]}")


class ExplainedWord(BaseModel):
    """A word of the text, `text[start:end]`, counted in Unicode code points."""

    text: str
    start: int
    end: int
    adds: float | None = Field(description="What it adds to the score; null without trained aggregators.")


class PictureMaps(BaseModel):
    """Levels from 0 to 255 as two hexadecimal digits each, row by row."""

    maps: list[str] = Field(description="For each word, the levels of all `side * side` places.")
    words: list[str] = Field(description="For each place, the levels of all words.")


class ExplainResponse(BaseModel):
    """Explanation of the score of a picture and a text."""

    score: float
    global_score: float
    fine_score: float | None
    alpha: float
    words: list[ExplainedWord] = Field(description="The words that were read; those beyond the context are not.")
    beyond: int = Field(description="Place in the text, in code points, from which on nothing was read.")
    side: int = Field(description="Places of a row, and of a column, of the picture.")
    maps: dict[Literal["raw", "aggregated"], PictureMaps]
    width: int = Field(description="Width of the picture.")
    height: int
    squashed: bool = Field(
        description="Whether the model sees the whole picture, squashed to a square; false: the square in its middle."
    )


class TokensRequest(Request):
    """A text whose tokens to count."""

    text: Text


class TokensResponse(BaseModel):
    """How much of a text the model reads."""

    tokens: int
    context_length: int
    cut_at: int | None = Field(description="Place in the text, in code points, where the context ends; null: it fits.")


class StoredItem(BaseModel):
    """An item of the index."""

    id: str
    metadata: dict[str, Any]
    path: str | None
    thumbnail: str | None
    shard: str | None = Field(None, description="Folder of the shard that holds it.")


class ItemsResponse(BaseModel):
    """One page of the items, in the order they were added."""

    items: list[StoredItem]
    total: int = Field(description="Number of items of the index, the filter left aside.")
    next: str | None = Field(description="What to send as `after` for the next page; null: this is the last.")


class AddedItem(BaseModel):
    """Outcome for one uploaded picture."""

    id: str | None = Field(description="Its id; null: it was not added.")
    name: str = Field(description="Name of the file as it was sent.")
    reason: str | None = Field(description="Why it was not added; null: it was.")


class AddResponse(BaseModel):
    """Outcome of an upload; added pictures are on disk and found by every later search."""

    added: int
    items: list[AddedItem]


class RemoveResponse(BaseModel):
    """Confirmation that the item is permanently deleted."""

    removed: int


class EmbeddedImage(Request):
    """A picture among the inputs to embed."""

    image: Picture


class EmbeddingsRequest(BaseModel):
    """Inputs to embed, as OpenAI's clients send them; unknown names are ignored."""

    input: Text | EmbeddedImage | list[Text | EmbeddedImage]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Only the model's own width.")
    multi_vector: bool = Field(False, description="All rows of each embedding instead of the global one alone.")


class Embedding(BaseModel):
    """One embedding: numbers, a list of rows, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[list[float]] | str
    shape: list[int] | None = Field(None, description="Of several rows in base64: their number and width.")


class Usage(BaseModel):
    """Number of tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Answer in OpenAI's format."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class MetadataField(BaseModel):
    """A field of the items' metadata, for a control that filters by it."""

    name: str
    kind: Literal["text", "number", "date", "boolean"]
    values: list[Any] | None = Field(description="All its values where they are few, the most frequent first.")
    least: float | str | None = Field(description="Least number or date.")
    greatest: float | str | None


class InfoResponse(BaseModel):
    """The served model and items, and the bounds on requests."""

    version: str
    model: str
    engine: str
    context_length: int = Field(description="Tokens that the model reads.")
    alpha: float
    aggregated: bool = Field(description="Whether tokens are compared with each other; false: global scores alone.")
    items: int
    index_version: int
    fields: list[MetadataField]
    writable: bool
    warning: str | None = Field(description="What a user should know of the model, such as what the bundled one knows.")
    limits: dict[str, float]


class Fault(BaseModel):
    """An error: what was expected, what was received, and what to do."""

    message: str
    type: str
    code: str
    param: str | None = None
    request_id: str | None = None


class FaultResponse(BaseModel):
    """Any unsuccessful answer, in the format of OpenAI's errors."""

    error: Fault


# Examples ------------------------------------------------------------------------------------------------------------

_PICTURE = (  # eight by eight red pixels
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mPc4GDAgA0wMeAAg1MCAOZIATB1oGVIAAAAAElFTkSuQmCC"
)
_TEXT = "a red house with two floors, and a tree to the left of it"

# Bodies that any server answers, by description.
EXAMPLES: dict[type[BaseModel], dict[str, dict[str, Any]]] = {
    SearchRequest: {
        "a description": {"text": _TEXT, "k": 3},
        "several, filtered": {"text": [_TEXT, "a blue bus"], "where": "width > 10 and height > 10", "alpha": 1.0},
        "a picture": {"image": _PICTURE, "k": 3},
    },
    ScoreRequest: {"a picture, two texts": {"images": [_PICTURE], "texts": [_TEXT, "a blue bus"]}},
    ExplainRequest: {"a picture": {"text": _TEXT, "image": _PICTURE}},
    TokensRequest: {"a description": {"text": _TEXT}},
    EmbeddingsRequest: {
        "texts": {"input": [_TEXT, "a blue bus"], "model": "finelip"},
        "a picture, all its rows": {"input": {"image": _PICTURE}, "multi_vector": True},
    },
}


def takes(model: type[BaseModel], *, form: bool = False) -> dict[str, Any]:
    """Return the OpenAPI description of a request body, which the routes read themselves, within bounds."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    examples = {name: {"value": body} for name, body in EXAMPLES[model].items()}
    content: dict[str, Any] = {"application/json": {"schema": schema, "examples": examples}}
    if form:
        content["multipart/form-data"] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}
