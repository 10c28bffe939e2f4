"""What is right and wrong with a Redis or Valkey, from facts alone."""

from __future__ import annotations

from collections.abc import Mapping

from dispatcher.doctor.clock_findings import clock_finding
from dispatcher.doctor.facts import Finding, RedisFacts, Status

OLDEST_REDIS = (7, 0)
FULL = 0.95
FILLING = 0.8
SAMPLE = "dispatcher/deploy/redis-acl.conf"
INFO_DENIED = "ACL SETUSER {user} +info +config|get +acl|whoami +acl|dryrun"


def redis_findings(facts: RedisFacts) -> list[Finding]:
    """Judge a server that answered."""
    findings = []
    if facts.info is None:
        fix = INFO_DENIED.format(user=facts.user or "<user>")
        findings.append(
            Finding(check="redis info", status=Status.UNKNOWN, found="this user may not run INFO", fix=fix)
        )
    else:
        info = facts.info
        findings += [
            _version(info),
            _mode(info),
            _policy(info),
            _append_only(info, facts.appendfsync),
            _persistence(info),
            _memory(info),
        ]
    return [*findings, _permissions(facts), clock_finding("clock of Redis", facts.clock)]


def _version(info: Mapping[str, object]) -> Finding:
    check = "redis version"
    if "valkey_version" in info:
        return Finding(check=check, status=Status.OK, found=f"Valkey {info['valkey_version']}")
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= OLDEST_REDIS:
        return Finding(check=check, status=Status.OK, found=f"Redis {version}")
    fix = "use Valkey, or Redis 7.0 or newer"
    return Finding(
        check=check, status=Status.FAIL, found=f"Redis {version}: scripts need flags of Redis 7", fix=fix
    )


def _mode(info: Mapping[str, object]) -> Finding:
    check = "redis mode"
    if _number(info, "cluster_enabled"):
        return Finding(
            check=check,
            status=Status.FAIL,
            found="cluster mode is on: a script's keys would lie on several servers",
            fix="use a server with cluster-enabled no; to share load, give each pool a server of its own",
        )
    if info.get("role") in ("slave", "replica"):
        return Finding(
            check=check,
            status=Status.FAIL,
            found="this is a replica: it refuses writes",
            fix="set redis (FLEXLB_REDIS) to the address of the primary",
        )
    if _number(info, "loading"):
        return Finding(
            check=check, status=Status.WARN, found="it is loading its data", fix="run the doctor again later"
        )
    return Finding(check=check, status=Status.OK, found="a single primary")


def _policy(info: Mapping[str, object]) -> Finding:
    check, policy = "redis eviction", str(info.get("maxmemory_policy", ""))
    if policy == "noeviction":
        return Finding(check=check, status=Status.OK, found="maxmemory-policy is noeviction")
    return Finding(
        check=check,
        status=Status.FAIL,
        found=f"maxmemory-policy is {policy or 'unknown'}: it may drop queued requests and fences",
        fix="CONFIG SET maxmemory-policy noeviction, and the same in its configuration file",
    )


def _append_only(info: Mapping[str, object], appendfsync: str | None) -> Finding:
    check = "redis append-only file"
    on = "CONFIG SET appendonly yes; CONFIG SET appendfsync everysec; CONFIG REWRITE"
    if not _number(info, "aof_enabled"):
        return Finding(
            check=check,
            status=Status.WARN,
            found="off: a restart loses all of Redis, and running work is run again from Kafka",
            fix=on,
        )
    if appendfsync is None:
        return Finding(
            check=check, status=Status.UNKNOWN, found="on; appendfsync is not told to this user", fix=on
        )
    if appendfsync != "everysec":
        cost = (
            "each write waits for the disk" if appendfsync == "always" else "the kernel decides what is kept"
        )
        return Finding(
            check=check, status=Status.WARN, found=f"on, appendfsync is {appendfsync}: {cost}", fix=on
        )
    return Finding(check=check, status=Status.OK, found="on, appendfsync everysec")


def _persistence(info: Mapping[str, object]) -> Finding:
    check = "redis persistence"
    wrong = [
        key
        for key in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if info.get(key, "ok") != "ok"
    ]
    if wrong:
        return Finding(
            check=check,
            status=Status.FAIL,
            found=f"{', '.join(f'{key} is {info[key]}' for key in wrong)}: it may refuse every write",
            fix="look at the server's log and its disk space; then BGREWRITEAOF, and BGSAVE if it saves",
        )
    return Finding(check=check, status=Status.OK, found="the last writes to disk went well")


def _memory(info: Mapping[str, object]) -> Finding:
    check = "redis memory"
    limit, used = _number(info, "maxmemory"), _number(info, "used_memory")
    total = _number(info, "total_system_memory")
    more = "raise it: CONFIG SET maxmemory <bytes>; see what fills it: redis-cli --bigkeys"
    if not limit:
        share = int(total * 0.7) if total else "<bytes>"
        return Finding(
            check=check,
            status=Status.WARN,
            found=f"{_mib(used)} used and no maxmemory: when memory ends, the kernel kills it",
            fix=f"CONFIG SET maxmemory {share}, and the same in its configuration file",
        )
    found = f"{_mib(used)} of {_mib(limit)} used"
    if used >= limit * FULL:
        return Finding(
            check=check, status=Status.FAIL, found=f"{found}: new work is refused at the limit", fix=more
        )
    if used >= limit * FILLING:
        return Finding(check=check, status=Status.WARN, found=found, fix=more)
    return Finding(check=check, status=Status.OK, found=found)


def _permissions(facts: RedisFacts) -> Finding:
    check, user = "redis permissions", facts.user or "<user>"
    if facts.denied is None:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            found="this user may not ask what it may do",
            fix=f"ACL SETUSER {user} +acl|whoami +acl|dryrun",
        )
    if not facts.denied:
        found = f"user {user} may run every command of a dispatcher"
        if user == "default":
            found += f", and all else; {SAMPLE} has users with the least rights"
        return Finding(check=check, status=Status.OK, found=found)
    rules = " ".join(f"+{command.lower()}" for command in sorted(facts.denied))
    first = next(iter(facts.denied.values()))
    return Finding(
        check=check,
        status=Status.FAIL,
        found=f"user {user} is refused {', '.join(sorted(facts.denied))} ({first})",
        fix=f"ACL SETUSER {user} ~flexlb:* ~rq:* {rules}; ACL SAVE; {SAMPLE} has users with the least rights",
    )


def _number(info: Mapping[str, object], key: str) -> int:
    try:
        return int(str(info.get(key, 0)))
    except ValueError:
        return 0


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
