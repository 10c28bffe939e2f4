"""Settings of an agent, each with unit and bounds; `backends.environment` says where they come from."""

from __future__ import annotations

import socket
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from dispatcher.backends.access import AccessSettings
from dispatcher.backends.addresses import HttpUrl, KafkaServers, MaybeZeroMQ, RedisUrl
from dispatcher.protocol.names import POOL_PATTERN, node_name_from_host
from dispatcher.protocol.node import Role

NAME = rf"^{POOL_PATTERN}$"


class AgentSettings(AccessSettings):
    """Everything an agent can be told."""

    model_config = SettingsConfigDict(env_prefix="FLEXLB_", extra="ignore", frozen=True)

    redis: RedisUrl = Field(default="redis://127.0.0.1:6379/0", description="Redis or Valkey URL")
    kafka: KafkaServers = Field(default="127.0.0.1:9092", description="Kafka bootstrap servers")
    pool: str = Field(default="default", pattern=NAME, max_length=64, description="pool served")
    node: str = Field(
        default_factory=lambda: node_name_from_host(socket.gethostname()),
        pattern=NAME,
        max_length=64,
        description="name of this node, unique in its pool; from the host name when absent",
    )
    engine_url: HttpUrl = Field(
        default="http://127.0.0.1:8000", description="address of the engine's OpenAI API"
    )
    models: str = Field(
        default="", description="models served, comma separated; asked of the engine when absent"
    )
    loras: str = Field(
        default="", description="LoRA adapters that the engine has loaded, comma separated; none when absent"
    )
    role: Role = Field(default=Role.FUSED, description="what the node does")
    max_running: int = Field(default=32, ge=1, le=4096, description="requests run at once")
    max_model_len: int = Field(default=131_072, ge=1, description="longest prompt and answer, tokens")
    kv_total_tokens: int = Field(default=0, ge=0, description="KV cache, tokens; 0 when unknown")
    block_size: int = Field(
        default=256, ge=16, le=4096, description="routing block, tokens; the same for the whole pool"
    )
    engine_block_size: int = Field(
        default=0, ge=0, le=4096, description="the engine's KV block, tokens; asked of the engine when 0"
    )
    engine_version: str = Field(
        default="", max_length=80, description="the engine's version; asked of the engine when absent"
    )
    kv_events_endpoint: MaybeZeroMQ = Field(
        default="",
        description="the engine's KV events on ZeroMQ: tcp://host:port connects, tcp://*:port binds; "
        "none when absent",
    )
    kv_replay_endpoint: MaybeZeroMQ = Field(default="", description="where the engine replays KV events")
    kv_events_topic: str = Field(default="", description="topic of the KV events; all when absent")
    max_view_blocks: int = Field(
        default=2_000_000, ge=1000, description="engine blocks kept of the cache view; beyond, it is partial"
    )
    engine_metrics_interval_s: float = Field(
        default=1.0, ge=0.1, le=60, description="time between two looks at the engine's /metrics, seconds"
    )
    gpus: str = Field(
        default="", description="GPU numbers of the engine, comma separated; CUDA_VISIBLE_DEVICES when absent"
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port of /metrics and /health, 0 for any"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of /metrics and /health")
    heartbeat_ttl_s: float = Field(
        default=2.0, ge=0.2, le=60, description="silence that fences this node, seconds"
    )
    claim_lease_s: float = Field(default=10.0, ge=1, le=600, description="lease of a claimed job, seconds")
    report_interval_s: float = Field(
        default=1.0, ge=0.05, le=10, description="longest time between reports, seconds"
    )
    min_report_interval_s: float = Field(
        default=0.02, ge=0.001, le=1, description="shortest time between reports, seconds"
    )
    chunk_interval_s: float = Field(
        default=0.02, ge=0, le=1, description="tokens of this time share a chunk, seconds"
    )
    first_token_timeout_s: float = Field(
        default=600, ge=0.1, description="longest wait for a first token, seconds"
    )
    inter_token_timeout_s: float = Field(
        default=30, ge=0.1, description="longest wait between tokens, seconds"
    )
    drain_grace_s: float = Field(
        default=30, ge=0, le=86_400, description="time to finish when told to stop, seconds"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least level logged"
    )

    @property
    def model_names(self) -> tuple[str, ...]:
        """`models` as names."""
        return _names(self.models)

    @property
    def lora_names(self) -> tuple[str, ...]:
        """`loras` as names."""
        return _names(self.loras)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())
