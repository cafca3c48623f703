"""What every service counts, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """Requests by path and status, and their times; a service adds its own to `registry`.

    Args:
        service: begins every name, such as "reward".

    Example:
        >>> metrics = RequestMetrics("reward")
        >>> metrics.request(endpoint="/health", status=200, seconds=0.01)
        >>> b'reward_requests_total{endpoint="/health",status="200"} 1.0' in metrics.text()
        True
    """

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{service}_requests", "answered", ["endpoint", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            f"{service}_request_seconds",
            "from first to last byte",
            ["endpoint"],
            buckets=LATENCY_S,
            registry=self.registry,
        )

    def request(self, *, endpoint: str, status: int, seconds: float) -> None:
        """One answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
