"""What a frontend is told besides bodies: headers, keys, settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.backends.environment import read_settings
from dispatcher.errors import SettingsError
from dispatcher.frontend.api_keys import ApiKeys, read_api_keys
from dispatcher.frontend.problem import Refused
from dispatcher.frontend.request_headers import RequestHeaders, read_headers
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.protocol.names import Lane

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_headers_that_say_nothing_leave_the_defaults() -> None:
    assert read_headers({}) == RequestHeaders()


def test_headers_are_read() -> None:
    headers = {
        "X-Request-Id": "a-1",
        "X-FlexLB-Priority": "100",
        "X-FlexLB-Deadline-Ms": " 604800000 ",
        "X-FlexLB-TTFT-SLO-Ms": "1",
        "X-FlexLB-Lane": "Batch",
        "traceparent": TRACE,
    }
    assert read_headers(headers) == RequestHeaders(
        request_id="a-1",
        priority=100,
        deadline_ms=604_800_000,
        ttft_slo_ms=1,
        lane=Lane.BATCH,
        traceparent=TRACE,
    )


@pytest.mark.parametrize("given", ["", "a b", "ä", "x" * 201, "a\n"])
def test_an_id_that_can_not_be_used_is_left_out(given: str) -> None:
    assert read_headers({"X-Request-Id": given}).request_id == ""


@pytest.mark.parametrize("given", ["", "00", TRACE.upper(), TRACE + "\n"])
def test_a_trace_that_can_not_be_passed_on_is_left_out(given: str) -> None:
    assert read_headers({"traceparent": given}).traceparent == ""


@pytest.mark.parametrize("name", ["X-FlexLB-Priority", "X-FlexLB-Deadline-Ms", "X-FlexLB-TTFT-SLO-Ms"])
@pytest.mark.parametrize("given", ["", "0", "1.0", "-1", "1e3", "soon", "9" * 12, "9" * 5000, "²"])
def test_a_number_out_of_bounds_is_refused_by_name(name: str, given: str) -> None:
    with pytest.raises(Refused, match=f"header {name}: expected a whole number from 1 to") as caught:
        read_headers({name: given})
    assert (caught.value.problem.status, caught.value.problem.param) == (400, name)
    assert len(caught.value.problem.message) < 200


def keys_of(folder: Path, content: str) -> ApiKeys:
    file = folder / "keys"
    file.write_text(content, encoding="utf-8")
    return read_api_keys(str(file))


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, "# ours\n\nkey-1:acme\n key-2 : acme \nkey-3\nschlüssel:b\n")
    assert keys.tenants == ("", "acme", "b")
    for key, tenant in (("key-1", "acme"), ("key-2", "acme"), ("key-3", ""), ("schlüssel", "b")):
        assert keys.tenant_of(f"Bearer {key}") == tenant
        assert keys.tenant_of(f"bearer  {key} ") == tenant


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer key", "Basic key-1", "key-1", "Bearer \udcff"]
)
def test_any_other_key_is_refused(given: str) -> None:
    with pytest.raises(Refused) as caught:
        ApiKeys([("key-1", "acme")]).tenant_of(given)
    assert caught.value.problem.status == 401
    assert "key-1" not in caught.value.problem.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one key"),
        ("a:b\n:c", "line 2: expected key or key:tenant"),
        ("secret:a\nsecret:b", "line 2: expected a new key"),
        ("a:" + "x" * 257, "line 1"),
        ("\n".join(f"k{number}:t{number}" for number in range(65)), "at most 64 tenants, seen 65"),
    ],
)
def test_a_wrong_file_of_keys_is_refused_without_showing_a_key(
    tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        keys_of(tmp_path, content)
    assert "secret" not in str(caught.value)


def test_a_missing_file_of_keys_is_refused() -> None:
    with pytest.raises(SettingsError, match="--api-keys-file: expected a text file"):
        read_api_keys("/nowhere/keys")


def test_models_are_named_with_commas() -> None:
    assert FrontendSettings(models=" org/a, b,,").model_names == ("org/a", "b")


def test_a_frontend_has_a_table_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "flexlb.toml"
    file.write_text('kafka = "k:1"\n[frontend]\nport = 0\nmodels = "a"\n')
    read = read_settings(FrontendSettings, {"config_file": str(file), "port": "81"})
    assert (read.kafka, read.port, read.models) == ("k:1", 81, "a")
    with pytest.raises(SettingsError, match=r"--port: expected a whole number from 0 to 65535.*seen 'x'"):
        read_settings(FrontendSettings, {"port": "x"})
