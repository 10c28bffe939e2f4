"""What must hold after every simulated effect, read from the servers' own data.

One place: below the marks, each unanswered request is in exactly one Redis place. One leader, one
incarnation: a script that the shipped fence should have refused must not have had an effect. One answer: at
most one outcome per record. *Finished* never passes an unanswered record. Every key has an expiry or
is declared permanent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dispatcher.backends.scripts import Script
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.protocol.outcome import Reason
from tests.support.sim.kafka import SimKafka
from tests.support.sim.redis import SimRedis

LEADER_SCRIPTS = (
    "admit",
    "adopt",
    "assign",
    "begin_generation",
    "close",
    "explain",
    "mend",
    "remember",
    "requeue",
    "retry",
    "settle",
)
AGENT_SCRIPTS = ("claim", "complete", "extend", "report")
PLACES_EVERY = 7
"""The one-place check reads much: after every seventh effect of a script, and after each fault."""


@dataclass
class Expectations:
    """What was appended: by ref, and by what makes records repeat each other."""

    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    refs: dict[str, tuple[str, int, bytes]] = field(default_factory=dict)
    """Of each ref its lane and partition, its offset, and that as a member of Redis's sets."""

    def add(self, ref: str, request: dict[str, Any]) -> None:
        """Note a record."""
        self.requests[ref] = request
        parsed = Ref.parse(ref)
        self.refs[ref] = (parsed.source, parsed.offset, str(parsed.offset).encode())
        key = (str(request.get("tenant", "")), str(request["id"]), repr(request.get("body")))
        self.groups.setdefault(key, []).append(ref)

    def repeated(self) -> set[str]:
        """Refs that share their group with others."""
        return {ref for refs in self.groups.values() if len(refs) > 1 for ref in refs}


class ObservedRedis(SimRedis):
    """A simulated Redis that tells an observer of every command that it executed."""

    observer: Callable[[Sequence[bytes], Any], None] | None = None
    _observing = False

    def _execute(self, fields: list[bytes]) -> Any:
        answer = super()._execute(fields)
        if self.observer is not None and not self._observing:
            self._observing = True
            try:
                self.observer(fields, answer)
            finally:
                self._observing = False
        return answer


class Invariants:
    """Watches one cluster; violations are appended to the list given.

    Args:
        scripts: sources that replace shipped ones in this cluster, by name.
    """

    def __init__(
        self,
        names: Names,
        nodes: Sequence[str],
        redis: SimRedis,
        kafka: SimKafka,
        expectations: Expectations,
        violations: list[str],
        *,
        scripts: Mapping[str, str],
    ) -> None:
        self._names = names
        self._nodes = nodes
        self._redis = redis
        self._kafka = kafka
        self._expectations = expectations
        self._violations = violations
        self._scripts = {
            Script(name, scripts.get(name)).digest.encode(): name
            for name in (*LEADER_SCRIPTS, *AGENT_SCRIPTS)
        }
        self._effects = 0
        self._refs: dict[bytes, str] = {}
        """Of each outcome that was read: they are looked through again and again."""
        self._permanent = re.compile(
            rf"{re.escape(names.prefix)}(leader|epoch|renewals|generation|marks|settled|pending|pending:.*|closing"
            rf"|reports|blocks|nodes|cordons|above:.*|node:[^:]*:claimed)$|rq:(queues|workers|workers:.*|queue:.*|job:.*|wip:.*)$"
        )

    def violate(self, what: str) -> None:
        """Note a violation."""
        now_s = self._redis._network.loop.time()
        self._violations.append(f"at {now_s:.3f} s: {what}")

    # After each effect

    def after_effect(self, fields: Sequence[bytes], answer: Any) -> None:
        """One command was executed."""
        name = self._script_name(fields)
        if name is None or isinstance(answer, Exception):
            return
        keys = int(fields[2])
        arguments = fields[3 + keys :]
        if name in LEADER_SCRIPTS:
            epoch = self._redis.value(self._names.epoch)
            if epoch != arguments[0]:
                self.violate(
                    f"{name} by deposed leader {arguments[0]!r} had an effect; the epoch is {epoch!r}"
                )
        elif name in AGENT_SCRIPTS:
            self._check_incarnation(name, fields[3].decode(), arguments[0])
        self._effects += 1
        if self._effects % PLACES_EVERY == 0:
            self.check_places(f"after {name}")

    def _script_name(self, fields: Sequence[bytes]) -> str | None:
        command = fields[0]
        if command == b"EVALSHA":
            return self._scripts.get(fields[1])
        if command == b"EVAL":
            return self._scripts.get(Script("", fields[1].decode()).digest.encode())
        return None

    def _check_incarnation(self, name: str, node_key: str, incarnation: bytes) -> None:
        stored = self._redis.value(node_key)
        known = {} if stored is None else stored.getall()
        current, fenced = known.get(b"incarnation"), known.get(b"fenced")
        if current != incarnation or fenced == incarnation:
            self.violate(f"{name} by superseded incarnation {incarnation!r} of {node_key} had an effect")

    # One place

    def check_places(self, when: str) -> None:
        """Each taken and unanswered request is in exactly one place."""
        places = self._places()
        for ref, count in places.items():
            if count > 1:
                self.violate(f"{when}: {ref} is in {count} places: {self._where(ref)}")
        repeated = self._expectations.repeated()
        answered = None
        for ref in self._taken():
            if ref in places or ref in repeated or ref not in self._expectations.requests:
                continue
            answered = self._answered() if answered is None else answered
            if ref not in answered:
                self.violate(f"{when}: {ref} is taken and unanswered but in no place")

    def _jobs(self, node: str) -> tuple[tuple[str, Iterable[bytes]], ...]:
        value, names = self._redis.value, self._names
        return (
            ("queue", value(names.queue_key(node)) or ()),
            ("intermediate", value(names.intermediate(node)) or ()),
            ("claimed", value(names.claimed(node)) or ()),
        )

    def _closing(self) -> list[dict[bytes, bytes]]:
        entries = self._redis.value(self._names.closing)
        if entries is None:
            return []
        return [dict(zip(f[::2], f[1::2], strict=True)) for f in entries._values_dict.values()]

    def _places(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in self._nodes:
            for _, jobs in self._jobs(node):
                for job in jobs:
                    ref = job.rsplit(b"--", 2)[1].decode()
                    found[ref] = found.get(ref, 0) + 1
        for member in self._redis.value(self._names.pending) or ():
            ref = member.decode()
            found[ref] = found.get(ref, 0) + 1
        for fields in self._closing():
            ref = fields[b"ref"].decode()
            found[ref] = found.get(ref, 0) + 1
        return found

    def _where(self, ref: str) -> str:
        found = []
        for node in self._nodes:
            for name, jobs in self._jobs(node):
                found += [f"{name} of {node}: {job.decode()}" for job in jobs if f"--{ref}--" in job.decode()]
        if ref.encode() in (self._redis.value(self._names.pending) or ()):
            found.append("pending")
        found += [
            f"closing {fields[b'kind'].decode()} {fields[b'job'].decode()}"
            for fields in self._closing()
            if fields[b"ref"].decode() == ref
        ]
        return ", ".join(found)

    def _taken(self) -> list[str]:
        stored = self._redis.value(self._names.marks)
        if stored is None:
            return []
        marks = {source.decode(): int(low) for source, low in stored.getall().items()}
        above = {source: self._redis.value(self._names.above(source)) or () for source in marks}
        taken = []
        for text, (source, offset, member) in self._expectations.refs.items():
            low = marks.get(source)
            if low is not None and (offset < low or member in above[source]):
                taken.append(text)
        return taken

    # Answers

    def _answered(self) -> Counter[str]:
        answered: Counter[str] = Counter()
        refs = self._refs
        for value in self._decided(self._names.outcomes):
            ref = refs.get(value)
            if ref is None:
                ref = refs[value] = codec.outcome_heads.decode(value).ref
            answered[ref] += 1
        for value in self._decided(self._names.dead):
            letter = codec.dead_letters.decode(value)
            if not letter.id:
                answered[letter.ref] = 1  # a loss of Redis data may make a second one: nobody waits for it
        return answered

    def _decided(self, topic: str) -> list[bytes]:
        """Records whose commit is decided, also where its markers are still to be written."""
        found = []
        for partition in self._kafka.broker.topics[topic].partitions:
            stable = partition.stable_end
            for entry in partition.entries:
                transaction = entry.transaction
                if entry.is_control or (transaction is not None and transaction.is_aborted):
                    continue
                is_ending = transaction is not None and transaction.markers_to_write > 0
                if (entry.offset < stable or is_ending) and entry.value is not None:
                    found.append(entry.value)
        return found

    def unanswered(self) -> list[str]:
        """Refs that still lack what they should come to."""
        answered = self._answered()
        missing = []
        for refs in self._expectations.groups.values():
            if not any(answered[ref] for ref in refs):
                missing += refs
        return missing

    def check_finished(self) -> None:
        """The committed marks have passed nothing unanswered."""
        answered = self._answered()
        repeated = self._expectations.repeated()
        offsets = self._kafka.group_offsets(self._names.group)
        lanes = {self._names.requests(lane): lane for lane in Lane}
        marks = {f"{lanes[tp.topic].value}{tp.partition}": stored.offset for tp, stored in offsets.items()}
        for text in self._expectations.requests:
            ref = Ref.parse(text)
            if ref.offset < marks.get(ref.source, 0) and not answered[text] and text not in repeated:
                self.violate(f"finished mark {marks[ref.source]} of {ref.source} passed unanswered {text}")

    def check_end(self) -> None:
        """The run is over: everything is answered, once."""
        self.check_places("at the end")
        self.check_finished()
        answered = self._answered()
        for ref, count in answered.items():
            if count > 1:
                self.violate(f"{ref} has {count} outcomes")
            if ref not in self._expectations.requests:
                self.violate(f"an outcome for {ref}, which nobody appended")
        for (tenant, id, _), refs in self._expectations.groups.items():
            count = sum(answered[ref] for ref in refs)
            if count != 1:
                self.violate(f"{tenant}/{id} at {refs} has {count} outcomes, expected exactly one")
        self._check_deadlines()
        self._check_keys()

    def _check_deadlines(self) -> None:
        """Nobody ends what has time, whatever a host's clock says: runs are shorter than defaults."""
        for value in self._decided(self._names.outcomes):
            head = codec.outcome_heads.decode(value)
            is_given_up = head.reason in {Reason.DEADLINE_EXCEEDED, Reason.DEADLINE_PASSED}
            if is_given_up and not self._expectations.requests.get(head.ref, {}).get("deadline_ms"):
                who = "an agent" if head.attempt else "a leader"
                self.violate(f"{who} gave up {head.ref} long before its deadline")

    def _check_keys(self) -> None:
        for key in self._redis.call("KEYS", "*"):
            name = key.decode()
            if self._redis.call("PTTL", key) == -1 and not self._permanent.match(name):
                self.violate(f"key {name} has no expiry and is not declared permanent")
