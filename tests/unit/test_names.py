"""Names: one alphabet, exact round trips, and nothing of a client's ever in a key."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dispatcher.protocol.names import (
    MAX_NAME_CHARS,
    Attempt,
    JobId,
    Lane,
    Names,
    Ref,
    check_name,
    node_name_from_host,
)

RQ_ALPHABET = re.compile(r"[A-Za-z0-9_-]+\Z")
KAFKA_ALPHABET = re.compile(r"[A-Za-z0-9._-]{1,249}\Z")
REDIS_GLOB = set("*?[]^\\")

name = st.from_regex(r"[A-Za-z0-9_]{1,6}(-[A-Za-z0-9_]{1,4}){0,3}", fullmatch=True)
refs = st.builds(
    Ref,
    lane=st.sampled_from(Lane),
    partition=st.integers(min_value=0, max_value=999_999_999),
    offset=st.integers(min_value=0, max_value=2**63 - 1),
)
attempts = st.builds(
    Attempt, epoch=st.integers(min_value=0, max_value=2**53), n=st.integers(min_value=0, max_value=10**6)
)
job_ids = st.builds(JobId, pool=name, node=name, ref=refs, attempt=attempts)


def node_keys(names: Names, node: str) -> set[str]:
    """Every Redis key that belongs to one node."""
    return {
        names.node(node),
        names.load(node),
        names.claimed(node),
        names.held(node),
        names.control(node),
        names.last_claim(node),
        names.queue_key(node),
        names.intermediate(node),
        names.wip(node),
        names.failed(node),
        names.worker(node),
    }


def pool_keys(names: Names) -> set[str]:
    """Every Redis key of a pool that carries no other name."""
    return {
        names.leader,
        names.epoch,
        names.renewals,
        names.generation,
        names.marks,
        names.settled,
        names.pending,
        names.closing,
        names.reports,
        names.blocks,
        names.nodes,
    }


# Round trips


@given(ref=refs)
def test_a_ref_survives_its_text(ref: Ref) -> None:
    assert Ref.parse(str(ref)) == ref
    assert str(ref).startswith(f"{ref.source}_")


@given(attempt=attempts)
def test_an_attempt_survives_its_text(attempt: Attempt) -> None:
    assert Attempt.parse(str(attempt)) == attempt


@given(job=job_ids)
def test_a_job_id_survives_its_text_in_rqs_alphabet(job: JobId) -> None:
    assert JobId.parse(str(job)) == job
    assert RQ_ALPHABET.match(str(job))


@given(left=attempts, right=attempts)
def test_attempts_are_ordered_by_epoch_then_count(left: Attempt, right: Attempt) -> None:
    assert (left < right) == ((left.epoch, left.n) < (right.epoch, right.n))


@pytest.mark.parametrize("parse", [Ref.parse, Attempt.parse, JobId.parse], ids=["ref", "attempt", "job id"])
@given(text=st.text())
def test_any_text_is_parsed_or_refused_with_a_short_message(
    parse: Callable[[str], object], text: str
) -> None:
    message = ""
    try:
        parse(text)
    except ValueError as error:
        message = str(error)
    assert len(message) < 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "i3",
        "3_4",
        "x3_4",
        "i3_4\n",
        " i3_4",
        "i-3_4",
        "i3_-4",
        "i3_4_5",
        "I3_4",
        "i3.0_4",
        f"i3_{10**20}",
        f"i{10**10}_4",
    ],
)
def test_what_is_no_ref_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ref: expected <i\|b><partition>_<offset>"):
        Ref.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job",
        "00000000-0000-0000-0000-000000000000",
        "p--n--i0_1",
        "p--n--i0_1--5",
        "p--n--i0_1--5_1--x",
        "p--n--x0_1--5_1",
        "p----i0_1--5_1",
        "--n--i0_1--5_1",
        "p---n--i0_1--5_1",
        "p:n--n--i0_1--5_1",
        "p--n--i0_1--5_1\n",
        "p--n--i0_1--5_-1",
        f"p--n--i0_{10**25}--5_1",
        f"p--n--i0_1--{'9' * 5000}_1",
    ],
)
def test_what_is_no_job_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        JobId.parse(text)


# Pools and nodes


@given(value=name)
def test_good_names_pass(value: str) -> None:
    assert check_name("node", value) == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "-",
        "a-",
        "-a",
        "a--b",
        "a:b",
        "a b",
        "a.b",
        "a*",
        "a\n",
        "a\0",
        "é",
        "١",
        "{a}",
        "a/b",
        "x" * 65,
    ],
)
def test_bad_names_are_refused_with_what_to_do(value: str) -> None:
    with pytest.raises(ValueError, match="rename the node"):
        check_name("node", value)
    with pytest.raises(ValueError, match="pool name: expected 1-64 characters"):
        Names(value)


@given(host=st.text())
def test_any_host_name_becomes_a_node_name(host: str) -> None:
    node = node_name_from_host(host)
    assert check_name("node", node) == node


def test_a_usual_host_name_stays_readable() -> None:
    assert node_name_from_host("gpu-17.rack4.example.com") == "gpu_17_rack4_example_com"
    assert node_name_from_host("...") == "node"
    assert len(node_name_from_host("x" * 500)) == MAX_NAME_CHARS


# What clients say never reaches a name


@given(tenant=st.text(), request_id=st.text())
def test_a_clients_words_reach_redis_only_as_a_digest(tenant: str, request_id: str) -> None:
    names = Names("p")
    key = names.identity(tenant, request_id)
    assert re.fullmatch(r"flexlb:p:id:[0-9a-f]{32}", key)


@given(left=st.tuples(st.text(), st.text()), right=st.tuples(st.text(), st.text()))
def test_two_identities_never_share_a_key(left: tuple[str, str], right: tuple[str, str]) -> None:
    assume(left != right)
    names = Names("p")
    assert names.identity(*left) != names.identity(*right)


@given(text=st.text(min_size=2), cut=st.integers(min_value=1))
def test_moving_text_between_tenant_and_id_makes_another_identity(text: str, cut: int) -> None:
    cut = 1 + cut % (len(text) - 1)
    names = Names("p")
    assert names.identity(text[:cut], text[cut:]) != names.identity("", text)


# Confinement


@given(pool=name, node=name, other=name)
def test_nodes_share_no_key_and_no_job(pool: str, node: str, other: str) -> None:
    assume(node != other)
    names = Names(pool)
    assert not node_keys(names, node) & node_keys(names, other)
    assert not node_keys(names, node) & pool_keys(names)
    job = JobId(pool, other, Ref(Lane.BATCH, 1, 2), Attempt(3, 4))
    assert not str(job).startswith(names.queue(node) + "--")


@given(pool=name, other=name, node=name)
def test_pools_share_no_name(pool: str, other: str, node: str) -> None:
    assume(pool != other)
    mine, theirs = Names(pool), Names(other)
    assert not (node_keys(mine, node) | pool_keys(mine)) & (node_keys(theirs, node) | pool_keys(theirs))
    assert not set(mine.topics) & set(theirs.topics)
    assert mine.group != theirs.group
    assert mine.transactional_id != theirs.transactional_id
    assert not theirs.prefix.startswith(mine.prefix)
    assert mine.identity("t", "id") != theirs.identity("t", "id")


@given(pool=name, node=name)
def test_names_fit_the_servers_that_take_them(pool: str, node: str) -> None:
    names = Names(pool)
    assert all(KAFKA_ALPHABET.match(topic) for topic in names.topics)
    assert RQ_ALPHABET.match(names.queue(node))
    for key in node_keys(names, node) | pool_keys(names):
        assert not REDIS_GLOB & set(key)
        assert key.isascii()


def test_there_are_seven_topics_and_a_lane_has_its_own() -> None:
    names = Names()
    assert names.requests(Lane.INTERACTIVE) == "flexlb.default.requests"
    assert names.requests(Lane.BATCH) == "flexlb.default.requests.batch"
    assert len(set(names.topics)) == 7
    assert {names.bodies, names.cancels, names.replies, names.outcomes, names.dead} < set(names.topics)


def test_rqs_keys_are_those_that_rq_makes() -> None:
    names = Names("p")
    assert names.queue("n") == "p--n"
    assert names.queue_key("n") == "rq:queue:p--n"
    assert names.intermediate("n") == "rq:queue:p--n:intermediate"
    assert names.wip("n") == "rq:wip:p--n"
    assert names.failed("n") == "rq:failed:p--n"
    assert names.worker("n") == "rq:worker:p--n"
    assert names.job("x") == "rq:job:x"
