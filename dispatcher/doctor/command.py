"""`flexlb doctor`: gather facts, judge them, print each finding with its fix."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby

from dispatcher.backends.access import KAFKA_ACCESS, REDIS_ACCESS
from dispatcher.backends.addresses import masked
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.topics import MAX_RECORD_BYTES
from dispatcher.doctor.ask_kafka import ask_kafka
from dispatcher.doctor.ask_redis import ask_pool, ask_redis
from dispatcher.doctor.facts import Finding, Needs, Status
from dispatcher.doctor.kafka_findings import kafka_findings
from dispatcher.doctor.pool_findings import pool_findings
from dispatcher.doctor.redis_findings import redis_findings
from dispatcher.doctor.sentinels import ask_sentinels, sentinel_findings
from dispatcher.errors import LogUnavailable, StoreRefused, StoreUnavailable
from dispatcher.protocol.names import Lane, Names
from dispatcher.settings import DispatcherSettings

FLAGS = {
    "redis",
    "kafka",
    "pool",
    "block_size",
    "max_deadline_s",
    "max_record_bytes",
    "topic_partitions",
    "topic_replication",
    *REDIS_ACCESS,
    *KAFKA_ACCESS,
}
CANCEL_BYTES = 4096
UNREACHABLE = 2
COLOURS = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31;1", Status.UNKNOWN: "35"}


def configure_doctor(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb doctor`."""
    add_flags(parser, DispatcherSettings, only=FLAGS)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="write nothing: leaves transactions and Kafka's clock unknown (else two records are written "
        "to the dead letters, in transactions that are aborted)",
    )


async def run_doctor(options: argparse.Namespace) -> int:
    """Check a cluster; returns 0 when nothing fails, 1 for a failure, 2 when a server does not answer."""
    settings = read_settings(DispatcherSettings, vars(options))
    findings, is_reached = await examine(settings, probe=not options.no_probe)
    code = exit_code(findings, is_reached=is_reached)
    if options.json:
        print(json.dumps({"exit_code": code, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        print(as_text(findings, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return code


def needs_of(settings: DispatcherSettings) -> Needs:
    """What a pool with these settings asks of its servers."""
    names = Names(settings.pool)
    lanes = tuple(names.requests(lane) for lane in Lane)
    return Needs(
        pool=settings.pool,
        longest_deadline_s=settings.max_deadline_s,
        block_size=settings.block_size,
        sizes={
            **dict.fromkeys(names.topics, MAX_RECORD_BYTES),
            **dict.fromkeys(lanes, settings.max_record_bytes),
            names.cancels: CANCEL_BYTES,
        },
        keeps=frozenset(names.topics) - {names.dead},
        lanes=lanes,
        partitions=settings.topic_partitions,
        replication=settings.topic_replication,
    )


async def examine(settings: DispatcherSettings, *, probe: bool = True) -> tuple[list[Finding], bool]:
    """Findings about both servers and the pool, and whether both servers answered."""
    names, needs = Names(settings.pool), needs_of(settings)
    findings: list[Finding] = []
    is_reached = True
    try:
        kafka = connect_kafka(settings.kafka, settings.kafka_access)
        findings += kafka_findings(
            await ask_kafka(kafka, names, bootstrap=settings.kafka, probe=probe), needs
        )
    except LogUnavailable as error:
        is_reached = False
        findings.append(
            Finding(
                check="kafka",
                status=Status.FAIL,
                found=str(error),
                fix="start it, or set kafka (--kafka, FLEXLB_KAFKA) to its bootstrap servers, and "
                "kafka_protocol, kafka_user and kafka_ca_file to what its listener wants",
            )
        )
    client = connect_redis(settings.redis, access=settings.redis_access)
    sentinels = await ask_sentinels(client)
    min_replicas: int | None = None
    try:
        facts = await ask_redis(client, names)
        min_replicas = facts.min_replicas
        findings += redis_findings(facts)
        findings += pool_findings(await ask_pool(client, names), needs)
    except StoreRefused as error:
        findings.append(
            Finding(
                check="pool",
                status=Status.UNKNOWN,
                found=str(error),
                fix=f"run the doctor as a user that may read ~{names.prefix}*",
            )
        )
    except StoreUnavailable as error:
        is_reached = False
        findings.append(
            Finding(
                check="redis",
                status=Status.FAIL,
                found=f"{masked(settings.redis)}: {error}",
                fix="start it, or set redis (--redis, FLEXLB_REDIS) to its address and password",
            )
        )
    finally:
        await client.aclose()
    findings += sentinel_findings(sentinels, min_replicas=min_replicas)
    return findings, is_reached


def exit_code(findings: Sequence[Finding], *, is_reached: bool) -> int:
    """0 when nothing fails, 1 for a failure, 2 when a server did not answer."""
    if not is_reached:
        return UNREACHABLE
    return int(any(finding.status is Status.FAIL for finding in findings))


def _gathered(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Findings that differ only in the topic they are about, as one."""
    for _, group in groupby(findings, lambda one: (one.check, one.status, one.fix)):
        first, *others = group
        topic, colon, what = first.found.partition(": ")
        alike = [one.found.removesuffix(f"{colon}{what}") for one in others]
        if others and colon and all(topic != one.found for topic, one in zip(alike, others, strict=True)):
            yield replace(first, found=f"{', '.join([topic, *alike])}{colon}{what}")
        else:
            yield from (first, *others)


def as_text(findings: Sequence[Finding], *, colour: bool) -> str:
    """A line a finding, the fix below it, and a count at the end."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in _gathered(findings):
        status = f"{finding.status.value:<7}"
        if colour:
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
        lines.append(f"{status}  {finding.check:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<{width + 11}}fix: {finding.fix}")
    counts = ((status, sum(one.status is status for one in findings)) for status in Status)
    lines.append(", ".join(f"{count} {status.value}" for status, count in counts if count))
    return "\n".join(lines)
