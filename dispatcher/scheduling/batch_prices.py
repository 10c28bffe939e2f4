"""Prices of many requests at once: `policies.prefill_cost` for a round of choices, by vectors.

Before a round's choices the requests whose turns come next are priced together, each for some holders of its
prefix and some random nodes of a large fleet: the same formula, for a fraction of the time. Choices are then
made one by one as ever. What was bound since makes its node dearer for those after it: where that was their
choice, the nodes that changed are priced anew. Those whose prompts begin as one that was bound since, by more
than any node held of them, are priced alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Rule
from dispatcher.scheduling.choice import MOST_HOLDERS, STEP_TOKENS, Choice, Planned
from dispatcher.scheduling.columns import Candidates, Columns, Floats, Rows
from dispatcher.scheduling.fleet import STALE_S
from dispatcher.scheduling.policies import Totals, choose_least, totals_of
from dispatcher.scheduling.prefix_index import Match
from dispatcher.scheduling.prompt_queue import BURST_S
from dispatcher.scheduling.stages import transfer_s

if TYPE_CHECKING:
    from dispatcher.scheduling.scheduler import Scheduler

FEWEST = 4
"""Requests that are worth pricing together."""


class BatchPrices:
    """The prices of one round."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._random: np.random.Generator | None = None
        self._columns: dict[str, Columns] = {}
        self._places: dict[str, int] = {}
        self._fresh: set[bytes] = set()

    def __contains__(self, ref: str) -> bool:
        return ref in self._places

    def clear(self) -> None:
        """Forget the prices of the last round."""
        self._places.clear()
        self._fresh.clear()

    def prepare(self, envelopes: Sequence[Envelope], blocks: Sequence[Sequence[bytes]]) -> None:
        """Price requests of one model, of which each may go to any node that is eligible."""
        scheduler = self._scheduler
        self._places.clear()
        if self._random is None:
            self._random = np.random.default_rng(self._rng.getrandbits(64))
        columns = self._columns_of(envelopes[0].model)
        if not columns.is_uniform:
            return
        columns.renew()
        columns.number(scheduler.index)
        matches = [scheduler.index.match(one) for one in blocks]
        rows = self._candidates(columns, matches)
        self._price(columns, envelopes, rows, columns.depths(matches, rows))
        self._nodes, self._loads, self._blocks = columns.nodes, columns.loads, blocks
        self._matches = matches
        self._deepest = [found[0].blocks if found else 0 for found in matches]
        self._places = {envelope.ref: at for at, envelope in enumerate(envelopes)}

    def take(self, envelope: Envelope, planned: Planned) -> Choice | None:
        """The choice for a request; None when it was not priced, or what it was priced by has changed."""
        at = self._places.pop(envelope.ref, None)
        if at is None:
            return None
        row = self._chosen_rows[at]
        blocks, deepest = self._blocks[at], self._deepest[at]
        if row < 0 or (deepest < len(blocks) and blocks[deepest] in self._fresh):
            # No node may take it, or one bound to in this round is going to hold more of it than any did.
            return None
        node = self._nodes[row]
        if node.known_load is not self._loads[row] or planned or not node.is_eligible:
            choice = self._choose_again(at, envelope, planned)
        else:
            hit = self._chosen_hits[at]
            choice = Choice(
                node=node,
                has_room=self._has_room[at],
                hit_tokens=hit,
                uncached_tokens=max(1, envelope.prompt_tokens - hit),
                wait_s=self._chosen_waits[at],
                prefill_s=self._chosen_prefills[at],
                looked_at=self._rows.shape[1],
                is_stale=self._scheduler.is_stale(node),
                rule=self._rule(at),
                candidates=Candidates(self._nodes, self._rows[at]),
            )
        if choice is not None and choice.has_room:
            self._fresh.update(blocks)
        return choice

    def _choose_again(self, at: int, envelope: Envelope, planned: Planned) -> Choice | None:
        """The choice with what has changed priced anew: where others were bound in this round."""
        nodes, loads = self._nodes, self._loads
        totals, hits = self._totals[at].tolist(), self._hits[at].tolist()
        waits_s, prefills_s = self._waits[at].tolist(), self._prefills[at].tolist()
        known: dict[int, tuple[float, int, float, float]] = {}
        changed: list[int] = []
        for row, total_s, hit, wait_s, prefill_s in zip(
            self._rows[at].tolist(), totals, hits, waits_s, prefills_s, strict=True
        ):
            node = nodes[row]
            if total_s == math.inf:
                continue
            if node.known_load is not loads[row]:
                changed.append(row)
            else:
                total_s += planned.get(node.name, 0.0) if planned else 0.0
                known[row] = total_s, int(hit), wait_s, prefill_s
        if changed:
            touched = [nodes[row] for row in changed]
            anew = totals_of(self._scheduler, envelope, touched, planned, self._matches[at])
            known.update(zip(changed, zip(*anew, strict=True), strict=True))
        if not known:
            return None
        columns = [list(column) for column in zip(*known.values(), strict=True)]
        choice = choose_least(
            self._scheduler, envelope, [nodes[row] for row in known], Totals(*columns), planned
        )
        return choice if choice.node.is_eligible else None

    def note(self, blocks: Sequence[bytes]) -> None:
        """Note what a choice that was priced alone will have cached, for those still to be taken."""
        if self._places:
            self._fresh.update(blocks)

    def _rule(self, at: int) -> Rule:
        if self._near[at] == 1:
            return Rule.LEAST_COST
        return Rule.MOST_CACHED if self._most_cached[at] == 1 else Rule.CHANCE

    def _columns_of(self, model: str) -> Columns:
        fleet = self._scheduler.fleet
        columns = self._columns.get(model)
        if columns is None or columns.version != fleet.version:
            self._columns = {name: one for name, one in self._columns.items() if one.version == fleet.version}
            columns = self._columns[model] = Columns(fleet.serving(model), fleet.version)
        return columns

    def _candidates(self, columns: Columns, matches: Sequence[list[Match]]) -> Rows:
        """For each request the rows of some holders, and of random nodes, one of each part of the fleet."""
        scheduler = self._scheduler
        assert self._random is not None
        count = MOST_HOLDERS + scheduler.parameters.sampled
        # Parts are counted from anywhere: holders take the place of the first ones.
        first = self._random.random((len(matches), 1)) * count
        drawn = (self._random.random((len(matches), count)) + np.arange(count) + first) % count
        rows: Rows = (drawn * (len(columns.nodes) / count)).astype(np.intp)
        row_of, holding = columns.row_of, scheduler.index.holding
        for at, found in enumerate(matches):
            if found:
                held = [
                    row for number in holding(found, MOST_HOLDERS, self._rng) if (row := row_of[number]) >= 0
                ]
                rows[at, : len(held)] = held
        return rows

    def _price(self, columns: Columns, envelopes: Sequence[Envelope], rows: Rows, depths: Rows) -> None:
        """What `policies.prefill_cost` says: see there."""
        scheduler = self._scheduler
        parameters, now_s = scheduler.parameters, scheduler.now_s
        first = columns.nodes[0]
        cost, answers = first.predictor.shape.cost, first.answers
        wait_s = self._queues(columns, cost.token_s, envelopes[0].model)
        fixed_s = parameters.pressure_s * columns.pressure + (
            parameters.burst_weight / BURST_S
        ) * columns.squares * np.exp((columns.squares_at_s - now_s) / BURST_S)
        prompt = np.array([one.prompt_tokens for one in envelopes], dtype=np.float64)[:, None]
        block = np.array([one.block_size or parameters.block_size for one in envelopes])[:, None]
        answer_s = np.array([answers.typical(one.max_tokens) for one in envelopes])[:, None]
        answer_s = answer_s * parameters.tpot_slo_s
        expected = np.array([answers.expected(one.max_tokens) for one in envelopes])[:, None]
        is_prefill, engine_block = columns.is_prefill[rows], columns.engine_block[rows]

        hits = np.minimum(depths * block, np.maximum(0.0, prompt - 1) // engine_block * engine_block)
        uncached = prompt - hits
        prefill_s = columns.scale[rows] * (
            cost.fixed_s + cost.token_s * uncached + cost.attention_s * uncached * (uncached + 2 * hits)
        )
        tokens = prompt + np.where(is_prefill, 1.0, expected)
        has_space = columns.room[rows] >= tokens
        waits = wait_s[rows] + np.where(has_space, 0.0, columns.slot_s[rows])
        totals = (
            waits
            + prefill_s * (1 + parameters.work_weight)
            + parameters.stall_weight * columns.decoding[rows] * prefill_s * prefill_s / answer_s
            + fixed_s[rows]
        )
        if scheduler.fleet.is_split(envelopes[0].model):
            moved_s = [
                transfer_s(one.prompt_tokens) if scheduler.generators(one) else 0.0 for one in envelopes
            ]
            totals += np.where(is_prefill, np.array(moved_s)[:, None], 0.0)
        totals = np.where(columns.longest[rows] >= prompt, totals, np.inf)
        step_s = STEP_TOKENS * cost.token_s
        self._choose(columns, rows, depths, hits, waits, prefill_s, totals, has_space, step_s)

    def _queues(self, columns: Columns, token_s: float, model: str) -> Floats:
        """Predicted seconds of prefill work that each node has, without a slot's."""
        scheduler = self._scheduler
        elapsed_s = np.maximum(0.0, scheduler.now_s - columns.since_s)
        wait_s: Floats = np.maximum(0.0, columns.prompts_s - np.minimum(elapsed_s, columns.most_s))
        wait_s += np.where(columns.prompts_s > 0.0, np.maximum(0.0, elapsed_s - columns.overdue_s), 0.0)
        wait_s += columns.unknown * token_s * columns.scale
        is_stale = columns.heard_s < scheduler.healthy_s - STALE_S
        if is_stale.any():
            usual = scheduler.fleet.stale_tokens(model, scheduler.healthy_s)
            stale_s = (usual + columns.unseen) * token_s * columns.scale
            wait_s = np.where(is_stale, np.maximum(wait_s, stale_s), wait_s)
        return wait_s

    def _choose(
        self,
        columns: Columns,
        rows: Rows,
        depths: Rows,
        hits: Floats,
        waits: Floats,
        prefill_s: Floats,
        totals: Floats,
        has_space: NDArray[np.bool_],
        step_s: float,
    ) -> None:
        parameters = self._scheduler.parameters
        assert self._random is not None
        best = totals.min(axis=1, keepdims=True)
        near = totals <= best * (1 + parameters.near_tie)
        cached = np.where(near, hits, -1.0)
        most_cached = near & (cached == cached.max(axis=1, keepdims=True))
        drawn = np.where(most_cached, self._random.random(rows.shape), -1.0).argmax(axis=1)
        at = np.arange(len(rows))
        chosen = rows[at, drawn]
        lookahead_s = np.clip(
            step_s * columns.scale[chosen] + 2 * columns.feedback_s[chosen],
            parameters.lookahead_min_s,
            parameters.lookahead_max_s,
        )
        self._rows, self._totals, self._hits = rows, totals, hits
        self._waits, self._prefills = waits, prefill_s
        self._chosen_rows = np.where(np.isfinite(best[:, 0]), chosen, -1).tolist()
        self._chosen_hits = hits[at, drawn].astype(np.intp).tolist()
        self._chosen_waits = waits[at, drawn].tolist()
        self._chosen_prefills = prefill_s[at, drawn].tolist()
        self._has_room = (has_space[at, drawn] & (waits[at, drawn] <= lookahead_s)).tolist()
        self._near = near.sum(axis=1).tolist()
        self._most_cached = most_cached.sum(axis=1).tolist()
