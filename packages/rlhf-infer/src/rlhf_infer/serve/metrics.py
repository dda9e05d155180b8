"""What the reward server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlhf_serve_requests", "Requests answered, by status code; 499 for a client that left.", ["code"],
            registry=self.registry,
        )  # fmt: skip
        self.samples = Counter("rlhf_serve_samples", "Samples scored.", registry=self.registry)
        self.tokens = Counter("rlhf_serve_tokens", "Tokens scored.", registry=self.registry)
        self.failures = Counter(
            "rlhf_serve_scorer_failures", "Calls in which the scorer failed.", registry=self.registry
        )
        self.batches = Histogram(
            "rlhf_serve_batch_samples", "Samples in a call of the scorer.", buckets=SAMPLES, registry=self.registry
        )
        self.queue_seconds = Histogram(
            "rlhf_serve_queue_seconds", "From a request's arrival to its first sample being taken.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.model_seconds = Histogram(
            "rlhf_serve_model_seconds", "In a call of the scorer.", buckets=SECONDS, registry=self.registry
        )
        self._waiting = Gauge("rlhf_serve_waiting_samples", "Samples that wait for the scorer.", registry=self.registry)

    def watch_waiting(self, waiting: Callable[[], float]) -> None:
        """Ask `waiting` for the number of waiting samples whenever metrics are read."""
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
