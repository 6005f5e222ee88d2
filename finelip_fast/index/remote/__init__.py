"""Collections on object storage, and transfer between them and index folders."""
