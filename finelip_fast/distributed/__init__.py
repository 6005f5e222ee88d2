"""Work on several processes or machines with Ray: bulk indexing, and search over many index folders."""

from finelip_fast.distributed.bulk import index_images
from finelip_fast.distributed.shards import ShardItem, Shards, ShardSearchResults

__all__ = ["ShardItem", "ShardSearchResults", "Shards", "index_images"]
