"""The engine model: continuous batching with chunked prefill over a block KV cache, without a clock.

It schedules as vLLM's v1 scheduler does: each step gives running sequences their tokens first (one for
each that decodes, the rest of the budget to prompts), then admits waiting ones in order while budget, slots
and blocks allow, for the whole prompt and not only for its first chunk. When a block can't be had, the
sequence admitted last is preempted: its blocks are freed and it computes again what it had, from the front
of the queue. Who calls it owns the time.

Where prefill and decode are apart it does as vLLM's NIXL connector has it. A sequence that hands its prompt
over keeps its blocks after its end, until `release`. One whose prompt was computed elsewhere takes all blocks
of the prompt first, without a slot, and asks for what isn't cached here (`take_pulls`); when that is here
(`pulled`) it goes ahead of those that wait, with all of its prompt but the last token computed.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dispatcher.simulation.kv_cache import BlocksStored, CacheEvent, KVCache, first_link, next_link
from dispatcher.simulation.profile import Profile


class Made(NamedTuple):
    """One token of sequence `key`; `cached_tokens` of its prompt were not computed."""

    key: int
    token_id: int
    is_first: bool
    is_last: bool
    cached_tokens: int


class Pull(NamedTuple):
    """Sequence `key` wants the keys and values of so many tokens of its prompt from another engine."""

    key: int
    tokens: int


class _Sequence:
    """`tokens` are the prompt and what was generated; the first `computed` have their keys and values.

    `is_remote`: another engine holds its prompt; `is_handed`: it has been here since and the last token is
    next; `keeps`: its blocks stay after its end.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "computed",
        "generated",
        "held",
        "is_handed",
        "is_remote",
        "keeps",
        "key",
        "links",
        "lora",
        "output",
        "output_tokens",
        "private",
        "prompt_tokens",
        "salt",
        "tokens",
    )

    def __init__(
        self,
        key: int,
        prompt: Sequence[int],
        output_tokens: int,
        output: Callable[[int], int],
        salt: str,
        lora: str,
    ) -> None:
        self.key = key
        self.tokens = array("I", prompt)
        self.prompt_tokens = len(self.tokens)
        self.output_tokens = output_tokens
        self.output = output
        self.salt = salt
        self.lora = lora
        self.generated = 0
        self.computed = 0
        self.cached_tokens = -1
        self.blocks: list[int] = []
        self.links: bytes = b""
        self.held: list[int] = []
        self.private = 0
        self.is_remote = False
        self.is_handed = False
        self.keeps = False

    def hash_on(self, block_tokens: int) -> None:
        """Hash the full blocks that have none yet."""
        link = self.links or first_link(self.lora, self.salt)
        known = len(self.blocks)
        full = len(self.tokens) // block_tokens
        if full == known:
            return
        packed = self.tokens[known * block_tokens : full * block_tokens].tobytes()
        width = 4 * block_tokens
        for start in range(0, len(packed), width):
            link = next_link(link, packed[start : start + width])
            self.blocks.append(int.from_bytes(link, "big"))
        self.links = link


class EngineModel:
    """One engine. `due` is when `step` is to be called next, None while it is idle."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.cache = KVCache(profile.kv_blocks)
        self.due: float | None = None
        self.preemptions = 0
        self.prompt_tokens = 0
        self.computed_prompt_tokens = 0
        self.generated_tokens = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self.busy_s = 0.0
        self._sequences: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._pulling: dict[int, _Sequence] = {}
        self._pulled: deque[_Sequence] = deque()
        self._kept: dict[int, _Sequence] = {}
        self._pulls: list[Pull] = []
        self._running: list[_Sequence] = []
        self._scheduled: list[tuple[_Sequence, int]] = []

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot, or for their prompt from another engine."""
        return len(self._waiting) + len(self._pulling) + len(self._pulled)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def kv_used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return self.cache.used

    @property
    def kv_total_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.cache.blocks

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that running sequences hold."""
        return self.cache.used / self.cache.blocks

    def submit(
        self,
        key: int,
        prompt: Sequence[int],
        output_tokens: int,
        *,
        output: Callable[[int], int],
        salt: str = "",
        lora: str = "",
        keeps: bool = False,
        is_remote: bool = False,
    ) -> None:
        """Queue a sequence.

        Args:
            output: the token id at each place of its answer.
            keeps: its blocks stay held after its end, until `release`.
            is_remote: another engine has computed its prompt, and gives it.
        Raises:
            ValueError: the key is in use, prompt or answer are empty, or it can never fit the KV cache.
        """
        if key in self._sequences:
            raise ValueError(f"sequence {key} is already known")
        if not len(prompt) or output_tokens < 1:
            raise ValueError(f"expected 1 or more tokens, seen {len(prompt)} in and {output_tokens} out")
        if len(prompt) + output_tokens > self.profile.kv_tokens:
            raise ValueError(
                f"prompt and answer: expected at most {self.profile.kv_tokens} tokens (the KV cache), "
                f"seen {len(prompt)} and {output_tokens}"
            )
        sequence = _Sequence(key, prompt, output_tokens, output, salt, lora)
        sequence.keeps, sequence.is_remote = keeps, is_remote
        self._sequences[key] = sequence
        self._waiting.append(sequence)

    def take_pulls(self) -> list[Pull]:
        """What sequences asked of other engines since the last call."""
        pulls, self._pulls = self._pulls, []
        return pulls

    def pulled(self, key: int) -> None:
        """A sequence's prompt is here; unknown ones are ignored. An idle engine is to be stepped then."""
        sequence = self._pulling.pop(key, None)
        if sequence is not None:
            self._pulled.append(sequence)

    def release(self, key: int) -> None:
        """Free the blocks that a sequence kept; unknown ones are ignored. Step an idle engine then."""
        sequence = self._kept.pop(key, None)
        if sequence is not None:
            self._free(sequence)

    def abort(self, key: int) -> None:
        """Forget a sequence; unknown and finished ones are ignored. What it computed stays cached."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        if sequence in self._running:
            self._running.remove(sequence)
            self._free(sequence)
        elif self._pulling.pop(key, None) is not None:
            self._free(sequence)
        elif sequence in self._pulled:
            self._pulled.remove(sequence)
            self._free(sequence)
        else:
            self._waiting.remove(sequence)

    def take_events(self) -> list[CacheEvent]:
        """What happened to the cache since the last call, in order."""
        events, self.cache.events = self.cache.events, []
        return events

    def reset_cache(self) -> bool:
        """Forget every cached block; False while sequences hold some."""
        return self.cache.clear()

    def step(self, now: float) -> list[Made]:
        """End every step that is due by `now` and begin the next; an idle engine begins at `now`."""
        made: list[Made] = []
        if self.due is None:
            self._begin(now)
        while self.due is not None and self.due <= now:
            ended_at = self.due
            made += self._end()
            self._begin(ended_at)
        return made

    def _begin(self, at: float) -> None:
        budget = self.profile.max_batched_tokens
        self._scheduled = []
        prefilled = pairs = read_back = decoding = context = 0
        preempted = False
        place = 0
        while place < len(self._running) and budget:
            sequence = self._running[place]
            count = min(len(sequence.tokens) - sequence.computed, budget)
            while not self._reserve(sequence, count):
                preempted = True
                last = self._running.pop()
                self._preempt(last)
                if last is sequence:
                    break
            else:
                budget -= count
                self._scheduled.append((sequence, count))
                place += 1
        while budget and not preempted and len(self._running) < self.profile.max_running:
            if self._pulled:
                sequence = self._pulled.popleft()
                self._hand(sequence)
                self._running.append(sequence)
                self._scheduled.append((sequence, 1))
                budget -= 1
                continue
            if not self._waiting:
                break
            sequence = self._waiting[0]
            if sequence.is_remote:
                if not self._claim(sequence):
                    break
                self._waiting.popleft()
                continue
            admitted = self._admit(sequence, budget)
            if not admitted:
                break
            self._waiting.popleft()
            self._running.append(sequence)
            self._scheduled.append((sequence, admitted))
            budget -= admitted
        if not self._scheduled:
            self.due = None
            if preempted:
                # The last one gave its blocks back: who waits may have room now.
                self._begin(at)
            return
        for sequence, count in self._scheduled:
            if count == 1 and (sequence.computed >= sequence.prompt_tokens or sequence.is_handed):
                decoding += 1
                context += sequence.computed
            else:
                prefilled += count
                pairs += count * (count + 2 * sequence.computed)
                read_back += sequence.computed
        seconds = self.profile.step_s(prefilled, pairs, read_back, decoding, context)
        self.busy_s += seconds
        self.due = at + seconds

    def _reserve(self, sequence: _Sequence, count: int) -> bool:
        """Take the blocks that the next `count` tokens need."""
        size = self.profile.block_tokens
        needed = -(-(sequence.computed + count) // size) - len(sequence.held) - sequence.private
        if needed <= 0:
            return True
        if not self.cache.take(needed):
            return False
        sequence.private += needed
        return True

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Give a sequence what the cache holds of it and its first blocks; the tokens it computes now."""
        size = self.profile.block_tokens
        sequence.hash_on(size)
        # The last token is always computed: its output is wanted.
        usable = sequence.blocks[: (len(sequence.tokens) - 1) // size]
        hits = self.cache.hit(usable)
        found = usable[:hits]
        if not self.cache.fits(found, -(-len(sequence.tokens) // size) - hits):
            return 0
        self.cache.hold(found)
        sequence.held = found
        sequence.computed = hits * size
        count = min(len(sequence.tokens) - sequence.computed, budget)
        self._reserve(sequence, count)
        self.prefix_queried_tokens += len(sequence.tokens)
        self.prefix_hit_tokens += sequence.computed
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens += sequence.prompt_tokens
        return count

    def _claim(self, sequence: _Sequence) -> bool:
        """Take all blocks of a prompt that another engine has computed, and ask for what isn't cached."""
        size = self.profile.block_tokens
        sequence.hash_on(size)
        usable = sequence.blocks[: (sequence.prompt_tokens - 1) // size]
        hits = self.cache.hit(usable)
        found = usable[:hits]
        more = -(-sequence.prompt_tokens // size) - hits
        if not self.cache.fits(found, more):
            return False
        self.cache.hold(found)
        self.cache.take(more)
        sequence.held, sequence.private = found, more
        sequence.cached_tokens = hits * size
        sequence.is_remote = False
        self._pulling[sequence.key] = sequence
        self._pulls.append(Pull(sequence.key, sequence.prompt_tokens - hits * size))
        return True

    def _hand(self, sequence: _Sequence) -> None:
        """Go on with a prompt that came from another engine: its last token is computed here."""
        sequence.computed = sequence.prompt_tokens - 1
        sequence.is_handed = True
        self._register(sequence)

    def _preempt(self, sequence: _Sequence) -> None:
        self.preemptions += 1
        self._scheduled = [one for one in self._scheduled if one[0] is not sequence]
        self._free(sequence)
        self._waiting.appendleft(sequence)

    def _free(self, sequence: _Sequence) -> None:
        self.cache.free(sequence.held, sequence.private)
        sequence.held, sequence.private, sequence.computed = [], 0, 0
        sequence.is_handed = False

    def _end(self) -> list[Made]:
        made: list[Made] = []
        for sequence, count in self._scheduled:
            if sequence.key not in self._sequences:
                continue
            if sequence.computed < sequence.prompt_tokens:
                self.computed_prompt_tokens += min(count, sequence.prompt_tokens - sequence.computed)
            sequence.computed += count
            sequence.is_handed = False
            self._register(sequence)
            if sequence.computed == len(sequence.tokens):
                made.append(self._make(sequence))
        return made

    def _register(self, sequence: _Sequence) -> None:
        """Share the blocks that became full."""
        size = self.profile.block_tokens
        full = sequence.computed // size
        first = len(sequence.held)
        if full <= first:
            return
        sequence.hash_on(size)
        stored: list[int] = []
        begun = first
        for place in range(first, full):
            block = sequence.blocks[place]
            if self.cache.fill(block):
                if not stored:
                    begun = place
                stored.append(block)
            else:
                # Somebody else computed the same block meanwhile: from here on share theirs.
                self._tell(sequence, begun, stored)
                stored = []
                self.cache.hold((block,))
                self.cache.free((), 1)
            sequence.private -= 1
            sequence.held.append(block)
        self._tell(sequence, begun, stored)

    def _tell(self, sequence: _Sequence, begun: int, stored: list[int]) -> None:
        if not stored:
            return
        size = self.profile.block_tokens
        self.cache.events.append(
            BlocksStored(
                hashes=tuple(stored),
                parent=sequence.blocks[begun - 1] if begun else None,
                token_ids=tuple(sequence.tokens[begun * size : (begun + len(stored)) * size]),
                lora=sequence.lora,
                salt=sequence.salt,
            )
        )

    def _make(self, sequence: _Sequence) -> Made:
        place = sequence.generated
        token_id = sequence.output(place)
        sequence.generated += 1
        self.generated_tokens += 1
        is_last = sequence.generated == sequence.output_tokens
        if is_last:
            del self._sequences[sequence.key]
            self._running.remove(sequence)
            if sequence.keeps:
                self._kept[sequence.key] = sequence
            else:
                self._free(sequence)
        else:
            sequence.tokens.append(token_id)
        return Made(sequence.key, token_id, place == 0, is_last, max(0, sequence.cached_tokens))
