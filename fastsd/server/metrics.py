"""What /metrics shows."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastsd.server.jobs import Finished

STAGES = ("text", "encode", "steps", "decode", "total")


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gpu_memory: dict[str, float] = {}  # bytes, as of the last batch
        self.waiting = Gauge("fastsd_queue_waiting", "Jobs that wait.", registry=self.registry)
        self.running = Gauge("fastsd_queue_running", "Jobs at the worker.", registry=self.registry)
        self.refused = Counter("fastsd_queue_refused", "Requests that found the queue full.", registry=self.registry)
        self.images = Counter("fastsd_images", "Images generated.", registry=self.registry)
        self.steps = Counter("fastsd_steps", "Steps done, of batches of images.", registry=self.registry)
        self.pace = Gauge("fastsd_steps_per_second", "Of the last batch.", registry=self.registry)
        self.restarts = Counter("fastsd_worker_restarts", "Workers that died.", registry=self.registry)
        self.memory = Gauge("fastsd_gpu_memory_bytes", "GPU memory.", ["kind"], registry=self.registry)
        self.requests = Counter("fastsd_requests", "Answers.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "fastsd_stage_seconds",
            "Seconds of a batch, by stage.",
            ["stage"],
            registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
        )

    def set_queue(self, waiting: int, running: int) -> None:
        """The queue's state."""
        self.waiting.set(waiting)
        self.running.set(running)

    def count(self, outcomes: Sequence[Finished]) -> None:
        """A batch has ended, whose jobs have one time."""
        self.images.inc(sum(len(outcome.images) for outcome in outcomes))
        timings = outcomes[0].timings if outcomes else {}
        for stage in STAGES:
            if stage in timings:
                self.seconds.labels(stage).observe(timings[stage])
        if "steps_per_second" in timings:
            self.pace.set(timings["steps_per_second"])

    def set_memory(self, found: dict[str, int]) -> None:
        """Bytes by their meaning."""
        self.gpu_memory = dict(found)
        for kind, size in found.items():
            self.memory.labels(kind).set(size)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
