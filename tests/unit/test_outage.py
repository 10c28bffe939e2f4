"""When failures are the nodes' and not the request's."""

from __future__ import annotations

import random

from dispatcher.protocol.node import NodeIdentity, NodeReport
from dispatcher.scheduling.breaker import FAILURES
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.outage import Outage, outage_of

RNG = random.Random(0)


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    for number in range(count):
        identity = NodeIdentity(node=f"n{number}", incarnation="x", models=("m",))
        fleet.admit(identity, 0.0)
    return fleet


def fail(fleet: Fleet, name: str, *refs: str) -> None:
    for number in range(FAILURES):
        fleet.nodes[name].breaker.failed(refs[number % len(refs)], 0.0, RNG)


def seen(fleet: Fleet) -> Outage:
    return outage_of(fleet.serving("m"))


def test_one_request_that_fails_everywhere_is_no_outage() -> None:
    fleet = fleet_of(3)
    for name in fleet.nodes:
        fail(fleet, name, "bad")
    assert seen(fleet) == Outage(nodes=3, ailing=0, down=0)
    assert not seen(fleet).excuses_failure


def test_most_nodes_that_fail_different_requests_are() -> None:
    fleet = fleet_of(3)
    fail(fleet, "n0", "a", "b")
    assert not seen(fleet).excuses_failure
    fail(fleet, "n1", "b", "c")
    assert seen(fleet) == Outage(nodes=3, ailing=2, down=2)
    assert seen(fleet).excuses_failure
    fleet.nodes["n1"].breaker.succeeded(1e9)
    assert not seen(fleet).excuses_failure


def test_nodes_without_a_living_agent_are_no_part_of_it() -> None:
    fleet = fleet_of(4)
    fail(fleet, "n0", "a", "b")
    for name in ("n2", "n3"):
        fleet.nodes[name].available = False
    assert seen(fleet) == Outage(nodes=2, ailing=1, down=1)
    fleet.nodes["n1"].available = False
    assert seen(fleet).excuses_failure
    assert not Outage().excuses_failure


def test_engines_that_do_not_work_excuse_crashes_and_not_failures() -> None:
    fleet = fleet_of(4)
    for name in ("n0", "n1", "n2"):
        report = NodeReport(node=name, incarnation="x", sequence=1, engine_ok=False)
        assert not seen(fleet).excuses_crash
        fleet.nodes[name].hear(report, 0.0, 0.0)
    assert seen(fleet) == Outage(nodes=4, ailing=0, down=3)
    assert seen(fleet).excuses_crash
    assert not seen(fleet).excuses_failure
