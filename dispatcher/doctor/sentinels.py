"""What Sentinels say of the primary that they watch, asked one by one, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redis.exceptions import RedisError, ResponseError

from dispatcher.backends.redis_connection import sentinels_of
from dispatcher.backends.scripts import Redis
from dispatcher.doctor.facts import Finding, Status

CHECK = "redis sentinels"
MOST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class SentinelFacts:
    """What one Sentinel answered: `error` when it did not, or knows nobody of that name.

    `quorum` is '' when it could have a failover done, else why not.
    """

    address: str
    error: str = ""
    primary: str = ""
    replicas: int = 0
    others: int = 0
    quorum: str = ""


async def ask_sentinels(client: Redis) -> list[SentinelFacts]:
    """Ask each Sentinel of a client's address; [] for an address without."""
    service, sentinels = sentinels_of(client)
    return [await _ask(address, sentinel, service) for address, sentinel in sentinels]


async def _ask(address: str, sentinel: Redis, service: str) -> SentinelFacts:
    try:
        state = (await sentinel.sentinel_masters()).get(service)
        if state is None:
            return SentinelFacts(address=address, error=f"it watches nobody called {service!r}")
        quorum = ""
        try:
            await sentinel.execute_command("SENTINEL", "CKQUORUM", service)
        except ResponseError as error:
            quorum = str(error)
    except (RedisError, OSError, EOFError) as error:
        return SentinelFacts(address=address, error=str(error) or type(error).__name__)
    return SentinelFacts(
        address=address,
        primary=f"{state['ip']}:{state['port']}",
        replicas=int(state["num-slaves"]),
        others=int(state["num-other-sentinels"]),
        quorum=quorum,
    )


def sentinel_findings(asked: Sequence[SentinelFacts], *, min_replicas: int | None) -> list[Finding]:
    """Judge them. `min_replicas` is the primary's min-replicas-to-write, None when it is not told."""
    if not asked:
        return []
    return [_answers(asked), *_agreement([one for one in asked if not one.error]), _writes(min_replicas)]


def _answers(asked: Sequence[SentinelFacts]) -> Finding:
    silent = [f"{one.address}: {one.error}" for one in asked if one.error]
    if silent:
        return Finding(
            check=CHECK,
            status=Status.FAIL if len(silent) == len(asked) else Status.WARN,
            found=f"{len(silent)} of {len(asked)} can't tell where the primary is: "
            f"{'; '.join(silent[:MOST_SHOWN])}",
            fix="start them, or set redis (FLEXLB_REDIS) to where they are and the name that they watch, and "
            "redis_sentinel_password if they want a login",
        )
    return Finding(check=CHECK, status=Status.OK, found=f"{len(asked)} of {len(asked)} answer")


def _agreement(answered: Sequence[SentinelFacts]) -> list[Finding]:
    findings = []
    named = sorted({one.primary for one in answered})
    if len(named) > 1:
        findings.append(
            Finding(
                check=CHECK,
                status=Status.FAIL,
                found=f"they name different primaries: {', '.join(named)}",
                fix="run the doctor again in a moment; then SENTINEL RESET on those that are wrong",
            )
        )
    unable = [f"{one.address}: {one.quorum}" for one in answered if one.quorum]
    if unable:
        findings.append(
            Finding(
                check=CHECK,
                status=Status.FAIL,
                found=f"no failover is possible: {'; '.join(unable[:MOST_SHOWN])}",
                fix="start the missing Sentinels; three on different hosts, quorum 2",
            )
        )
    elif answered and min(one.others for one in answered) < 2:
        findings.append(
            Finding(
                check=CHECK,
                status=Status.WARN,
                found=f"{min(one.others for one in answered) + 1} Sentinels know each other: "
                "the loss of a host may leave no majority for a failover",
                fix="run three on different hosts, quorum 2",
            )
        )
    if answered and not max(one.replicas for one in answered):
        findings.append(
            Finding(
                check=CHECK,
                status=Status.FAIL,
                found="the primary has no replica: there is nobody to promote",
                fix="start a replica on another host: replicaof <primary> <port>",
            )
        )
    return findings


def _writes(min_replicas: int | None) -> Finding:
    check = "redis min-replicas-to-write"
    fix = "CONFIG SET min-replicas-to-write 1; CONFIG SET min-replicas-max-lag 10; CONFIG REWRITE"
    if min_replicas is None:
        return Finding(check=check, status=Status.UNKNOWN, found="this user may not ask", fix=fix)
    if min_replicas < 1:
        return Finding(
            check=check,
            status=Status.WARN,
            found="0: a primary that is cut off takes writes that the failover undoes; work is done twice",
            fix=f"with two replicas or more: {fix}",
        )
    return Finding(check=check, status=Status.OK, found=str(min_replicas))
