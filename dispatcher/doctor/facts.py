"""What the doctor knows and what it says: facts from the servers, findings about them.

Facts hold what servers answered, in their own units, and `None` where they would not tell. Findings
are made of facts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dispatcher.protocol.node import NodeIdentity


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: what was found, and a command or a line of settings that mends it ('' when well)."""

    check: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class ClockReading:
    """Another clock against this host's: ahead by `offset_s`, known to within `within_s`."""

    offset_s: float
    within_s: float


@dataclass(frozen=True, kw_only=True)
class TopicFacts:
    """One topic: its worst partition's replication, and its effective configuration.

    `config` is None when the broker would not tell it.
    """

    partitions: int
    replicas: int
    in_sync: int
    leaderless: int = 0
    config: Mapping[str, str] | None = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldUp:
    """A partition whose readers of committed records are held up at `offset`, by an open transaction.

    `transactional_id` is whose that is: "" of nobody that Kafka names, None where Kafka does not tell.
    """

    partition: int
    offset: int
    behind: int
    transactional_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What became of a transaction that the doctor began and aborted: '' when it worked."""

    error: str = ""
    clock: ClockReading | None = None


@dataclass(frozen=True, kw_only=True)
class KafkaFacts:
    """One Kafka cluster. `topics` has None for those that do not exist; `probe` is None when not tried.

    `held_up` are partitions of `outcomes`; None when that could not be looked at.
    """

    bootstrap: str
    brokers: int
    apis: Mapping[int, int]
    topics: Mapping[str, TopicFacts | None]
    internal: Mapping[str, TopicFacts]
    broker_config: Mapping[str, str] | None
    probe: Probe | None = None
    held_up: tuple[HeldUp, ...] | None = ()


@dataclass(frozen=True, kw_only=True)
class RedisFacts:
    """One Redis or Valkey. `info` is None when this user may not ask; `denied` when ACL can't be asked.

    `denied` maps a command to the server's reason.
    """

    info: Mapping[str, object] | None
    appendfsync: str | None = None
    min_replicas: int | None = None
    user: str | None = None
    denied: Mapping[str, str] | None = None
    clock: ClockReading | None = None


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """A node that the leader admitted; `identity` is None when it can't be read."""

    node: str
    alive: bool
    is_fenced: bool = False
    identity: NodeIdentity | None = None


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """What Redis holds of a pool: the lock and its TTL (-1: none), the epoch, the generation, the nodes."""

    prefix: str
    leader: str
    leader_ttl_ms: int
    epoch: str
    generation: str
    redis_ms: int
    nodes: tuple[NodeFacts, ...] = ()
    forgotten: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What this pool's settings ask of its servers.

    `sizes` is the largest record of each topic, bytes; `keeps` the topics whose records must outlive
    twice the longest deadline.
    """

    pool: str
    longest_deadline_s: float
    block_size: int
    sizes: Mapping[str, int]
    keeps: frozenset[str]
    lanes: tuple[str, ...]
    partitions: int = 4
    replication: int = 1
