"""Validate items: invalid ids, embeddings and metadata are refused before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from finelip_fast._arguments import Embeddings, as_embeddings, strings
from finelip_fast._json import MAX_DEPTH
from finelip_fast.errors import InputError

_LONGEST_ID, _LONGEST_METADATA = (1 << 16) - 1, 1 << 26  # bytes
_LARGEST = 1 << 1024  # an integer that no float can hold
_TOLERANCE = 0.05  # for a row's length: int8 rounds by that much in few dimensions
_ROWS_AT_ONCE = 4096


def check_ids(ids: Sequence[str]) -> None:
    """
    Raises:
        InputError: An id is not a string, is too long, or occurs twice; the message names it.
    """
    new: set[str] = set()
    for item in strings("ids", ids):
        if len(item) > _LONGEST_ID // 4 and len(item.encode("utf-8", "surrogatepass")) > _LONGEST_ID:
            raise InputError(
                f"expected ids of at most {_LONGEST_ID} bytes, got one of {len(item)} characters, {item!r:.40}…"
            )
        if item in new:
            raise repeated(item)
        new.add(item)


def repeated(item: str) -> InputError:
    return InputError(f"expected unique ids, got {item!r:.150} twice")


def id_conflict(
    present: Iterable[str],
    remedy: str = "pass other ids, or existing='skip' or existing='replace'",
    place: str = "index",
) -> InputError:
    return InputError(f"the {place} already has {next(iter(present))!r:.150}; {remedy}")


def missing(absent: Sequence[str], place: str = "index") -> InputError:
    remaining = len(absent) - 1
    rest = f" and {remaining} other{'s' * (remaining > 1)}" if remaining else ""
    remedy = "; finelip list or Index.items gives the ids" if place == "index" else ""
    return InputError(f"not in the {place}: {absent[0]!r:.150}{rest}{remedy}")


def check_embeddings(ids: Sequence[str], embeddings: Tensor) -> None:
    """
    Raises:
        InputError: A row is not of length 1, for example because of NaN; the message names the item.
    """
    _check_rows("embeddings", embeddings, lambda at: f"item {ids[at]!r:.150}")


def as_queries(queries: Embeddings, width: int) -> Tensor:
    """Return queries ``[Q, L, D]`` of ``width`` columns as a dense tensor without gradient.

    Raises:
        InputError: They have another shape or no rows, are not floating-point numbers, or a row is not of length 1, for
            example because of NaN; the message names the query.
    """
    queries = as_embeddings("queries", queries).detach()
    if queries.ndim != 3 or queries.shape[2] != width:
        raise InputError(f"expected queries [Q, L, {width}], got {list(queries.shape)}")
    if not queries.shape[1]:
        raise InputError(f"expected queries [Q, L, {width}] of one row or more, got {list(queries.shape)}")
    _check_rows("queries", queries, lambda at: f"query {at}")
    return queries


def _check_rows(name: str, embeddings: Tensor, describe: Callable[[int], str]) -> None:
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        lengths = torch.linalg.vector_norm(embeddings[start : start + _ROWS_AT_ONCE], dim=-1, dtype=torch.float32)
        wrong = ~((lengths - 1).abs() <= _TOLERANCE)  # also for NaN
        if wrong.any():
            at, row = wrong.nonzero()[0].tolist()
            values, where = embeddings[start + at, row], f"{describe(start + at)}, row {row}"
            if not values.isfinite().all():
                value = "NaN" if values.isnan().any() else "infinity"
                raise InputError(f"expected finite {name}, got {value} ({where}); check how they were computed")
            raise InputError(
                f"expected rows of length 1, got {lengths[at, row]:.4g} ({where}); normalize them: "
                f"torch.nn.functional.normalize({name}, dim=-1)"
            )


def as_json(metadata: Any, item: str | None = None) -> str:
    """
    Args:
        metadata: Metadata of one item.
        item: Id of the item, for the message.

    Raises:
        InputError: The metadata is not a dictionary of JSON values; the message names the key.
    """
    owner = "" if item is None else f" (item {item!r:.80})"
    if not isinstance(metadata, dict):
        raise InputError(f"expected metadata to be a dict of JSON values, got {metadata!r:.80}{owner}")
    if fault := _fault(metadata, "", MAX_DEPTH):
        expected, got, remedy = fault
        raise InputError(f"expected {expected}, got {got}{owner}{remedy and '; '}{remedy}")
    text = json.dumps(metadata)
    if len(text) > _LONGEST_METADATA:
        raise InputError(
            f"expected metadata of at most {_LONGEST_METADATA} bytes as JSON, got {len(text)}{owner}; keep it in a file"
        )
    return text


def _fault(value: Any, key: str, depth: int) -> tuple[str, str, str] | None:
    """What metadata must be, what JSON cannot hold unchanged instead, and a remedy, which may be empty; None: no fault."""
    if value is None or isinstance(value, (bool, str)):  # also half a surrogate pair, as in paths that are not text
        return None
    if isinstance(value, int):
        if abs(value) < _LARGEST:
            return None
        return "metadata with numbers that a float can hold", f"a larger integer{key}", "store it as a str"
    if isinstance(value, float):
        if math.isfinite(value):
            return None
        return "metadata with finite numbers", f"{value}{key}", "leave it out, or store None"
    if not isinstance(value, (dict, list, tuple)):
        return "metadata to be a dict of JSON values", f"{value!r:.80}{key}", "convert it, such as with int() or str()"
    if not depth:
        return f"metadata nested at most {MAX_DEPTH} deep", f"deeper nesting{key}", ""
    parts = value.items() if isinstance(value, dict) else ((str(at), part) for at, part in enumerate(value))
    for name, part in parts:
        if not isinstance(name, str):
            return "metadata with str keys", f"the key {name!r:.80}{key}", ""
        if fault := _fault(part, key or f" under the key {name!r:.80}", depth - 1):
            return fault
    return None
