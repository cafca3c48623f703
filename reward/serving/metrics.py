"""What the scoring service counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from serving.metrics import LATENCY_S, RequestMetrics

SIZES = tuple(4**power for power in range(11))


class Metrics(RequestMetrics):
    """Counters of one service; implements `reward.serving.batching.BatchWatch`.

    Example:
        >>> metrics = Metrics()
        >>> metrics.forward(num_items=2, num_tokens=30, seconds=0.1)
        >>> b"reward_batch_tokens_sum 30.0" in metrics.text()
        True
    """

    def __init__(self) -> None:
        super().__init__("reward")
        kept = self.registry
        self._items = Counter("reward_items", "scored", registry=kept)
        self._tokens = Counter("reward_tokens", "read by the reward model", registry=kept)
        self._invalid = Counter("reward_invalid_scores", "a judge failed, no score", registry=kept)
        self._batch_items = Histogram(
            "reward_batch_items", "of one forward", buckets=SIZES, registry=kept
        )
        self._batch_tokens = Histogram(
            "reward_batch_tokens", "of one forward", buckets=SIZES, registry=kept
        )
        self._forward = Histogram(
            "reward_forward_seconds", "of one batch", buckets=LATENCY_S, registry=kept
        )
        self._queue_items = Gauge("reward_queue_items", "under way", registry=kept)
        self._queue_tokens = Gauge("reward_queue_tokens", "under way", registry=kept)

    def read_queue(self, items: Callable[[], int], tokens: Callable[[], int]) -> None:
        """Says where the queue's sizes are read when somebody asks."""
        self._queue_items.set_function(items)
        self._queue_tokens.set_function(tokens)

    def scored(self, *, num_items: int, num_tokens: int, num_invalid: int) -> None:
        """The items of one request that got their scores."""
        self._items.inc(num_items)
        self._tokens.inc(num_tokens)
        self._invalid.inc(num_invalid)

    def forward(self, *, num_items: int, num_tokens: int, seconds: float) -> None:
        """One forward of the reward model."""
        self._batch_items.observe(num_items)
        self._batch_tokens.observe(num_tokens)
        self._forward.observe(seconds)
