"""Lance, as the stores of this project use it: tables at a URI, the specs that they hold, and errors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from finelip_fast._json import parse_json
from finelip_fast.errors import FineLIPError, StoreError

if TYPE_CHECKING:
    import pyarrow as pa

SPEC = b"finelip_fast"  # key of a store's spec in its schema's metadata


class _NotFound(Exception):
    """There is no table."""


@functools.cache
def lance_module() -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # otherwise it prints warnings that no user can act on
    try:
        import lance
    except ImportError as error:
        raise StoreError(f"pylance is not installed ({error}): pip install 'finelip-fast[lance]'") from None
    return lance


def find_dataset(uri: str, version: int | None, **options: Any) -> Any:
    """The table at a URI; None: there is none, or not that version."""
    with errors_of_lance(f"the store at {uri} cannot be opened"), suppress(_NotFound):
        try:
            return lance_module().dataset(uri, version=version, **options)
        except (OSError, ValueError, RuntimeError) as error:
            if "was not found" in str(error):
                raise _NotFound from None
            raise
    return None


def schema_of(dataset: Any, uri: str) -> pa.Schema:
    with errors_of_lance(f"the store at {uri} cannot be opened"):
        return dataset.schema


def spec_of(schema: pa.Schema, uri: str) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(SPEC)
    if raw is None:
        raise StoreError(
            f"expected a store written by finelip_fast, got a table of {schema.names} at {uri}; use another address"
        )
    where = f"the store at {uri}"
    stored: dict[str, Any] = parse_json(raw, where, error=StoreError, expected="the metadata of a store", kind=dict)
    texts = [stored.get("source"), stored.get("checkpoint"), stored.get("dtype", "float16")]
    sizes, alpha = [stored.get("tokens"), stored.get("width")], stored.get("alpha", 1)
    if (
        not all(isinstance(text, str) for text in texts)
        or not all(type(size) is int and 0 < size < 1 << 20 for size in sizes)
        or type(alpha) not in (int, float)
        or not 0 <= alpha <= 1
    ):
        raise StoreError(f"{where}: expected source, checkpoint, dtype, tokens, width and alpha, found {stored!r:.300}")
    return stored


def reading(uri: str) -> AbstractContextManager[None]:
    return errors_of_lance(f"the store at {uri} cannot be read")


@contextmanager
def errors_of_lance(activity: str) -> Iterator[None]:
    """
    Raises:
        StoreError: Lance or Arrow raised an error or a panic, which is not an ``Exception``.
    """
    try:
        yield
    except FineLIPError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, NotImplementedError, MemoryError) as error:
        raise StoreError(f"{activity}: {reason_of(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise StoreError(f"{activity}: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Lance's message, without the location in its sources."""
    return f"{str(error).partition(', /')[0]:.500}"
