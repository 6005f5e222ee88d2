"""The index: embeddings of many items, in memory or in a folder."""

from finelip_fast.index.fields import Field
from finelip_fast.index.index import Index, stored_index
from finelip_fast.index.recovery import restore
from finelip_fast.index.searching import SearchResults
from finelip_fast.index.spec import IndexSpec, StoredDtype, stored_dtype, stored_source
from finelip_fast.index.store import Existing, Written

__all__ = [
    "Existing",
    "Field",
    "Index",
    "IndexSpec",
    "SearchResults",
    "StoredDtype",
    "Written",
    "restore",
    "stored_dtype",
    "stored_index",
    "stored_source",
]
