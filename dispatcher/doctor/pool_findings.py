"""What is right and wrong with a pool's own state in Redis, from facts alone."""

from __future__ import annotations

from collections import Counter

from dispatcher.doctor.facts import Finding, Needs, NodeFacts, PoolFacts, Status

AHEAD_MS = 60_000
NAMED = 5


def pool_findings(facts: PoolFacts, needs: Needs) -> list[Finding]:
    """Judge the leadership and the nodes of a pool."""
    return [_leader(facts, needs), _epoch(facts), *_nodes(facts, needs), *_identities(facts, needs)]


def _leader(facts: PoolFacts, needs: Needs) -> Finding:
    check, key = "leader", f"{facts.prefix}leader"
    if not facts.leader:
        return Finding(
            check=check,
            status=Status.WARN,
            found="no dispatcher leads this pool",
            fix=f"flexlb dispatcher --pool {needs.pool}",
        )
    if facts.leader_ttl_ms < 0:
        return Finding(
            check=check,
            status=Status.FAIL,
            found=f"the lock {facts.leader} never expires: after its owner's death nobody would lead",
            fix=f"redis-cli DEL {key}; a dispatcher takes it again at once",
        )
    if facts.leader != facts.epoch:
        return Finding(
            check=check,
            status=Status.FAIL,
            found=f"the lock is {facts.leader}, the epoch {facts.epoch or 'absent'}: the owner is refused",
            fix=f"redis-cli DEL {key}; a dispatcher takes it again with a new epoch",
        )
    if not facts.generation:
        return Finding(
            check=check,
            status=Status.WARN,
            found=f"{facts.leader} leads, but has not begun a generation yet",
            fix="run the doctor again; if it stays so, look at the leader's log",
        )
    return Finding(
        check=check,
        status=Status.OK,
        found=f"{facts.leader} leads, generation {facts.generation}, lock for {facts.leader_ttl_ms} ms",
    )


def _epoch(facts: PoolFacts) -> Finding:
    number = facts.epoch.partition(":")[0]
    if not number:
        return Finding(check="epoch", status=Status.OK, found="none yet: nobody has led this pool")
    if not number.isdigit():
        return Finding(
            check="epoch",
            status=Status.FAIL,
            found=f"expected <number>:<owner>, seen {facts.epoch[:60]!r}",
            fix=f"stop the dispatchers; redis-cli SET {facts.prefix}epoch {facts.redis_ms}:x; start them",
        )
    if (ahead_ms := int(number) - facts.redis_ms) > AHEAD_MS:
        return Finding(
            check="epoch",
            status=Status.WARN,
            found=f"{ahead_ms / 1000:.0f} s ahead of Redis's clock, which went back (epochs still rise)",
            fix="synchronise the clock of the Redis host: timedatectl set-ntp true (or chrony)",
        )
    return Finding(check="epoch", status=Status.OK, found=number)


def _nodes(facts: PoolFacts, needs: Needs) -> list[Finding]:
    lost = [node for node in facts.nodes if not node.alive]
    alive = len(facts.nodes) - len(lost)
    if not facts.nodes and not facts.forgotten:
        fix = f"flexlb agent --pool {needs.pool} --engine-url http://<engine> beside each engine"
        return [Finding(check="nodes", status=Status.WARN, found="no node has registered", fix=fix)]
    findings = [Finding(check="nodes", status=Status.OK, found=f"{alive} of {len(facts.nodes)} report")]
    if not alive:
        findings[0] = Finding(
            check="nodes", status=Status.FAIL, found="no node reports", fix="start the agents"
        )
    elif lost:
        findings[0] = Finding(
            check="nodes",
            status=Status.WARN,
            found=f"{_names(lost)} do not report ({alive} of {len(facts.nodes)} do)",
            fix="look at those agents' logs, or start them; nothing, when those nodes are gone for good",
        )
    fenced = [node for node in facts.nodes if node.is_fenced and node.alive]
    if fenced:
        findings.append(
            Finding(
                check="nodes",
                status=Status.WARN,
                found=f"{_names(fenced)} report although their incarnation is fenced",
                fix="they should register anew within seconds; if not, restart those agents",
            )
        )
    if facts.forgotten:
        findings.append(
            Finding(
                check="nodes",
                status=Status.OK,
                found=f"{', '.join(facts.forgotten[:NAMED])}: gone for more than an hour",
            )
        )
    return findings


def _identities(facts: PoolFacts, needs: Needs) -> list[Finding]:
    unread = [node for node in facts.nodes if node.identity is None]
    findings = []
    if unread:
        findings.append(
            Finding(
                check="node identity",
                status=Status.FAIL,
                found=f"the identity of {_names(unread)} can't be read by this version",
                fix="run the same version of FlexLB everywhere; restart those agents",
            )
        )
    if not (known := [node for node in facts.nodes if node.identity is not None]):
        return findings
    return [*findings, *_blocks(known, needs), _versions(known)]


def _blocks(nodes: list[NodeFacts], needs: Needs) -> list[Finding]:
    others: list[NodeFacts] = []
    indivisible: list[NodeFacts] = []
    sending = 0
    for node in nodes:
        identity = node.identity
        assert identity is not None
        routing, engine = identity.routing_block_size, identity.engine_block_size
        sending += bool(routing)
        if routing and routing != needs.block_size:
            others.append(node)
        if routing and engine and routing % engine:
            indivisible.append(node)
    findings = []
    if others:
        sizes = sorted({node.identity.routing_block_size for node in others if node.identity})
        findings.append(
            Finding(
                check="block size",
                status=Status.FAIL,
                found=f"{_names(others)} cut prompts in blocks of {', '.join(map(str, sizes))} tokens, the "
                f"dispatcher of {needs.block_size}: their caches match nothing",
                fix=f"FLEXLB_BLOCK_SIZE={needs.block_size} for those agents (or the same block_size for all)",
            )
        )
    if indivisible:
        findings.append(
            Finding(
                check="block size",
                status=Status.FAIL,
                found=f"{_names(indivisible)}: the routing block is no multiple of the engine's block",
                fix="set block_size to a common multiple of every engine's block, for the whole pool",
            )
        )
    if not findings:
        found = f"{sending} of {len(nodes)} nodes tell their cache, in blocks of {needs.block_size} tokens"
        findings.append(Finding(check="block size", status=Status.OK, found=found))
    return findings


def _versions(nodes: list[NodeFacts]) -> Finding:
    wire = Counter(node.identity.v for node in nodes if node.identity)
    engines = Counter(node.identity.engine_version or "untold" for node in nodes if node.identity)
    told = ", ".join(f"{count} x {version}" for version, count in sorted(engines.items()))
    if len(wire) > 1:
        mixed = ", ".join(f"{count} x {version}" for version, count in sorted(wire.items()))
        return Finding(
            check="node versions",
            status=Status.WARN,
            found=f"agents speak different versions of the protocol: {mixed}",
            fix="finish the upgrade: run the same version of FlexLB on every node",
        )
    return Finding(
        check="node versions",
        status=Status.OK,
        found=f"protocol {next(iter(wire))}; engine versions: {told}",
    )


def _names(nodes: list[NodeFacts]) -> str:
    named = ", ".join(node.node for node in nodes[:NAMED])
    return named + (f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else "")
