"""The guard's Prometheus metrics, registered with vLLM's so that its /metrics shows both.

Gauges say how processes combine, because vLLM switches prometheus_client to multiprocess mode for several API servers.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, multiprocess

WAITS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
OVERHEADS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
COUNTING = (0.001, 0.005, 0.02, 0.05, 0.1, 0.5, 1, 2, 5, 10)


class Metrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"m3quant_guard_{name}", text, registry=registry, multiprocess_mode="livesum")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"m3quant_guard_{name}", text, labels, registry=registry)

        self.pool = gauge("pool_tokens", "KV cache tokens that may be reserved.")
        self.reserved = gauge("reserved_tokens", "KV cache tokens reserved by requests in flight.")
        self.maximum = gauge("maximum_tokens", "The most KV cache tokens that requests in flight may come to use.")
        self.forecasting = gauge(
            "forecasting", "1 while requests are admitted by forecast, 0 while each is reserved in full."
        )
        self.queued = gauge("queued_tokens", "KV cache tokens that waiting requests need.")
        self.admitted = gauge("requests_in_flight", "Requests that hold a reservation.")
        self.waiting = gauge("requests_waiting", "Requests that wait for KV cache tokens.")
        self.healthy = gauge("healthy", "1 while the watchdog sees the engine move, 0 while it hangs.")
        self.requests = counter("requests", "Requests on guarded routes by how they ended.", "outcome")
        self.counted = counter("counted", "Prompts by how their tokens were counted.", "method")
        self.clamped = counter("clamped", "Requests whose max_tokens the guard set, as its settings say.", "reason")
        self.count_of = cache(self.counted.labels)  # looking a label up costs as much as counting
        self.request_of = cache(self.requests.labels)  # outcomes are few, and none comes from outside
        self.wait = Histogram(
            "m3quant_guard_wait_seconds", "Time spent waiting for KV cache tokens.", registry=registry, buckets=WAITS
        )
        self.overhead = Histogram(
            "m3quant_guard_overhead_seconds",
            "Time the guard itself took before the application, without counting tokens and without waiting.",
            registry=registry,
            buckets=OVERHEADS,
        )
        self.counting = Histogram(
            "m3quant_guard_counting_seconds", "Time spent counting tokens.", registry=registry, buckets=COUNTING
        )


@cache
def metrics() -> Metrics:
    """The process's metrics; a registry takes each name once."""
    return Metrics(REGISTRY)


def current_registry() -> CollectorRegistry:
    """Where this process's figures can be read: prometheus_client's files in multiprocess mode, else its registry."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return registry


def read_gauges(names: tuple[str, ...]) -> dict[str, float]:
    """The sum over all label sets of each named metric that exists."""
    found: dict[str, float] = {}
    registry: Any = current_registry()
    if registry is REGISTRY:
        registry = registry.restricted_registry(list(names))
    for family in registry.collect():
        for sample in family.samples:
            if sample.name in names:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
