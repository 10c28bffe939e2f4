"""Isolation: tenants share no cached prompt, in what is routed by and in what engines are told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dispatcher.protocol.assignment import decode_job_data
from dispatcher.protocol.request import Endpoint
from dispatcher.protocol.tenant_salt import effective_salt, salted_hashes
from dispatcher.protocol.text_hash import text_hashes
from dispatcher.scheduling.admission import Admitted, admit
from tests.unit.test_admission import LIMITS, NOW_MS, REF, record
from workers_agent.engines.openai_http import streaming_body

ISOLATED = replace(LIMITS, isolate_tenants=True)
PROMPT = "word " * 1000


def admitted(*, limits: object = ISOLATED, **fields: object) -> Admitted:
    decision = admit(
        REF,
        b"key",
        record(**fields),
        appended_ms=NOW_MS,
        now_ms=NOW_MS,
        traceparent="",
        limits=limits,  # type: ignore[arg-type]
        carry_bodies=True,
    )
    assert isinstance(decision, Admitted), decision
    return decision


@pytest.mark.parametrize("one", [("a", "b"), ("ab", ""), ("", "ab"), ("a", ""), ("", "")])
@pytest.mark.parametrize("other", [("a", "b1"), ("1:a", "b"), ("", "1:a:b"), ("a:", "b"), ("b", "")])
def test_no_two_tenants_come_to_one_salt(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert effective_salt(*one, isolate=True) != effective_salt(*other, isolate=True)


def test_without_isolation_the_salt_is_the_request_s_own() -> None:
    assert effective_salt("tenant", "blue", isolate=False) == "blue"
    work = decode_job_data(admitted(limits=LIMITS, tenant="t", cache_salt="blue").data)
    assert work.cache_salt == "blue"


def test_tenants_with_one_prompt_share_no_hash_and_no_salt() -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    found = [admitted(tenant=tenant, body=body) for tenant in ("a", "b", "")]
    hashes = [set(one.envelope.block_hashes) for one in found]
    assert all(hashes)
    assert not hashes[0] & hashes[1] | hashes[1] & hashes[2] | hashes[0] & hashes[2]
    assert len({decode_job_data(one.data).cache_salt for one in found}) == 3


def test_hashes_made_by_a_client_are_salted_too() -> None:
    given = text_hashes(json.dumps({"prompt": PROMPT}).encode(), model="m")
    one = admitted(tenant="a", text_hashes=list(given)).envelope.block_hashes
    other = admitted(tenant="b", text_hashes=list(given)).envelope.block_hashes
    assert len(one) == len(other) == len(given)
    assert not set(one) & set(other) | set(one) & set(given)
    assert one == salted_hashes(given, effective_salt("a", "", isolate=True))


def test_the_engine_is_told_the_salt_that_counts() -> None:
    body, _ = streaming_body(Endpoint.COMPLETIONS, b'{"prompt":"x","cache_salt":"own"}', "m", "1:a:")
    assert json.loads(body)["cache_salt"] == "1:a:"
    body, _ = streaming_body(Endpoint.COMPLETIONS, b'{"prompt":"x","cache_salt":"own"}', "m")
    assert json.loads(body)["cache_salt"] == "own"
