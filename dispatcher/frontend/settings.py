"""Settings of a frontend, each with unit and bounds; `backends.environment` says where they come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from dispatcher.backends.access import AccessSettings
from dispatcher.backends.addresses import KafkaServers, MaybeRedisUrl
from dispatcher.backends.topics import MAX_RECORD_BYTES
from dispatcher.client.lease import MIN_TTL_S
from dispatcher.protocol.names import POOL_PATTERN

MAX_BODY_BYTES = MAX_RECORD_BYTES - (64 << 10)
"""A body is one Kafka record; the margin is for its key, headers and framing."""


class FrontendSettings(AccessSettings):
    """Everything a frontend can be told."""

    model_config = SettingsConfigDict(env_prefix="FLEXLB_", extra="ignore", frozen=True)

    kafka: KafkaServers = Field(default="127.0.0.1:9092", description="Kafka bootstrap servers")
    redis: MaybeRedisUrl = Field(
        default="", description="Redis or Valkey URL, to list the fleet's models; '' for none"
    )
    pool: str = Field(
        default="default", pattern=rf"^{POOL_PATTERN}$", max_length=64, description="pool served"
    )
    host: str = Field(default="127.0.0.1", description="address to serve on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to serve on, 0 for any")
    models: str = Field(default="", description="models listed when Redis tells none, comma-separated")
    api_keys_file: str = Field(
        default="", description="file of lines key[:tenant]; without it everybody may ask"
    )
    block_size: int = Field(
        default=256, ge=16, le=4096, description="routing block, tokens; the same for the whole pool"
    )
    isolate_tenants: bool = Field(
        default=False, description="keep each tenant's cached prompts from the others, as dispatchers do"
    )
    max_body_bytes: int = Field(
        default=MAX_BODY_BYTES, ge=1024, le=MAX_BODY_BYTES, description="largest body accepted, bytes"
    )
    max_held_bytes: int = Field(
        default=256 << 20, ge=MAX_BODY_BYTES, description="bytes of bodies held at once before Kafka has them"
    )
    max_in_flight: int = Field(
        default=4096, ge=1, le=100_000, description="requests in flight, beyond which the answer is 429"
    )
    header_timeout_s: float = Field(
        default=30, ge=0.1, le=3600, description="time for a request's headers to come in, seconds"
    )
    body_timeout_s: float = Field(
        default=30, ge=0.1, le=3600, description="time for a request's body to come in, seconds"
    )
    default_deadline_s: float = Field(
        default=600, ge=1, le=604_800, description="deadline of requests without one, seconds"
    )
    outcome_grace_s: float = Field(
        default=30, ge=0.1, le=3600, description="wait for an outcome beyond the deadline, seconds"
    )
    lease_ttl_s: float = Field(
        default=15,
        ge=0,
        le=60,
        description="silence after which its requests are cancelled, 3 to 60 seconds; 0 for never",
    )
    shutdown_grace_s: float = Field(
        default=30, ge=0, le=3600, description="time for running requests to end at a stop, seconds"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least level logged"
    )

    @field_validator("lease_ttl_s")
    @classmethod
    def _is_none_or_long_enough(cls, ttl_s: float) -> float:
        if 0 < ttl_s < MIN_TTL_S:
            raise ValueError(f"expected 0 or at least {MIN_TTL_S:g} seconds, seen {ttl_s:g}")
        return ttl_s

    @property
    def model_names(self) -> tuple[str, ...]:
        """`models` as names."""
        return tuple(name for part in self.models.split(",") if (name := part.strip()))
