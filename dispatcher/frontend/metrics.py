"""What a frontend counts. Labels are closed: two endpoints, six classes of status."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dispatcher.telemetry.metrics import SECONDS


class FrontendMetrics:
    """Counts of one frontend. A stream that ends in an error counts as the error, not as its 200."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "flexlb_frontend_requests", "Requests answered", ["endpoint", "status"], registry=registry
        )
        self.in_flight = Gauge("flexlb_frontend_in_flight", "Requests in flight", registry=registry)
        self.held_bytes = Gauge(
            "flexlb_frontend_held_bytes", "Bytes of bodies that Kafka does not have yet", registry=registry
        )
        self.ttft_s = Histogram(
            "flexlb_frontend_ttft_seconds",
            "Request to first token, as this process saw them",
            ["endpoint"],
            registry=registry,
            buckets=SECONDS,
        )
        self.disconnects = Counter(
            "flexlb_frontend_disconnects", "Clients that left before their answer's end", registry=registry
        )
        self.broken_streams = Counter(
            "flexlb_frontend_broken_streams",
            "Streams ended because a retry says otherwise",
            registry=registry,
        )
