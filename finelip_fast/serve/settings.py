"""Settings of a server, and its bounds on requests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Bounds on one request; a request that exceeds one is refused with the bound in the message.

    Attributes:
        body: Bytes of a request's body.
        pixels: Pixels of one picture.
        images: Pictures of one request.
        texts: Texts of one request.
        characters: Characters of one text.
        k: Hits of one query, including those before ``offset``.
        where: Characters of a filter.
        items: Items of one page of a listing.
        body_seconds: Seconds within which a request's body must arrive.
    """

    body: int = 64 << 20
    pixels: int = 200_000_000
    images: int = 64
    texts: int = 256
    characters: int = 20_000
    k: int = 1000
    where: int = 4096
    items: int = 1000
    body_seconds: float = 60.0


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        host, port: Address to listen on.
        api_key: Key that requests must carry; None: no key, allowed only on loopback addresses.
        hosts: Host names accepted in addition to the address itself and ``localhost``, against DNS rebinding.
        origins: Origins of other pages that may send requests (CORS); none by default.
        writable: Whether pictures may be added and deleted.
        uploads: Folder for added pictures; None: ``uploads`` in the index folder.
        timeout: Seconds after which a request is abandoned.
        batch_wait: Seconds that an encoding waits for others to share its batch.
        max_batch: Texts or pictures encoded at once.
        queue: Texts or pictures that may wait; requests beyond that are answered with 429.
        drain: Seconds that requests may take to finish once the server is told to stop.
        log_queries: Whether the access log includes the texts of queries.
        limits: Bounds of one request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    writable: bool = False
    uploads: str | None = None
    timeout: float = 30.0
    batch_wait: float = 0.002
    max_batch: int = 32
    queue: int = 256
    drain: float = 20.0
    log_queries: bool = False
    limits: Limits = field(default_factory=Limits)
