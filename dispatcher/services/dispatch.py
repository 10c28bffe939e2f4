"""Dispatch: bind waiting requests to nodes, a batch per script call, late.

Wakes when something waits or room appears. Choosing and reserving are one step in memory; the script
makes it true in Redis, or tells why not, and then the reservation is taken back. With a batching window the
script comes later, for a node's whole batch (`scheduling.batches`): until then a request is nowhere in Redis,
as if the script were under way.
"""

from __future__ import annotations

import asyncio

from dispatcher.backends.leader_store import AssignItem, LeaderStore
from dispatcher.backends.store_view import Placed
from dispatcher.protocol import codec
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.names import Attempt, JobId
from dispatcher.scheduling.batches import Batches
from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting
from dispatcher.services.close import Endings
from dispatcher.services.explain import Explain
from dispatcher.services.persist import until_answered
from dispatcher.services.state import Bound, LeaderState

Chosen = tuple[Waiting, Choice, Bound]


class Dispatch:
    """Binds one pool's requests.

    Args:
        batches: what is chosen waits here to be handed over.
        batch: the most requests of one script call, but for a batch that is larger.
    """

    def __init__(
        self,
        state: LeaderState,
        store: LeaderStore,
        endings: Endings,
        explain: Explain,
        *,
        scheduler: Scheduler,
        batches: Batches[Chosen],
        batch: int,
    ) -> None:
        self._state = state
        self._store = store
        self._endings = endings
        self._explain = explain
        self._scheduler = scheduler
        self._batches = batches
        self._batch = batch

    async def run(self) -> None:
        """Bind until cancelled."""
        state, batches = self._state, self._batches
        while True:
            next_due_s = state.release_due()
            chosen = self._choose()
            for one in chosen:
                _, choice, bound = one
                is_alone = bound.stage is Stage.DECODE  # the prompt's blocks are only lent
                batches.add(choice.node.name, one, state.clock.monotonic(), is_alone=is_alone)
            due = batches.take_due(state.clock.monotonic(), most=self._batch)
            if due:
                await self._assign(due)
                state.room.set()
                continue
            if chosen:
                # All of them wait for others; more may be chosen.
                state.room.set()
                await asyncio.sleep(0)
                continue
            state.work.clear()
            if (at_s := batches.next_at_s) is not None:
                left_s = max(0.0, at_s - state.clock.monotonic())
                next_due_s = left_s if next_due_s is None else min(left_s, next_due_s)
            try:
                async with asyncio.timeout(next_due_s):
                    await state.work.wait()
            except TimeoutError:
                pass

    def _choose(self) -> list[Chosen]:
        state = self._state
        chosen: list[Chosen] = []
        now_ms = state.clock.now_ms()
        round = state.window.begin_round()
        self._explain.begin()
        while len(chosen) < self._batch:
            found = state.window.choose(self._scheduler, round, now_ms)
            if found is None:
                break
            waiting, choice = found
            bound = self._bind(waiting, choice)
            self._explain.look(waiting, choice, round, bound.job.attempt)
            state.bind(
                waiting.envelope.ref,
                bound,
                uncached_tokens=choice.uncached_tokens,
                prefill_s=choice.prefill_s,
            )
            chosen.append((waiting, choice, bound))
        state.window.end_round(round)
        state.metrics.waits_for_holder.set(sum(round.passed.values()))
        return chosen

    def _bind(self, waiting: Waiting, choice: Choice) -> Bound:
        ref = waiting.envelope.ref
        n = self._state.attempts.get(ref, 0) + 1
        self._state.attempts[ref] = n
        node = choice.node.name
        return Bound(
            envelope=waiting.envelope,
            job=JobId(self._state.names.pool, node, waiting.ref, Attempt(self._store.lease.epoch, n)),
            failures=waiting.failures,
            excluded=waiting.excluded,
            crashed=waiting.crashed,
            hit_tokens=choice.hit_tokens,
            stage=choice.stage,
            handoff=waiting.handoff if choice.stage is Stage.DECODE else None,
        )

    async def _assign(self, batches: list[list[Chosen]]) -> None:
        state = self._state
        names = state.names
        chosen = [one for batch in batches for one in batch]
        if self._batches.is_on:
            self._hand_over(batches)
        items = []
        for waiting, choice, bound in chosen:
            envelope = waiting.envelope
            items.append(
                AssignItem(
                    job=bound.job,
                    incarnation=choice.node.identity.incarnation,
                    cost_tokens=envelope.cost_tokens,
                    from_pending=waiting.from_pending,
                    identity=names.identity(envelope.tenant, envelope.id),
                    fingerprint=envelope.fingerprint,
                    data=waiting.data,
                    envelope=b"" if waiting.from_pending else codec.encode(envelope),
                    hit_tokens=bound.hit_tokens,
                    stage=bound.stage,
                )
            )
        marks = {source: progress.assigned for source, progress in state.progress.items()}
        now_iso = state.clock.now_iso()
        answers = await until_answered(
            lambda: self._store.assign(items, marks, now_iso=now_iso), state.metrics
        )
        state.metrics.assign_batch.observe(len(items))
        now_ms = state.clock.now_ms()
        for (waiting, choice, _), (answer, number) in zip(chosen, answers, strict=True):
            is_bound = answer in {"ok", "already"}
            self._explain.tell(waiting.envelope.ref, is_bound=is_bound)
            if is_bound:
                state.fleet.note_number(choice.node.name, waiting.envelope.ref, number)
            await self._answered(waiting, choice, answer, now_ms)
        state.metrics.bound_requests.set(len(state.bound))

    def _hand_over(self, batches: list[list[Chosen]]) -> None:
        """Let what was bound earlier count as sent now."""
        now_s = self._state.clock.monotonic()
        for batch in batches:
            self._state.metrics.node_batch.observe(len(batch))
            for waiting, choice, _ in batch:
                self._state.fleet.hand_over(choice.node.name, waiting.envelope.ref, now_s)

    async def _answered(self, waiting: Waiting, choice: Choice, answer: str, now_ms: int) -> None:
        state = self._state
        ref = waiting.envelope.ref
        if answer in {"ok", "already"}:
            if not waiting.from_pending:
                state.progress_of(waiting.ref).take(waiting.ref.offset)
                state.retries.budget.bound(state.clock.monotonic())
            state.metrics.assigned.inc()
            waited_ms = max(0, now_ms - waiting.envelope.appended_ms)
            state.metrics.wait_s.observe(waited_ms / 1000)
            state.log.debug(
                "bound",
                ref=ref,
                node=choice.node.name,
                waited_ms=waited_ms,
                looked_at=choice.looked_at,
                prompt_tokens=waiting.envelope.prompt_tokens,
                hit_tokens=choice.hit_tokens,
                queue_s=round(choice.wait_s, 4),
                prefill_s=round(choice.prefill_s, 4),
                stage=choice.stage.value or None,
                stale=choice.is_stale,
            )
            return
        state.unbind(ref)
        if answer == "gone":
            choice.node.available = False
            state.enter(waiting)
            return
        if answer == "misread":
            state.log.error("pending job is gone, to be written anew", ref=ref)
            state.note_misread(Placed(ref=waiting.ref, job=None))
            return
        if answer == "cordoned":
            choice.node.cordoned = True
            state.enter(waiting)
            return
        owner, _, print_ = answer.removeprefix("dup|").partition("|")
        envelope = waiting.envelope
        state.forget(ref)
        if print_ == envelope.fingerprint:
            await self._endings.coalesce(waiting.ref, envelope.fingerprint)
        else:
            await self._endings.refuse_reused(waiting.ref, envelope, owner)
