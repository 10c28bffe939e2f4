"""What one incarnation of a node holds: the one object that its services share.

An attempt is held from its claim until Redis has accepted its ending, and counts against capacity for
as long, so that what piles up while Redis is away is bounded by what may run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dispatcher.backends.clock import Clock, ServerClock
from dispatcher.backends.node_store import Claimed, Ending
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.node import NodeIdentity
from dispatcher.telemetry.clock_offset import ClockOffset
from dispatcher.telemetry.logging import Log
from workers_agent.engines.engine_load import EngineLoad
from workers_agent.engines.gpu import GpuLoad
from workers_agent.metrics import AgentMetrics


@dataclass(kw_only=True)
class Held:
    """One attempt in our hands. `ending` once it has one; `task` while it runs.

    `checkpoint` tells what the next attempt would go on from.
    """

    claimed: Claimed
    envelope: Envelope
    has_token: bool = False
    task: asyncio.Task[None] | None = None
    ending: Ending | None = None
    checkpoint: Callable[[], bytes] = bytes

    @property
    def tokens(self) -> int:
        """The tokens it was counted with."""
        return self.envelope.cost_tokens

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens it has yet to compute before its first token, by the leader's prediction."""
        if self.has_token or self.ending is not None:
            return 0
        return max(1, self.envelope.prompt_tokens - self.claimed.hit_tokens)


@dataclass(kw_only=True)
class AgentState:
    """The ledger of one incarnation.

    `is_suspect` is set when a stream stalled: the engine gets no work before a probe has succeeded.
    `server_clock` is Redis's: deadlines and the times in outcomes go by it. `progress_s` is when any stream
    last brought something.
    """

    identity: NodeIdentity
    clock: Clock
    server_clock: ServerClock
    metrics: AgentMetrics
    log: Log
    held: dict[str, Held] = field(default_factory=dict)
    generation: str = ""
    adoption_until_s: float = 0.0
    seen_seq: int = 0
    backlog: bool = True
    draining: bool = False
    left: bool = False
    engine_ok: bool = True
    is_suspect: bool = False
    load: EngineLoad = field(default_factory=EngineLoad)
    gpu: GpuLoad = field(default_factory=GpuLoad)
    progress_s: float = 0.0
    cache_sequence: int = 0
    cache_blocks: int = 0
    cache_partial: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    offset: ClockOffset = field(init=False)

    def __post_init__(self) -> None:
        self.offset = ClockOffset(self.metrics.clock_ahead_s, self.log)

    @property
    def free(self) -> int:
        """Slots that a claim may fill."""
        return 0 if self.draining else max(0, self.identity.max_running - len(self.held))

    @property
    def awaits_adoption(self) -> bool:
        """Whether Redis may not know yet what we hold, because it lost its data a moment ago."""
        return not self.generation or self.clock.monotonic() < self.adoption_until_s

    def note_clock(self) -> None:
        """Show how far the own wall clock is ahead; once for each time that it is too far."""
        self.offset.note(self.server_clock.own_ahead_s)

    def take(self, claimed: Claimed, envelope: Envelope) -> Held:
        """Hold an attempt."""
        held = self.held[claimed.job] = Held(claimed=claimed, envelope=envelope)
        self.seen_seq = max(self.seen_seq, claimed.seq)
        self._note()
        return held

    def note_token(self, job: str) -> None:
        """Note an attempt's first token: its prompt is computed."""
        held = self.held.get(job)
        if held is not None and not held.has_token:
            held.has_token = True
            self.changed.set()

    def end(self, job: str, ending: Ending) -> None:
        """Note how an attempt ended, if it is still ours; `finish` makes it known."""
        held = self.held.get(job)
        if held is not None:
            held.ending = ending
            self.ended.set()
            self.changed.set()

    def drop(self, job: str) -> None:
        """Hold it no more; if it still runs it is aborted and says nothing."""
        held = self.held.pop(job, None)
        if held is None:
            return
        if held.task is not None and held.ending is None:
            held.task.cancel()
        if not self.held:
            self.emptied.set()
        self.room.set()
        self._note()

    def _note(self) -> None:
        self.metrics.running.set(len(self.held))
        self.changed.set()

    def checkpoints(self) -> dict[str, bytes]:
        """What the next attempts of all that runs would go on from, where there is something."""
        found = ((job, held.checkpoint()) for job, held in self.held.items() if held.ending is None)
        return {job: checkpoint for job, checkpoint in found if checkpoint}

    def inventory(self) -> dict[str, tuple[bytes, bytes]]:
        """Everything held, for a Redis that has lost it."""
        return {job: (held.claimed.envelope, held.claimed.data) for job, held in self.held.items()}
