"""The index: embeddings of many items, in memory or in a folder."""

from finelip_fast.index.index import Found, Index, stored_index
from finelip_fast.index.recovery import restore
from finelip_fast.index.store import IndexSpec, Written, stored_dtype, stored_source

__all__ = ["Found", "Index", "IndexSpec", "Written", "restore", "stored_dtype", "stored_index", "stored_source"]
