"""The server's metrics, in the text format of Prometheus."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .judge import Judge
from .pool import Pool

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30)
PATHS = {"/is_equal", "/verify", "/health", "/metrics"}
REASONS = ("timeout", "postponed", "abandoned", "memory", "died", "recycled")
SOURCES = ("quick", "cache", "running", "pool")


class Metrics:
    """Requests as they come, and the counters of `pool` and `judge` when they are asked for."""

    def __init__(self, pool: Pool, judge: Judge) -> None:
        self.pool, self.judge = pool, judge
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "math_server_requests", "Requests by path and status code", ["path", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "math_server_request_seconds", "Time to answer a request", ["path"],
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What pool and judge count by themselves; called by the registry."""
        restarts = {(reason,): self.pool.restarts[reason] for reason in REASONS}
        sources = {(source,): self.judge.sources[source] for source in SOURCES}
        for name, text, labels, counts in (
            ("worker_restarts", "Replaced workers by reason", ["reason"], restarts),
            ("pairs", "Pairs by who knew the answer", ["source"], sources),
            ("verdicts", "Verdicts by stage and status", ["how", "status"], self.judge.decided),
        ):
            family = CounterMetricFamily(f"math_server_{name}", text, labels=labels)
            for values, count in counts.items():
                family.add_metric(values, count)
            yield family
        for name, text, value in (
            ("workers", "Workers that are up", len(self.pool.pids)),
            ("queue_length", "Pairs that wait for a worker", self.pool.waiting),
            ("cache_entries", "Verdicts in the cache", len(self.judge.cache)),
        ):
            yield GaugeMetricFamily(f"math_server_{name}", text, value)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def middleware(self, app: ASGIApp) -> Callable[[Scope, Receive, Send], object]:
        """`app` with its requests counted and timed."""

        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            path = scope["path"] if scope["path"] in PATHS else "other"
            code, start = "500", time.perf_counter()

            async def note_code(message: Message) -> None:
                nonlocal code
                if message["type"] == "http.response.start":
                    code = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, note_code)
            finally:
                self.seconds.labels(path).observe(time.perf_counter() - start)
                self.requests.labels(path, code).inc()

        return measured
