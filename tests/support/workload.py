"""What the clients of one simulated cluster append, and what each record should come to."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

from dispatcher.protocol.names import Lane, Names, Ref
from dispatcher.scheduling.admission import AdmissionLimits, Admitted, admit
from tests.support.hostile import any_bytes
from tests.support.invariants import Expectations
from tests.support.scripted_engine import MOST_TOKENS
from tests.support.sim.kafka import SimKafka

MODEL = "m"
REQUESTS = (3, 8, 20)
APPEND_WINDOW_S = 3.0


class Workload:
    """The clients of one cluster."""

    def __init__(
        self,
        names: Names,
        kafka: SimKafka,
        expectations: Expectations,
        rng: random.Random,
        note: Callable[[str], None],
    ) -> None:
        self.names = names
        self.kafka = kafka
        self.expectations = expectations
        self.rng = rng
        self.note = note

    def append(self, request: dict[str, object], *, lane: Lane = Lane.INTERACTIVE) -> None:
        """Append one request and expect what it should come to."""
        value = json.dumps(request).encode()
        tp = self.kafka.append(self.names.requests(lane), value, str(request.get("id", "")).encode())
        offset = self.kafka.ends(tp.topic)[tp.partition] - 1
        self.expectations.add(f"{lane.value}{tp.partition}_{offset}", request)
        self.note(f"append {lane.value}{tp.partition}_{offset} {request.get('id')}")

    async def submit_all(self) -> None:
        """The clients' work over the append window."""
        rng = self.rng
        requests = rng.choice(REQUESTS)
        for number in range(requests):
            await asyncio.sleep(rng.expovariate(requests / APPEND_WINDOW_S))
            request: dict[str, object] = {
                "id": f"r{number}",
                "model": MODEL,
                "endpoint": "/v1/completions",
                "priority": rng.randrange(1, 101),
                "body": {
                    "prompt": "x" * rng.randrange(1, 400),
                    "max_tokens": rng.choice([1, 2, 5, MOST_TOKENS]),
                },
            }
            lane = Lane.BATCH if rng.random() < 0.15 else Lane.INTERACTIVE
            kind = rng.random()
            if kind < 0.06:
                request["model"] = "nobody-serves-this"
            elif kind < 0.10:
                request["deadline_ms"] = rng.choice([1, 200, 1500])
            elif kind < 0.13:
                request["priority"] = "high"
            self.append(request, lane=lane)
            after = rng.random()
            if after < 0.10 and kind >= 0.13:
                self.append(request, lane=lane)
            elif after < 0.16 and kind >= 0.13:
                self.append({**request, "body": {"prompt": "other", "max_tokens": 2}}, lane=lane)
            elif after < 0.22:
                cancel = json.dumps({"id": request["id"]}).encode()
                self.kafka.append(self.names.cancels, cancel, str(request["id"]).encode())
            elif after < 0.24:
                self.kafka.append(self.names.cancels, json.dumps({"id": f"r{number + 1}"}).encode(), b"x")

    # What no honest client writes

    async def submit_hostile(self, records: int, limits: AdmissionLimits) -> None:
        """Append arbitrary bytes, keys and headers to the request lanes and the cancel topic.

        What may be expected of a record is decided by what ships, from its bytes alone: exactly one outcome
        where an id can be read, else one dead letter.
        """
        rng = self.rng
        identities: set[tuple[str, str]] = set()
        for number in range(records):
            await asyncio.sleep(rng.expovariate(records / APPEND_WINDOW_S))
            honest: dict[str, object] = {
                "id": f"h{number}",
                "model": MODEL,
                "endpoint": "/v1/completions",
                "body": {"prompt": f"hostile {number}", "max_tokens": 2},
            }
            value = any_bytes(rng, honest)
            key = rng.choice(
                [None, b"", b"\xff\xfe", b"k" * 300, f"k{number}".encode(), f"h{number}".encode()]
            )
            headers: Any = rng.choice(
                [
                    (),
                    (("traceparent", b"\xff"),),
                    (("traceparent", None),),
                    (("\u2028", b""), ("x", b"y" * 999)),
                ]
            )
            if rng.random() < 0.15:
                self.kafka.append(self.names.cancels, value, key, headers=headers)
                continue
            lane = rng.choice(list(Lane))
            decision = admit(
                Ref(lane, 0, 0),
                key,
                value,
                appended_ms=0,
                now_ms=0,
                traceparent="",
                limits=limits,
                carry_bodies=True,
            )
            told = decision.envelope if isinstance(decision, Admitted) else decision
            identity = (told.tenant, told.id)
            if told.id and identity in identities:
                continue  # whose repetition it is depends on what else is refused; the clients repeat theirs
            identities.add(identity)
            tp = self.kafka.append(self.names.requests(lane), value, key, headers=headers)
            ref = Ref(lane, tp.partition, self.kafka.ends(tp.topic)[tp.partition] - 1)
            self.expectations.add(str(ref), {"tenant": told.tenant, "id": told.id, "body": str(ref)})
            self.note(f"append {ref} {value[:60] if value is not None else value!r}")
