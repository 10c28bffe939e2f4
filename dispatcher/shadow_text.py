"""What a shadow found, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from dispatcher.scheduling.shadow import Summary, Times, Verdict

VERDICTS = {
    Verdict.SAME: "the same node",
    Verdict.NEAR_TIE: "another node that costs the same, but for a near tie",
    Verdict.NOT_LOOKED_AT: "the leader's node costs no more; the shadow did not look at it",
    Verdict.QUEUE: "the shadow's has less work queued",
    Verdict.SLOT: "the shadow's has a slot or KV cache sooner",
    Verdict.CACHE: "the shadow's computes the prompt sooner: it holds more of it, or is faster",
    Verdict.STALL: "the shadow's has fewer answers to stall",
    Verdict.BURST: "the shadow's had fewer long prompts of late",
    Verdict.FULL: "the shadow's is less full",
    Verdict.HOP: "the shadow's needs no hand-over",
    Verdict.KV: "the shadow's uses less of its KV cache",
    Verdict.RULE: "the shadow's policy does not choose by cost",
    Verdict.BARRED: "the shadow holds the leader's node for one that can't be chosen",
    Verdict.UNKNOWN_NODE: "the shadow does not know the leader's node",
    Verdict.NO_NODE: "the shadow knows no node that could take it",
    Verdict.REFUSED: "the shadow would have refused it",
}


def as_text(found: Summary) -> str:
    """The whole of it."""
    return "\n".join(_lines(found))


def _lines(found: Summary) -> Iterator[str]:
    yield (
        f"shadow by {found.policy} ({found.decode_policy} for decode): {found.compared:,} decisions "
        f"compared, {found.unseen:,} not seen in time"
    )
    if not found.compared:
        return
    yield f"agreement {found.agreement:.1%}; {found.would_wait:,} would have waited for the shadow's node"
    for verdict, count in found.verdicts.items():
        yield f"  {count:>9,}  {count / found.compared:6.1%}  {VERDICTS[Verdict(verdict)]}"
    yield f"{'predicted time to first token, ms':40} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}"
    yield _row("the shadow's choices", found.own_ttft)
    yield _row("the leader's choices", found.leader_ttft)
    yield _row("the shadow's, where they differ", found.own_ttft_apart)
    yield _row("the leader's, where they differ", found.leader_ttft_apart)
    yield "whether the shadow's model can be believed, of what ended, ms"
    yield _row("predicted of the leader's choices", found.predicted)
    yield _row("what it was", found.measured)


def _row(name: str, times: Times) -> str:
    return (
        f"  {name:38} {times.mean_ms:9.1f} {times.p50_ms:9.1f} {times.p90_ms:9.1f} {times.p99_ms:9.1f}"
        f"  ({times.count:,})"
    )
