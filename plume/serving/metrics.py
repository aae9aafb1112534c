"""What the server tells Prometheus; no label comes from a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from plume.serving.batcher import Entry

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144)


class Metrics:
    """Numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "plume_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.rejected = Counter(
            "plume_rejected", "Requests that were not taken, by reason", ["reason"], registry=registry
        )
        self.cancelled = Counter("plume_cancelled_inputs", "Inputs whose client had gone", registry=registry)
        self.inputs = Counter("plume_inputs", "Inputs that were embedded", registry=registry)
        self.latent_steps = Counter("plume_latent_steps", "Latent steps that were asked for", registry=registry)
        self.seconds = Histogram(
            "plume_stage_seconds", "Seconds by stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.batch_inputs = Histogram("plume_batch_inputs", "Inputs of a batch", buckets=_SIZES, registry=registry)
        self.batch_tokens = Histogram("plume_batch_tokens", "Tokens of a batch", buckets=_TOKENS, registry=registry)
        self.padding = Gauge("plume_padding_ratio", "Padding of the last batch, as a share of it", registry=registry)

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def see_batch(self, batch: Sequence[Entry], seconds: float, began: float) -> None:
        """Take note of a batch: its size, how long it took, and how long its inputs had waited when it began."""
        self.seconds.labels("encode").observe(seconds)
        for entry in batch:
            self.seconds.labels("queue").observe(max(began - entry.arrived, 0.0))
        tokens = sum(entry.num_tokens for entry in batch)
        self.batch_inputs.observe(len(batch))
        self.batch_tokens.observe(tokens)
        self.padding.set(1 - tokens / (len(batch) * max(entry.num_tokens for entry in batch)))
        self.inputs.inc(len(batch))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
