"""Prometheus metrics: durations of requests and their stages, queue lengths, refusals, and what is served."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from starlette.types import Scope

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class Metrics:
    """Metrics of one process, or of all workers together if ``PROMETHEUS_MULTIPROC_DIR`` names their folder.

    Observes the pipeline; see :class:`finelip_fast.serve.batching.Observer`.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Histogram(
            "finelip_request_seconds",
            "Time of a request, by its route.",
            ["method", "route", "status"],
            buckets=_SECONDS,
            **options,
        )
        self._stages = Histogram(
            "finelip_stage_seconds", "Time of a part of a request.", ["route", "stage"], buckets=_SECONDS, **options
        )
        self._refusals = Counter("finelip_refusals", "Requests refused, by the error's code.", ["code"], **options)
        self._in_flight = Gauge("finelip_in_flight", "Requests being answered.", multiprocess_mode="livesum", **options)
        self._queue = Gauge(
            "finelip_queue_length",
            "Texts, pictures or searches that wait.",
            ["stage"],
            multiprocess_mode="livesum",
            **options,
        )
        self._sizes = Histogram(
            "finelip_batch_size", "Texts or pictures of one batch.", ["stage"], buckets=_SIZES, **options
        )
        self._waits = Histogram(
            "finelip_batch_wait_seconds", "Time that a batch's first waited.", ["stage"], buckets=_SECONDS, **options
        )
        self._batches = Histogram("finelip_batch_seconds", "Time of one batch.", ["stage"], buckets=_SECONDS, **options)
        self._items = Gauge("finelip_items", "Items that are served.", multiprocess_mode="mostrecent", **options)
        self._served = Gauge(
            "finelip_info",
            "What is served, always 1.",
            ["version", "model", "engine"],
            multiprocess_mode="max",
            **options,
        )

    def batch(self, name: str, size: int, waited: float, took: float) -> None:
        """Record a batch of the pipeline."""
        self._sizes.labels(name).observe(size)
        self._waits.labels(name).observe(waited)
        self._batches.labels(name).observe(took)

    def queue(self, name: str, length: int) -> None:
        """Record the number of waiting items."""
        self._queue.labels(name).set(length)

    def begin(self) -> None:
        """Record the arrival of a request."""
        self._in_flight.inc()

    def end(self, scope: Scope, status: int, seconds: float) -> None:
        """Record the answer to a request."""
        self._in_flight.dec()
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).observe(seconds)
        for stage, took in scope.get("finelip.stages", {}).items():
            self._stages.labels(route, stage).observe(took)
        if "finelip.code" in scope:
            self._refusals.labels(scope["finelip.code"]).inc()

    def describe(self, *, items: int, version: str, model: str, engine: str) -> None:
        """Record what is served."""
        self._items.set(items)
        self._served.labels(version, model, engine).set(1)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        if os.environ.get(MULTIPROCESS):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self._registry)
