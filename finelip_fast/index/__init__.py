"""The index: embeddings of many items, in memory or in a folder."""

from finelip_fast.index.store import Index, IndexSpec, check_folder, stored_index, stored_source

__all__ = ["Index", "IndexSpec", "check_folder", "stored_index", "stored_source"]
