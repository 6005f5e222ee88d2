"""A server that runs elsewhere, asked as a :class:`finelip_fast.Retriever` is asked; imports no PyTorch."""

from finelip_fast.client.calls import RemoteItem
from finelip_fast.client.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "RemoteItem"]
