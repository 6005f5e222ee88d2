"""What a server is told, and the bounds that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Bounds of one request; what exceeds them is refused with the bound in the message.

    Attributes:
        body: Bytes of a request's body.
        pixels: Pixels of one picture.
        images: Pictures of one request.
        texts: Texts of one request.
        characters: Characters of one text.
        k: Hits of one query, those before ``offset`` included.
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
    """How a server answers.

    Attributes:
        host, port: Address to listen on.
        api_key: Key that requests must carry; None: none, which only loopback addresses allow.
        hosts: Names by which the server may be called, beside the address itself and ``localhost``; against DNS rebinding.
        origins: Origins of other pages that may ask (CORS); none by default.
        writable: Whether pictures may be added and deleted.
        uploads: Folder that keeps added pictures; None: ``uploads`` in the index's folder.
        timeout: Seconds after which a request is given up.
        batch_wait: Seconds that an encoding waits for others to share its batch.
        max_batch: Texts or pictures encoded at once.
        queue: Texts or pictures that may wait; a request beyond them is answered 429.
        drain: Seconds that requests may take to end once the server is told to stop.
        log_queries: Whether the access log holds the texts of queries.
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
