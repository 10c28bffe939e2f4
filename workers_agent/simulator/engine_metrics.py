"""`/metrics` of the simulated engine: vLLM's names and labels, read from the model when asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dispatcher.simulation.engine import EngineModel

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
FINISHED_REASONS = ("stop", "length", "abort", "error")
"""All are shown from the start; answers here always end by length, and vLLM leaves aborts at 0 as well."""
LABELS = ("model_name", "engine")


class _ModelCollector(Collector):
    """The model's own counters."""

    def __init__(self, engine: EngineModel, model: str, time_scale: float) -> None:
        self._engine = engine
        self._labels = (model, "0")
        self._time_scale = time_scale

    def collect(self) -> Iterator[Metric]:
        """Read them."""
        engine = self._engine
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch", engine.running),
            ("vllm:num_requests_waiting", "Requests in the queue", engine.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 is all", engine.kv_usage),
            ("flexlb_sim:time_scale", "Wall seconds per modelled second", self._time_scale),
        ):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up", engine.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached", engine.prefix_hit_tokens),
            ("vllm:num_preemptions", "Preemptions", engine.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens of admitted requests", engine.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated", engine.generated_tokens),
            ("flexlb_sim:busy_seconds", "Modelled seconds in which the GPU computed", engine.busy_s),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache", labels=(*LABELS, "block_size", "num_gpu_blocks")
        )
        info.add_metric((*self._labels, str(engine.profile.block_tokens), str(engine.kv_total_blocks)), 1)
        yield info


class EngineMetrics:
    """What the server observes itself, and the model's counters. Times are modelled seconds."""

    def __init__(self, engine: EngineModel, model: str, time_scale: float) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_ModelCollector(engine, model, time_scale))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(model, "0")

        self.ttft_s = histogram("vllm:time_to_first_token_seconds", "Time to first token", TTFT_BUCKETS)
        self.itl_s = histogram("vllm:inter_token_latency_seconds", "Time between tokens", ITL_BUCKETS)
        self.e2e_s = histogram("vllm:e2e_request_latency_seconds", "Whole requests", REQUEST_BUCKETS)
        self.queue_s = histogram("vllm:request_queue_time_seconds", "Time in the queue", REQUEST_BUCKETS)
        success = Counter(
            "vllm:request_success", "Finished requests", (*LABELS, "finished_reason"), registry=self.registry
        )
        self.finished = {reason: success.labels(model, "0", reason) for reason in FINISHED_REASONS}["length"]
