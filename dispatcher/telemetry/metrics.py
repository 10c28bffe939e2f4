"""Metrics of a dispatcher, and the small HTTP server that every process shows them on.

Labels come from closed enums or from node names, so their number is bounded. Each process makes one
registry and passes it down; nothing is registered globally.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dispatcher.telemetry.http import guard_expectations

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class DispatcherMetrics:
    """What a dispatcher counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leading = Gauge("flexlb_leading", "1 while this dispatcher leads", registry=registry)
        self.elections = Counter("flexlb_elections", "Leases acquired", registry=registry)
        self.depositions = Counter("flexlb_depositions", "Leases lost or given up", registry=registry)
        self.records = Counter("flexlb_records_read", "Request records read", ["lane"], registry=registry)
        self.refused = Counter("flexlb_refused", "Records refused at intake", ["reason"], registry=registry)
        self.shed = Counter(
            "flexlb_shed", "Requests turned away, arriving or waiting", ["reason"], registry=registry
        )
        self.overloaded = Gauge(
            "flexlb_overloaded", "1 while a model's requests are turned away", ["model"], registry=registry
        )
        self.predicted_wait_s = Gauge(
            "flexlb_predicted_wait_seconds",
            "Predicted wait of the last request in a model's queue",
            ["model"],
            registry=registry,
        )
        self.window_requests = Gauge("flexlb_window_requests", "Requests waiting", registry=registry)
        self.window_bytes = Gauge("flexlb_window_bytes", "Bytes of waiting requests", registry=registry)
        self.bound_requests = Gauge("flexlb_bound_requests", "Requests at nodes", registry=registry)
        self.assigned = Counter("flexlb_assigned", "Requests bound to nodes", registry=registry)
        self.assign_batch = Histogram(
            "flexlb_assign_batch",
            "Requests per assign call",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.node_batch = Histogram(
            "flexlb_node_batch",
            "Requests handed to a node together, where there is a batching window",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.wait_s = Histogram("flexlb_wait_seconds", "Append to assign", registry=registry, buckets=SECONDS)
        self.outcomes = Counter(
            "flexlb_outcomes", "Outcomes published", ["kind", "reason"], registry=registry
        )
        self.transaction_s = Histogram(
            "flexlb_transaction_seconds", "Outcome transactions", registry=registry, buckets=SECONDS
        )
        self.handoffs = Counter(
            "flexlb_handoffs", "Prompts computed for another node to go on from", registry=registry
        )
        self.retries = Counter("flexlb_retries", "Attempts bound again", ["cause"], registry=registry)
        self.retries_without_token = Gauge(
            "flexlb_retries_without_token", "Retries that wait for the retry budget", registry=registry
        )
        self.retries_held_up = Counter(
            "flexlb_retries_held_up", "Retries that found no token at their time", registry=registry
        )
        self.failures_excused = Counter(
            "flexlb_failures_excused",
            "Failed attempts held against no request: most nodes of its model failed whatever they got",
            registry=registry,
        )
        self.crashes = Counter(
            "flexlb_engine_crashes_under_requests",
            "Attempts whose engine died while they were running",
            registry=registry,
        )
        self.requeued = Counter("flexlb_requeued", "Requests moved off a node", ["cause"], registry=registry)
        self.fenced = Counter("flexlb_nodes_fenced", "Incarnations fenced", registry=registry)
        self.nodes = Gauge("flexlb_nodes", "Nodes by state", ["state"], registry=registry)
        self.probations = Counter(
            "flexlb_node_probations", "Times a node got no work after engine failures", registry=registry
        )
        self.cordoned = Gauge(
            "flexlb_nodes_cordoned", "Nodes that operators cordoned or drained", ["wish"], registry=registry
        )
        self.cordons_lost = Counter(
            "flexlb_cordons_lost", "Operators' wishes that went with Redis's data", registry=registry
        )
        self.stale_load_s = Gauge(
            "flexlb_oldest_report_seconds", "Age of the oldest load report", registry=registry
        )
        self.clock_ahead_s = Gauge(
            "flexlb_clock_ahead_seconds",
            "By how much this host's wall clock is ahead of Redis's, which deadlines go by",
            registry=registry,
        )
        self.store_errors = Counter("flexlb_store_errors", "Calls Redis did not answer", registry=registry)
        self.log_errors = Counter("flexlb_log_errors", "Calls Kafka did not answer", registry=registry)
        self.finished_lag = Gauge("flexlb_finished_lag", "Open requests", ["source"], registry=registry)
        self.lost_to_retention = Gauge(
            "flexlb_lost_to_retention", "Records deleted before they were read", ["source"], registry=registry
        )
        self.retention_short = Gauge(
            "flexlb_retention_short",
            "1 where a topic may drop records within twice the longest deadline",
            ["topic"],
            registry=registry,
        )
        self.outcomes_held_s = Gauge(
            "flexlb_outcomes_held_seconds",
            "For how long an open transaction has held up readers of committed outcomes, by partition",
            ["partition"],
            registry=registry,
        )
        self.adopted = Counter(
            "flexlb_adopted", "Running attempts adopted after Redis lost data", registry=registry
        )
        self.generations = Counter("flexlb_generations", "Redis generations begun", registry=registry)
        self.index_blocks = Gauge(
            "flexlb_index_blocks", "Different routing blocks in the prefix index", registry=registry
        )
        self.index_rebuilds = Counter(
            "flexlb_index_rebuilds", "Cache views read whole", ["reason"], registry=registry
        )
        self.index_mismatched_nodes = Gauge(
            "flexlb_index_mismatched_nodes",
            "Nodes whose routing block differs from the pool's: their views are ignored",
            registry=registry,
        )
        self.view_partial_nodes = Gauge(
            "flexlb_view_partial_nodes", "Nodes that hold more than their view shows", registry=registry
        )
        self.hit_tokens = Counter(
            "flexlb_hit_tokens",
            "Prompt tokens of completed requests: all, predicted cached, reported cached",
            ["kind"],
            registry=registry,
        )
        self.waits_for_holder = Gauge(
            "flexlb_waits_for_node", "Requests that wait for their best node to have room", registry=registry
        )
        self.explanations = Counter(
            "flexlb_explanations", "Decisions explained: what flexlb explain tells", registry=registry
        )
        self.explanations_lost = Counter(
            "flexlb_explanations_lost", "Explanations that Redis did not take", registry=registry
        )
        self.choose_s = Histogram(
            "flexlb_choose_seconds",
            "CPU time of one round of choices",
            registry=registry,
            buckets=(1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1),
        )
        self.block_size_mismatches = Counter(
            "flexlb_block_size_mismatches",
            "Requests whose hashes are of another routing block than the pool's",
            registry=registry,
        )
        self.mended = Counter(
            "flexlb_jobs_mended",
            "Requests whose jobs in Redis could not be read, by what became of them",
            ["ending"],
            registry=registry,
        )
        self.foreign = Counter("flexlb_foreign_entries", "Entries of other makers refused", registry=registry)


class ShadowMetrics:
    """What a shadow counts: how its decisions compare with the leader's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter(
            "flexlb_shadow_decisions",
            "Decisions of the leader, by what the shadow's beside them came to",
            ["verdict"],
            registry=registry,
        )
        self.would_wait = Counter(
            "flexlb_shadow_would_wait",
            "Decisions that the shadow would have put off for its node to have room",
            registry=registry,
        )
        self.ttft_s = Histogram(
            "flexlb_shadow_predicted_ttft_seconds",
            "Predicted time to the first token by the shadow's model: of its own choice, of the leader's",
            ["choice"],
            registry=registry,
            buckets=SECONDS,
        )
        self.unseen = Counter(
            "flexlb_shadow_unseen",
            "Requests that began and ended between two looks: not compared",
            registry=registry,
        )
        self.records = Counter(
            "flexlb_shadow_records",
            "Records read, by the shadow's own admission",
            ["decision"],
            registry=registry,
        )


async def serve_metrics(
    registry: CollectorRegistry, host: str, port: int, health: Callable[[], dict[str, object]]
) -> tuple[web.AppRunner, int]:
    """Serve `/metrics` and `/health`; returns the runner to clean up and the port.

    Raises:
        OSError: the port is in use.
    """

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain", charset="utf-8")

    async def healthy(_: web.Request) -> web.Response:
        state = health()
        return web.json_response(state, status=200 if state.get("ok") else 503)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/health", healthy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    guard_expectations(runner.server)
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError:
        await runner.cleanup()
        raise
    return runner, int(runner.addresses[0][1])
