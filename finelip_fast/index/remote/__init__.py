"""Collections on object storage, and what goes between them and index folders."""
