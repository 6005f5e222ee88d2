"""Clients of a remote server, used like a :class:`finelip_fast.Retriever`; they do not import PyTorch."""

from finelip_fast.client.calls import RemoteItem
from finelip_fast.client.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "RemoteItem"]
