"""Metrics of an agent. Labels come from closed enums, so their number is bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dispatcher.telemetry.metrics import SECONDS


class AgentMetrics:
    """What an agent counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("flexlb_agent_running", "Attempts held", registry=registry)
        self.unaccepted = Gauge(
            "flexlb_agent_unaccepted", "Endings that Redis has not accepted yet", registry=registry
        )
        self.claimed = Counter("flexlb_agent_claimed", "Jobs claimed", registry=registry)
        self.foreign = Counter("flexlb_agent_foreign_jobs", "Jobs of other makers refused", registry=registry)
        self.endings = Counter(
            "flexlb_agent_endings", "Attempts ended", ["kind", "reason"], registry=registry
        )
        self.lost = Counter("flexlb_agent_lost", "Attempts that were taken away", registry=registry)
        self.incarnations = Counter("flexlb_agent_incarnations", "Incarnations begun", registry=registry)
        self.registrations = Counter("flexlb_agent_registrations", "Registrations", registry=registry)
        self.engine_ok = Gauge("flexlb_agent_engine_ok", "1 while the engine answers", registry=registry)
        self.clock_ahead_s = Gauge(
            "flexlb_agent_clock_ahead_seconds",
            "By how much this host's wall clock is ahead of Redis's, which deadlines go by",
            registry=registry,
        )
        self.store_errors = Counter(
            "flexlb_agent_store_errors", "Calls Redis did not answer", registry=registry
        )
        self.log_errors = Counter("flexlb_agent_log_errors", "Calls Kafka did not answer", registry=registry)
        self.chunks = Counter("flexlb_agent_chunks", "Reply chunks written", registry=registry)
        self.view_blocks = Gauge(
            "flexlb_agent_view_blocks", "Routing blocks in the cache view", registry=registry
        )
        self.view_partial = Gauge(
            "flexlb_agent_view_partial",
            "1 while the engine holds more than the view shows",
            registry=registry,
        )
        self.block_events = Counter(
            "flexlb_agent_block_events", "Changes of the cache view published", registry=registry
        )
        self.view_resyncs = Counter(
            "flexlb_agent_view_resyncs", "Times the whole view was published anew", registry=registry
        )
        self.kv_events = Gauge(
            "flexlb_agent_kv_events",
            "What happened to the engine's event stream",
            ["what"],
            registry=registry,
        )
        self.unexplained_hits = Counter(
            "flexlb_agent_unexplained_hit_tokens",
            "Cached tokens reported by the engine beyond those predicted",
            registry=registry,
        )
        self.resumes = Counter(
            "flexlb_agent_resumes",
            "Attempts that met a checkpoint, by what they made of it",
            ["result"],
            registry=registry,
        )
        self.resumed_tokens = Counter(
            "flexlb_agent_resumed_tokens",
            "Generated tokens of earlier attempts that were not generated again",
            registry=registry,
        )
        self.probes = Counter(
            "flexlb_agent_probes", "Probes of a suspect engine", ["result"], registry=registry
        )
        self.first_token_s = Histogram(
            "flexlb_agent_first_token_seconds", "Claim to first token", registry=registry, buckets=SECONDS
        )
        self.attempt_s = Histogram(
            "flexlb_agent_attempt_seconds", "Claim to end", registry=registry, buckets=SECONDS
        )
