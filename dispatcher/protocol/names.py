"""Every Redis key, Kafka topic, group, lock and transactional id, each made in one place.

All of them carry the pool, so that pools can share servers or live on different ones. Job ids use
RQ's alphabet `[A-Za-z0-9_-]` only and are built from the pool, the node, the request's ref and the
attempt, never from a client's string, so that Redis ACL patterns can confine an agent to its node.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

POOL_PATTERN = r"[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*"
"""Pools and nodes: letters, digits, `_`, single inner `-`; `--` is the separator inside job ids."""
_NAME = re.compile(rf"{POOL_PATTERN}\Z")
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_PARTITION = r"(?:0|[1-9][0-9]{0,8})"
_JOB_ID = re.compile(
    rf"({POOL_PATTERN})--({POOL_PATTERN})--([ib]{_PARTITION}_{_NUMBER})--({_NUMBER})_({_NUMBER})\Z"
)
REF_PATTERN = rf"^([ib])({_PARTITION})_({_NUMBER})\Z"
_REF = re.compile(REF_PATTERN)
_ATTEMPT = re.compile(rf"({_NUMBER})_({_NUMBER})\Z")
MAX_NAME_CHARS = 64


class Lane(StrEnum):
    """The two request topics; the value is the lane's letter in refs."""

    INTERACTIVE = "i"
    BATCH = "b"


def check_name(kind: str, value: str) -> str:
    """Return `value` if it can name a pool or a node.

    Raises:
        ValueError: it is empty, longer than 64 characters or has characters outside the alphabet.
    """
    if len(value) <= MAX_NAME_CHARS and _NAME.match(value):
        return value
    raise ValueError(
        f"{kind} name: expected 1-{MAX_NAME_CHARS} characters of letters, digits, '_' and single inner '-', "
        f"seen {value[:80]!r}; rename the {kind}"
    )


def node_name_from_host(hostname: str) -> str:
    """Turn a host name into a valid node name: every run of other characters becomes one `_`."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", hostname).strip("_")[:MAX_NAME_CHARS] or "node"


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """Where a request record lies in Kafka: the identity that everything inside FlexLB uses."""

    lane: Lane
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.lane.value}{self.partition}_{self.offset}"

    @property
    def source(self) -> str:
        """The lane and partition, e.g. `i3`: the field name of its marks."""
        return f"{self.lane.value}{self.partition}"

    @staticmethod
    def parse(text: str) -> Ref:
        """Read what `str(ref)` wrote; ValueError for anything else."""
        found = _REF.match(text)
        if not found:
            raise ValueError(f"ref: expected <i|b><partition>_<offset> like i3_1024, seen {text[:60]!r}")
        return Ref(Lane(found[1]), int(found[2]), int(found[3]))


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try of a request, ordered: the epoch number of the leader that bound it, then a count."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}_{self.n}"

    @staticmethod
    def parse(text: str) -> Attempt:
        """Read what `str(attempt)` wrote; ValueError for anything else."""
        found = _ATTEMPT.match(text)
        if not found:
            raise ValueError(f"attempt: expected <epoch>_<n>, seen {text[:60]!r}")
        return Attempt(int(found[1]), int(found[2]))


@dataclass(frozen=True, slots=True)
class JobId:
    """An RQ job id: `<pool>--<node>--<ref>--<attempt>`."""

    pool: str
    node: str
    ref: Ref
    attempt: Attempt

    def __str__(self) -> str:
        return f"{self.pool}--{self.node}--{self.ref}--{self.attempt}"

    @staticmethod
    def parse(text: str) -> JobId:
        """Read a job id; ValueError for one that FlexLB did not make (a foreign job)."""
        found = _JOB_ID.match(text)
        if not found:
            raise ValueError(f"job id: expected <pool>--<node>--<ref>--<attempt>, seen {text[:120]!r}")
        return JobId(found[1], found[2], Ref.parse(found[3]), Attempt(int(found[4]), int(found[5])))


@dataclass(frozen=True, slots=True)
class Names:
    """All names of one pool.

    Redis (prefix `flexlb:<pool>:`; L = leader, A = an agent, for its own node only, O = an operator):

    | name                    | type   | lives                | writes | reads |
    |-------------------------|--------|----------------------|--------|-------|
    | leader                  | string | lock TTL             | L      | L     |
    | epoch                   | string | permanent            | L      | L     |
    | renewals                | string | permanent            | L      | L     |
    | generation              | hash   | permanent            | L      | L, A  |
    | marks                   | hash   | permanent            | L      | L     |
    | above:<lane><partition> | zset   | until the mark passes| L      | L     |
    | settled                 | hash   | permanent            | L      | L     |
    | id:<digest>             | string | 10 min               | L      | L     |
    | pending                 | zset   | while in this place  | L      | L     |
    | pending:<ref>           | hash   | while in this place  | L      | L     |
    | closing                 | stream | until published      | L, A+  | L     |
    | explanations            | hash   | 1 h after the last   | L      | O     |
    | explained               | zset   | 1 h after the last   | L      | L     |
    | reports                 | stream | capped               | A+, O+ | L     |
    | blocks                  | stream | capped               | A+     | L     |
    | nodes                   | set    | permanent            | L      | L     |
    | cordons                 | hash   | permanent            | O      | L     |
    | node:<n>                | hash   | 1 h after last report| L, A   | L, A  |
    | node:<n>:load           | hash   | heartbeat TTL        | A      | L     |
    | node:<n>:claimed        | zset   | while claimed        | L, A   | L, A  |
    | node:<n>:held           | hash   | 1 min                | A      | L     |
    | node:<n>:control        | stream | capped, 1 h          | L      | A     |
    | node:<n>:claim          | string | 10 min               | A      | A     |
    | node:<n>:blocks:<tier>  | set    | 1 h after last change| A      | L     |

    A+ is append only. RQ's own keys, as RQ 3 lays them out, with queue `<pool>--<node>`:

    | rq:queues, rq:workers, rq:workers:<q> | set  | permanent           | L    | RQ tools |
    | rq:queue:<q>, rq:queue:<q>:intermediate | list | while queued      | L, A | A, RQ    |
    | rq:job:<job id>                       | hash | until completed; 1 day after a failure | L, A | A, RQ |
    | rq:wip:<q>                            | zset | while claimed       | L, A | RQ       |
    | rq:failed:<q>                         | zset | 1 day, newest 200   | L    | RQ tools |
    | rq:worker:<q>                         | hash | heartbeat           | A    | RQ       |

    Kafka (prefix `flexlb.<pool>.`): see `topics`, `group`, `transactional_id`.
    """

    pool: str = "default"

    def __post_init__(self) -> None:
        check_name("pool", self.pool)

    # Kafka

    def requests(self, lane: Lane) -> str:
        """The topic of a lane: key request id, value a request."""
        return f"flexlb.{self.pool}.requests" + (".batch" if lane is Lane.BATCH else "")

    @property
    def bodies(self) -> str:
        """Bodies above 16 kB, by reference: written by clients, read by agents."""
        return f"flexlb.{self.pool}.requests.bodies"

    @property
    def cancels(self) -> str:
        """Cancel records: written by clients, read by the leader."""
        return f"flexlb.{self.pool}.requests.cancel"

    @property
    def dead(self) -> str:
        """Dead letters: the original record, attempts and reasons; written in the leader's transactions."""
        return f"flexlb.{self.pool}.requests.dead"

    @property
    def replies(self) -> str:
        """Chunks: written by agents, read by clients; a request may name a partition."""
        return f"flexlb.{self.pool}.replies"

    @property
    def outcomes(self) -> str:
        """The one terminal outcome per request, in the leader's transactions."""
        return f"flexlb.{self.pool}.outcomes"

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics of the pool."""
        return (
            self.requests(Lane.INTERACTIVE),
            self.requests(Lane.BATCH),
            self.bodies,
            self.cancels,
            self.replies,
            self.outcomes,
            self.dead,
        )

    @property
    def group(self) -> str:
        """The consumer group whose committed offsets are the *finished* marks."""
        return f"flexlb.{self.pool}.dispatcher"

    @property
    def transactional_id(self) -> str:
        """One per pool: a new leader's producer fences the old one's at the broker."""
        return f"flexlb.{self.pool}.outcomes"

    # Redis: the pool's own keys

    @property
    def prefix(self) -> str:
        """What every key of the pool begins with; scripts append to it."""
        return f"flexlb:{self.pool}:"

    @property
    def leader(self) -> str:
        """The leader lock: `<epoch>:<owner>`."""
        return f"{self.prefix}leader"

    @property
    def epoch(self) -> str:
        """The newest epoch ever given out, `<epoch>:<owner>`: the fence of every leader script."""
        return f"{self.prefix}epoch"

    @property
    def renewals(self) -> str:
        """A counter bumped by each renewal, by which standbys see a leader that stands still."""
        return f"{self.prefix}renewals"

    @property
    def generation(self) -> str:
        """`id` (uuid of this Redis data set) and `counter` (bumped at each move that a leader makes)."""
        return f"{self.prefix}generation"

    @property
    def marks(self) -> str:
        """*Assigned* marks by `<lane><partition>`: the lowest offset not yet taken into Redis."""
        return f"{self.prefix}marks"

    def above(self, source: str) -> str:
        """Offsets above the *assigned* mark of `<lane><partition>` that are taken already."""
        return f"{self.prefix}above:{source}"

    @property
    def settled(self) -> str:
        """Position in `outcomes`, by partition, up to which closing entries have been removed."""
        return f"{self.prefix}settled"

    def identity(self, tenant: str, request_id: str) -> str:
        """Which ref a (tenant, id) belongs to, for ten minutes: `<ref>|<fingerprint>`."""
        return f"{self.prefix}id:{self.digest(tenant, request_id)}"

    @staticmethod
    def digest(tenant: str, request_id: str) -> str:
        """What stands for a (tenant, id) in keys and fields."""
        return hashlib.sha256(f"{len(tenant)}:{tenant}{request_id}".encode()).hexdigest()[:32]

    @property
    def explanations(self) -> str:
        """Why requests went where they went, by digest of (tenant, id): explanations, one a line."""
        return f"{self.prefix}explanations"

    @property
    def explained(self) -> str:
        """The digests in `explanations` by the time of their newest (server epoch ms), to trim it by."""
        return f"{self.prefix}explained"

    @property
    def pending(self) -> str:
        """Requests waiting to be bound again: ref by not-before (epoch ms)."""
        return f"{self.prefix}pending"

    def pending_job(self, ref: Ref | str) -> str:
        """The job hash of a pending request: the RQ hash itself, renamed."""
        return f"{self.prefix}pending:{ref}"

    @property
    def closing(self) -> str:
        """Attempts that ended: outcomes not yet published, failures not yet decided."""
        return f"{self.prefix}closing"

    @property
    def reports(self) -> str:
        """Registrations and load reports of all nodes, in order."""
        return f"{self.prefix}reports"

    @property
    def blocks(self) -> str:
        """Cache-block events of all nodes, in order."""
        return f"{self.prefix}blocks"

    @property
    def nodes(self) -> str:
        """The nodes that the leader has admitted."""
        return f"{self.prefix}nodes"

    @property
    def cordons(self) -> str:
        """What operators wish, by node: `cordon` or `drain`."""
        return f"{self.prefix}cordons"

    def node(self, node: str) -> str:
        """Identity of a node: incarnation, fenced incarnation, role, models, capacity, counters."""
        return f"{self.prefix}node:{node}"

    def load(self, node: str) -> str:
        """Last load report of a node; its expiry is the heartbeat's."""
        return f"{self.prefix}node:{node}:load"

    def claimed(self, node: str) -> str:
        """Job ids claimed by a node, by the end of their lease (server epoch ms)."""
        return f"{self.prefix}node:{node}:claimed"

    def held(self, node: str) -> str:
        """Inventory of a node that registers anew: job id to (envelope, data), for adoption."""
        return f"{self.prefix}node:{node}:held"

    def control(self, node: str) -> str:
        """What the leader tells a node: cancels and fences."""
        return f"{self.prefix}node:{node}:control"

    def last_claim(self, node: str) -> str:
        """The last claim's job ids, so that a repeated claim gives the same answer."""
        return f"{self.prefix}node:{node}:claim"

    def cached_blocks(self, node: str, medium: str) -> str:
        """Routing blocks that a node holds in one tier: raw 8-byte hashes, as of its `blocks_seq`."""
        return f"{self.prefix}node:{node}:blocks:{medium}"

    def node_of(self, key: str) -> str:
        """The node whose agent may write `key`, '' when it is none's of this pool."""
        own, queue = f"{self.prefix}node:", f"{self.pool}--"
        if key.startswith(own):
            return key.removeprefix(own).partition(":")[0]
        for kind in ("rq:queue:", "rq:wip:", "rq:job:", "rq:worker:"):
            if key.startswith(kind + queue):
                return key.removeprefix(kind + queue).partition("--")[0].partition(":")[0]
        return ""

    # Redis: RQ's data model

    def queue(self, node: str) -> str:
        """The RQ queue name of a node."""
        return f"{self.pool}--{node}"

    def queue_key(self, node: str) -> str:
        """RQ's list of queued job ids."""
        return f"rq:queue:{self.queue(node)}"

    def intermediate(self, node: str) -> str:
        """RQ's list of job ids in delivery."""
        return f"rq:queue:{self.queue(node)}:intermediate"

    def wip(self, node: str) -> str:
        """RQ's StartedJobRegistry."""
        return f"rq:wip:{self.queue(node)}"

    def failed(self, node: str) -> str:
        """RQ's FailedJobRegistry."""
        return f"rq:failed:{self.queue(node)}"

    def worker(self, node: str) -> str:
        """RQ's worker hash of the agent; the worker's name is the queue's."""
        return f"rq:worker:{self.queue(node)}"

    @staticmethod
    def job(job_id: JobId | str) -> str:
        """RQ's job hash."""
        return f"rq:job:{job_id}"
