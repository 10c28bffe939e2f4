"""A leader's memory as it is under load: nodes that reported, caches, requests held, and time that goes by.

Nothing here is measured. It keeps the state that the measured calls meet: nodes compute prompts one after the
other, exactly as fast as predicted, and report on change and each second; for what is bound the oldest ends.
"""

from __future__ import annotations

import random
from collections import deque

from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import Medium, NodeIdentity, NodeReport
from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.fleet import Fleet, NodeState
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting
from dispatcher.services.state import Bound, LeaderState
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics
from tests.bench.conversations import SYSTEM_SHARE, Blocks, Conversations

MODEL = "m"
BLOCK_TOKENS = 256
MAX_RUNNING = 32
MOST_HELD = 16
HELD_TOKENS = 600_000
"""Requests that a node holds, in the mean: so many, but at most of so many tokens."""
KV_TOKENS = 4_000_000
"""Room enough: what waits for a node that is full is not what is measured."""
UTILISATION = 0.6
"""The share of time in which a node computes prompts, in the mean."""
GAIN = 0.1
"""Of the running mean of what a prompt takes."""
REPORT_S = 1.0
EPOCH_S = 1_700_000_000.0


class SteadyFleet:
    """`nodes` nodes that hold `cached_blocks` blocks each, of prompts of about `blocks` blocks."""

    def __init__(
        self, nodes: int, blocks: int, *, cached_blocks: int, seed: int = 1, is_shared: bool = True
    ) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        clock = Clock(monotonic=lambda: self.now_s, epoch_s=lambda: EPOCH_S + self.now_s)
        self.index = PrefixIndex()
        self.state = LeaderState(
            names=Names(),
            fleet=Fleet(),
            index=self.index,
            clock=clock,
            rng=self.rng,
            metrics=DispatcherMetrics(CollectorRegistry()),
            log=Log(),
        )
        self.scheduler = Scheduler(
            self.state.fleet, self.index, rng=self.rng, healthy_s=clock.monotonic, now_s=clock.monotonic
        )
        self.state.window.longer_ms = self.scheduler.longer_ms
        self._offset = 0
        self._numbers: dict[str, int] = {}
        self._held: deque[str] = deque()
        self._reported_s = self.now_s
        self._computing: dict[str, deque[tuple[float, int]]] = {}
        self._mean_s = 0.0
        per_node = max(1, cached_blocks // blocks)
        self.conversations = Conversations(nodes * per_node, blocks, self.rng, is_shared=is_shared)
        self.nodes = [self._node(number) for number in range(nodes)]
        held = max(1, min(MOST_HELD, HELD_TOKENS // (blocks * BLOCK_TOKENS)))
        self._most_held = held * nodes
        self._fill(per_node)

    def _node(self, number: int) -> NodeState:
        identity = NodeIdentity(
            node=f"n{number}",
            incarnation="x",
            models=(MODEL,),
            max_running=MAX_RUNNING,
            max_model_len=1 << 20,
            kv_total_tokens=KV_TOKENS,
            engine_block_size=16,
            routing_block_size=BLOCK_TOKENS,
        )
        node = self.state.fleet.admit(identity, self.now_s)
        node.admitted = True
        self._numbers[node.name] = 0
        return node

    def _fill(self, per_node: int) -> None:
        known = self.conversations.under_way
        if not known:
            known = [self.conversations.next() for _ in range(len(self.nodes) * per_node)]
        for number, prompt in enumerate(known):
            self.index.store(self.nodes[number % len(self.nodes)].name, Medium.GPU, prompt)
        for number in range(self._most_held):
            node = self.nodes[number % len(self.nodes)]
            waiting = self.request(known[number % len(known)])
            self.bind(waiting, node, uncached_tokens=0, prefill_s=0.0)
        for node in self.nodes:
            self.report(node, queued_tokens=0)

    def request(self, blocks: Blocks | None = None) -> Waiting:
        """The next request, as intake makes it."""
        prompt = self.conversations.next() if blocks is None else blocks
        self._follow_replaced()
        ref = Ref(Lane.INTERACTIVE, 0, self._offset)
        self._offset += 1
        now_ms = self.state.clock.now_ms()
        envelope = Envelope(
            ref=str(ref),
            id=f"r{ref.offset}",
            model=MODEL,
            prompt_tokens=len(prompt) * BLOCK_TOKENS + self.rng.randrange(1, BLOCK_TOKENS),
            max_tokens=256,
            tokens_exact=True,
            block_size=BLOCK_TOKENS,
            block_hashes=tuple(block.hex() for block in prompt),
            appended_ms=now_ms,
            deadline_at_ms=now_ms + 600_000,
            fingerprint="0123456789abcdef",
        )
        return Waiting(ref=ref, envelope=envelope, entered_ms=now_ms)

    def _follow_replaced(self) -> None:
        """What a node held of a conversation that ended makes room for what it holds of the new one."""
        for number, ended, begun in self.conversations.replaced:
            home = self.nodes[number % len(self.nodes)].name
            self.index.remove(home, Medium.GPU, ended[len(ended) // SYSTEM_SHARE :])
            self.index.store(home, Medium.GPU, begun)
        self.conversations.replaced.clear()

    def bind(self, waiting: Waiting, node: NodeState, *, uncached_tokens: int, prefill_s: float) -> Bound:
        """Bind as `services.dispatch` does."""
        ref = waiting.envelope.ref
        state = self.state
        n = state.attempts.get(ref, 0) + 1
        state.attempts[ref] = n
        bound = Bound(
            envelope=waiting.envelope,
            job=JobId(state.names.pool, node.name, waiting.ref, Attempt(1, n)),
            failures=waiting.failures,
            excluded=waiting.excluded,
            crashed=waiting.crashed,
        )
        state.bind(ref, bound, uncached_tokens=uncached_tokens, prefill_s=prefill_s)
        self._held.append(ref)
        return bound

    def number(self, node: str, ref: str) -> None:
        """What the assign script's answer brings."""
        self._numbers[node] += 1
        self.state.fleet.note_number(node, ref, self._numbers[node])

    def report(self, node: NodeState, *, queued_tokens: int) -> None:
        """A node tells what it has."""
        node.hear(
            NodeReport(
                node=node.name,
                incarnation="x",
                sequence=1,
                running=len(node.held),
                held_tokens=node.held_tokens,
                queued_uncached_tokens=queued_tokens,
                kv_used_tokens=min(KV_TOKENS, node.held_tokens),
                kv_total_tokens=KV_TOKENS,
                seen_seq=self._numbers[node.name],
            ),
            self.now_s,
            self.now_s,
        )

    def pass_time(self, chosen: list[tuple[Waiting, Choice]], offered: int) -> None:
        """Let what was chosen be computed, as many older ones end, and the time of `offered` go by."""
        for waiting, choice in chosen:
            name = choice.node.name
            self.number(name, waiting.envelope.ref)
            queue = self._computing.setdefault(name, deque())
            begins_s = queue[-1][0] if queue else self.now_s
            queue.append((begins_s + choice.prefill_s, choice.uncached_tokens))
            self._mean_s += (GAIN if self._mean_s else 1.0) * (choice.prefill_s - self._mean_s)
        self.now_s += offered * self._mean_s / len(self.nodes) / UTILISATION
        fleet = self.state.fleet
        for name, queue in list(self._computing.items()):
            while queue and queue[0][0] <= self.now_s:
                queue.popleft()
            self.report(fleet.nodes[name], queued_tokens=sum(tokens for _, tokens in queue))
            if not queue:
                del self._computing[name]
        if self.now_s - self._reported_s >= REPORT_S:
            self._reported_s = self.now_s
            for node in self.nodes:
                if node.name not in self._computing:
                    self.report(node, queued_tokens=0)
        while len(self._held) > self._most_held:
            ref = self._held.popleft()
            self.state.unbind(ref, answered=True)
            self.state.forget(ref)
