"""What is counted and measured, for /metrics in Prometheus' form. A registry for each server."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Load(Protocol):
    """How busy a model is."""

    @property
    def in_flight(self) -> int: ...

    @property
    def free_slots(self) -> int: ...


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("omega_requests", "Requests answered", ("endpoint", "status"), registry=self.registry)
        self.left = Counter("omega_clients_left", "Clients that went before their answer", registry=self.registry)
        self.prompt_tokens = Counter("omega_prompt_tokens", "Tokens of prompts", ("model",), registry=self.registry)
        self.new_tokens = Counter("omega_generated_tokens", "Tokens generated", ("model",), registry=self.registry)
        self.first_token = Histogram(
            "omega_first_token_seconds", "From a request to its first token", ("model",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "omega_between_tokens_seconds", "From a token of an answer to its next", ("model",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._load = Gauge("omega_answers_in_flight", "Answers that wait or grow", ("model",), registry=self.registry)
        self._slots = Gauge("omega_free_slots", "Texts that could begin to grow", ("model",), registry=self.registry)

    def watch(self, model: str, load: Load) -> None:
        """Ask `load` of a model whenever metrics are read."""
        self._load.labels(model).set_function(lambda: load.in_flight)
        self._slots.labels(model).set_function(lambda: load.free_slots)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
