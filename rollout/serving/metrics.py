"""What a rollout worker counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import Counter, Gauge, Histogram, ProcessCollector

from serving.metrics import RequestMetrics

STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
GAUGES = {
    "samples": "queued or live",
    "policy_version": "of the weights",
    "free_slots": "of samples that could be decoded at once",
    "free_pages": "of keys and values",
    "tasks": "of the event loop",
}


class Metrics(RequestMetrics):
    """Counters of one worker; implements `rollout.serving.driver.StepWatch`.

    Example:
        >>> metrics = Metrics()
        >>> metrics.step(num_tokens=3, seconds=0.01)
        >>> b"rollout_tokens_total 3.0" in metrics.text()
        True
    """

    def __init__(self) -> None:
        super().__init__("rollout")
        kept = self.registry
        self._tokens = Counter("rollout_tokens", "sampled", registry=kept)
        self._steps = Histogram(
            "rollout_step_seconds", "of one turn of the engine", buckets=STEP_S, registry=kept
        )
        self._cancelled = Counter("rollout_cancelled", "askers that left", registry=kept)
        self._gauges = {
            name: Gauge(f"rollout_{name}", text, registry=kept) for name, text in GAUGES.items()
        }
        # memory and open files of the process, where the system tells
        ProcessCollector(registry=kept)

    def read_state(self, state: Mapping[str, Callable[[], int]]) -> None:
        """Says where the gauges are read when somebody asks.

        Args:
            state: by name, as in `GAUGES`.
        """
        for name, read in state.items():
            self._gauges[name].set_function(read)

    def step(self, *, num_tokens: int, seconds: float) -> None:
        """One turn of the engine."""
        self._tokens.inc(num_tokens)
        self._steps.observe(seconds)

    def cancelled(self) -> None:
        """One asker left before the answer."""
        self._cancelled.inc()
