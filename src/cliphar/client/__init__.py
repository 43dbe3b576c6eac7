"""A typed client of the HTTP API: one class for plain code, one for asyncio."""

from cliphar.client._client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
