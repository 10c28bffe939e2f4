"""The original's documents: each row of the table, the shapes of JSON, and what can't be served."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.resources import files

import pytest
from pydantic_settings import BaseSettings

from dispatcher.backends.environment import read_effective
from dispatcher.backends.legacy_environment import (
    BEHAVIOUR,
    CONSISTENCY,
    POLICIES,
    ROWS,
    SERVICES,
    STRATEGIES,
    TRAFFIC,
    VARIABLES,
    Row,
    own_hosts,
    read_legacy,
)
from dispatcher.errors import SettingsError
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.settings import DispatcherSettings
from workers_agent.settings import AgentSettings

HERE = frozenset({"localhost", "10.0.0.1"})
README = {
    "WHALE_MASTER_CONFIG": json.dumps(
        {
            "deploy": "DISAGGREGATED",
            "loadBalanceStrategy": "ROUND_ROBIN_LOWEST_CONCURRENCY",
            "prefillBatchWaitTimeMs": 100,
            "kvCache": "LOCAL_STATIC",
            "staticCacheBlockSize": 500,
            "batchSize": 1,
            "prefillLbTimeoutMs": 300,
            "prefillGenerateTimeoutMs": 5000,
            "enableGrpcPrefillMaster": False,
        }
    ),
    "MODEL_SERVICE_CONFIG": json.dumps(
        {
            "prefill_endpoint": {
                "path": "/",
                "protocol": "http",
                "type": "SpecifiedIpPortList",
                "address": '["localhost:8080"]',
            },
            "service_id": "model.service",
        }
    ),
    "WHALE_SYNC_LB_CONSISTENCY_CONFIG": json.dumps(
        {"needConsistency": False, "masterElectType": "ZOOKEEPER", "zookeeperConfig": {"zkHost": "z:2181"}}
    ),
}
ENDPOINT = {"type": "SpecifiedIpPortList", "address": ["10.0.0.1:80"], "protocol": "http", "path": "/"}
URL = "http://10.0.0.1:80"
SET: dict[tuple[str, str], tuple[object, dict[str, object]]] = {
    ("FLEXLB_CONFIG", "loadBalanceStrategy"): ("random", {"dispatcher.policy": "random"}),
    ("FLEXLB_CONFIG", "scoreTieThresholdPct"): (
        0.1,
        {"dispatcher.near_tie": 0.1, "dispatcher.cost_tie_share": 0.1},
    ),
    ("FLEXLB_CONFIG", "scoreTieThresholdMs"): (20, {"dispatcher.cost_tie_ms": 20.0}),
    ("FLEXLB_CONFIG", "costHotspotMultiplier"): ("3.0", {"dispatcher.cost_hotspot": 3.0}),
    ("FLEXLB_CONFIG", "costImbalanceMultiplier"): (2, {"dispatcher.cost_imbalance": 2.0}),
    ("FLEXLB_CONFIG", "prefillQueueSizeThreshold"): (64, {"dispatcher.cost_queue_limit": 64.0}),
    ("FLEXLB_CONFIG", "hysteresisBiasPercent"): (15, {"dispatcher.cost_hysteresis_percent": 15.0}),
    ("FLEXLB_CONFIG", "costSloFilterEnabled"): ("true", {"dispatcher.cost_slo_filter": True}),
    ("FLEXLB_CONFIG", "costSloMs"): (500, {"dispatcher.cost_slo_ms": 500.0}),
    ("FLEXLB_CONFIG", "costSloRiskMarginMs"): (100, {"dispatcher.cost_slo_margin_ms": 100.0}),
    ("FLEXLB_CONFIG", "shortestTtftCandidatePoolMode"): ("FIXED", {"dispatcher.ttft_pool": "fixed"}),
    ("FLEXLB_CONFIG", "shortestTtftCandidatePoolRatio"): (0.5, {"dispatcher.ttft_pool_ratio": 0.5}),
    ("FLEXLB_CONFIG", "shortestTtftCandidatePoolMinSize"): (2, {"dispatcher.ttft_pool_least": 2.0}),
    ("FLEXLB_CONFIG", "shortestTtftCandidatePoolSize"): (3, {"dispatcher.ttft_pool_size": 3.0}),
    ("FLEXLB_CONFIG", "prefillBatchWaitTimeMs"): (100, {"dispatcher.batch_wait_ms": 100.0}),
    ("FLEXLB_CONFIG", "flexlbBatchFixedWaitMs"): ("300", {"dispatcher.batch_wait_ms": 300.0}),
    ("FLEXLB_CONFIG", "batchSize"): (8, {"dispatcher.batch_size": 8.0}),
    ("FLEXLB_CONFIG", "flexlbBatchSizeMax"): (32, {"dispatcher.batch_size": 32.0}),
    ("FLEXLB_CONFIG", "workerTimeoutMs"): (
        10_000,
        {"dispatcher.heartbeat_ttl_s": 10.0, "agent.heartbeat_ttl_s": 10.0},
    ),
    ("FLEXLB_CONFIG", "prefillGenerateTimeoutMs"): ("5000", {"agent.first_token_timeout_s": 5.0}),
    ("FLEXLB_SYNC_CONSISTENCY_CONFIG", "needConsistency"): (False, {"dispatcher.election": False}),
    ("MODEL_SERVICE_CONFIG", "prefill_endpoint"): (ENDPOINT, {"agent.engine_url": URL}),
    ("MODEL_SERVICE_CONFIG", "decode_endpoint"): (ENDPOINT, {"agent.engine_url": URL}),
    ("MODEL_SERVICE_CONFIG", "pd_fusion_endpoint"): (ENDPOINT, {"agent.engine_url": URL}),
    ("MODEL_SERVICE_CONFIG", "vit_endpoint"): (ENDPOINT, {"agent.engine_url": URL, "agent.role": "vit"}),
}


def read(
    table: str, environ: dict[str, str], hosts: Collection[str] = HERE
) -> tuple[dict[str, object], list[str]]:
    legacy = read_legacy(environ, table, hosts=lambda: hosts)
    return {f"{table}.{name}": value for name, (value, _) in legacy.values.items()}, legacy.warnings


def documents(row: Row) -> str:
    return row.document.variables[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{documents(row)}-{row.key}")
def test_each_row_sets_what_it_says_or_says_why_not(row: Row) -> None:
    variable, outer = documents(row), row.key.removeprefix("role_endpoints[].")
    key = outer.replace("*", "Anything")
    value, expected = SET.get((variable, outer), (1, {}))
    content: dict[str, object] = {key: value}
    if outer != row.key:
        content = {"role_endpoints": [content]}
    environ = {variable: json.dumps(content)}
    values: dict[str, object] = {}
    warnings: list[str] = []
    for table in ("dispatcher", "agent"):
        found, said = read(table, environ)
        values.update(found)
        warnings += said
    assert values == expected
    assert bool(row.settings) == bool(expected)
    if not row.settings:
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{variable}: {'role_endpoints[].' if outer != row.key else ''}{key}: ")
        assert warnings[0].endswith(f": not used: {row.why}")


def test_every_example_belongs_to_a_row() -> None:
    keys = {(documents(row), row.key.removeprefix("role_endpoints[].")) for row in ROWS if row.settings}
    assert set(SET) == keys


@pytest.mark.parametrize("row", [row for row in ROWS if row.settings], ids=lambda row: row.key)
def test_settings_of_the_table_exist(row: Row) -> None:
    kinds: dict[str, type[BaseSettings]] = {"dispatcher": DispatcherSettings, "agent": AgentSettings}
    for setting in row.settings:
        table, _, name = setting.partition(".")
        assert name in kinds[table].model_fields


@pytest.mark.parametrize("strategy", POLICIES)
def test_each_strategy_is_a_policy_that_exists(strategy: str) -> None:
    environ = {"FLEXLB_CONFIG": json.dumps({"loadBalanceStrategy": strategy})}
    assert read_effective(DispatcherSettings, {}, environ).settings.policy == POLICIES[strategy]


def test_the_original_s_own_example_starts_both_processes() -> None:
    dispatcher = read_effective(DispatcherSettings, {}, README)
    agent = read_effective(AgentSettings, {}, README)
    assert dispatcher.settings.policy == "round_robin_lowest_concurrency"
    assert (dispatcher.settings.batch_wait_ms, dispatcher.settings.batch_size) == (100, 1)
    assert dispatcher.settings.election is False
    assert agent.settings.engine_url == "http://localhost:8080"
    assert agent.settings.role == "fused"
    assert agent.settings.first_token_timeout_s == 5
    warned = "\n".join((*dispatcher.warnings, *agent.warnings))
    unserved = (
        *("deploy", "kvCache", "staticCacheBlockSize"),
        *(
            "prefillLbTimeoutMs",
            "enableGrpcPrefillMaster",
            "masterElectType",
            "zookeeperConfig",
            "service_id",
        ),
    )
    for key in unserved:
        assert f": {key}: not used: " in warned
    assert "prefillBatchWaitTimeMs: up to batch_size requests for one node wait for each other now" in warned
    assert "run 'flexlb agent' beside each of http://localhost:8080" in "\n".join(dispatcher.warnings)
    assert read_effective(FrontendSettings, {}, README).warnings == ()


@pytest.mark.parametrize(
    "document", [BEHAVIOUR, CONSISTENCY, SERVICES, TRAFFIC, STRATEGIES], ids=lambda one: one.variables[0]
)
@pytest.mark.parametrize("text", ["{", "[]", "5", "/config/master.json"])
@pytest.mark.parametrize("table", ["dispatcher", "agent"])
def test_malformed_document_names_its_variable(document: object, text: str, table: str) -> None:
    for variable in document.variables:  # type: ignore[attr-defined]
        with pytest.raises(SettingsError, match=rf"^{variable}: expected a JSON object, seen "):
            read_legacy({variable: text}, table)


@pytest.mark.parametrize(
    ("variable", "content", "message"),
    [
        (
            "WHALE_MASTER_CONFIG",
            {"loadBalanceStrategy": "WEIGHTED_CACHE"},
            'loadBalanceStrategy: expected one of COST_BASED_PREFILL, .*, seen "WEIGHTED_CACHE"',
        ),
        ("FLEXLB_CONFIG", {"prefillGenerateTimeoutMs": "soon"}, "a number of milliseconds, seen"),
        (
            "FLEXLB_CONFIG",
            {"scoreTieThresholdPct": True},
            "scoreTieThresholdPct: expected a number, seen true",
        ),
        (
            "FLEXLB_CONFIG",
            {"shortestTtftCandidatePoolMode": "HALF"},
            'shortestTtftCandidatePoolMode: expected RATIO or FIXED, seen "HALF"',
        ),
        ("FLEXLB_SYNC_CONSISTENCY_CONFIG", {"needConsistency": 1}, "expected true or false, seen 1"),
        ("MODEL_SERVICE_CONFIG", {"prefill_endpoint": "x"}, "expected an object with type and address"),
        (
            "MODEL_SERVICE_CONFIG",
            {"prefill_endpoint": {"type": "VipServer", "address": "a.b"}},
            "expected type SpecifiedIpPortList",
        ),
        (
            "MODEL_SERVICE_CONFIG",
            {"prefill_endpoint": {**ENDPOINT, "address": "[oops"}},
            "expected an address list",
        ),
        (
            "MODEL_SERVICE_CONFIG",
            {"prefill_endpoint": {**ENDPOINT, "address": ["localhost"]}},
            "expected addresses host:port, and one is 'localhost'",
        ),
    ],
)
def test_wrong_value_is_told_with_variable_and_key(
    variable: str, content: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        read_legacy({variable: json.dumps(content)}, "agent")
    assert str(raised.value).startswith(f"{variable}: ")


def test_the_constants_of_the_original_s_policies_come_through() -> None:
    config = {
        "loadBalanceStrategy": "COST_BASED_PREFILL",
        "costHotspotMultiplier": 2.5,
        "prefillQueueSizeThreshold": 100_000,
        "costSloFilterEnabled": True,
        "shortestTtftCandidatePoolMode": "FIXED",
        "shortestTtftCandidatePoolSize": 4,
    }
    settings = read_effective(DispatcherSettings, {}, {"FLEXLB_CONFIG": json.dumps(config)}).settings
    assert settings.policy == "cost_based_prefill"
    assert (settings.cost_hotspot, settings.cost_queue_limit, settings.cost_slo_filter) == (
        2.5,
        100_000,
        True,
    )
    assert (settings.ttft_pool, settings.ttft_pool_size) == ("fixed", 4)


def test_value_out_of_bounds_is_told_with_variable_and_key() -> None:
    with pytest.raises(
        SettingsError, match=r"^FLEXLB_CONFIG: scoreTieThresholdPct: expected a number from 0"
    ):
        read_effective(DispatcherSettings, {}, {"FLEXLB_CONFIG": '{"scoreTieThresholdPct": 5}'})


def test_unknown_key_is_warned_of_with_the_nearest() -> None:
    _, warnings = read("dispatcher", {"FLEXLB_CONFIG": '{"loadBalanceStrategi": "RANDOM"}'})
    assert warnings == [
        "FLEXLB_CONFIG: loadBalanceStrategi: not used: no such key is known; "
        "did you mean 'loadBalanceStrategy'?"
    ]


def test_newer_variable_wins_and_the_older_is_named() -> None:
    values, warnings = read(
        "dispatcher",
        {
            "WHALE_MASTER_CONFIG": '{"loadBalanceStrategy": "RANDOM"}',
            "FLEXLB_CONFIG": '{"loadBalanceStrategy": "ROUND_ROBIN"}',
        },
    )
    assert values == {"dispatcher.policy": "round_robin"}
    assert warnings == ["WHALE_MASTER_CONFIG: not used: FLEXLB_CONFIG is set too and newer"]


def test_document_inside_a_deployment_template_is_found() -> None:
    inner = json.dumps({"loadBalanceStrategy": "RANDOM"})
    envs = [["OTHER", "x"], ["FLEXLB_CONFIG", inner]]
    template = {"zone_process_setting": {"process_info": {"envs": envs}}}
    values, warnings = read("dispatcher", {"WHALE_MASTER_CONFIG": json.dumps(template)})
    assert (values, warnings) == ({"dispatcher.policy": "random"}, [])
    with pytest.raises(SettingsError, match="seen a deployment without it; set FLEXLB_CONFIG itself"):
        read_legacy({"WHALE_MASTER_CONFIG": '{"zone_process_setting": {}}'}, "dispatcher")


def test_a_variable_of_a_field_wins_over_the_document() -> None:
    environ = {
        "FLEXLB_CONFIG": '{"loadBalanceStrategy": "RANDOM", "scoreTieThresholdPct": 0.2}',
        "LOAD_BALANCE_STRATEGY": "ROUND_ROBIN",
        "COST_SLO_MS": "800",
        "COST_FORMULA": "1",
        "HTTP_PROXY": "http://proxy:3128",
        "batchSize": "1",
    }
    legacy = read_legacy(environ, "dispatcher")
    assert legacy.values == {
        "policy": ("round_robin", "LOAD_BALANCE_STRATEGY"),
        "near_tie": (0.2, "FLEXLB_CONFIG: scoreTieThresholdPct"),
        "cost_tie_share": (0.2, "FLEXLB_CONFIG: scoreTieThresholdPct"),
        "cost_slo_ms": (800.0, "COST_SLO_MS"),
    }
    assert len(legacy.warnings) == 1
    assert legacy.warnings[0].startswith("COST_FORMULA: not used: the cost of a prefill is learned")
    with pytest.raises(SettingsError, match=r"^WORKER_TIMEOUT_MS: expected a number of milliseconds, seen"):
        read_legacy({**environ, "WORKER_TIMEOUT_MS": "long"}, "dispatcher")


@pytest.mark.parametrize(("pattern", "why"), VARIABLES)
def test_each_variable_that_is_no_document_says_why_it_sets_nothing(pattern: str, why: str) -> None:
    name = pattern.replace("*", "ANY")
    _, warnings = read("dispatcher", {"FLEXLB_CONFIG": "{}", name: "1"})
    assert warnings == [f"{name}: not used: {why}"]
    assert read("agent", {"FLEXLB_CONFIG": "{}", name: "1"}) == ({}, [])


def test_without_a_document_no_variable_is_taken_for_the_original_s() -> None:
    environ = {"LOAD_BALANCE_STRATEGY": "RANDOM", "BATCH_SIZE": "8", "SYNC_STATUS_INTERVAL": "20"}
    assert read("dispatcher", environ) == ({}, [])


def services(**endpoints: object) -> dict[str, str]:
    return {"MODEL_SERVICE_CONFIG": json.dumps({"role_endpoints": [{"group": "default", **endpoints}]})}


def at(*addresses: str, **more: object) -> dict[str, object]:
    return {"type": "SpecifiedIpPortList", "address": ",".join(addresses), **more}


def test_of_several_engines_the_agent_takes_the_one_of_its_machine() -> None:
    environ = services(prefill_endpoint=at("10.0.0.1:80"), decode_endpoint=at("10.0.0.2:80"))
    values, warnings = read("agent", environ)
    assert values == {"agent.engine_url": "http://10.0.0.1:80", "agent.role": "prefill"}
    assert warnings == []
    values, _ = read("agent", environ, hosts={"10.0.0.2"})
    assert values == {"agent.engine_url": "http://10.0.0.2:80", "agent.role": "decode"}


@pytest.mark.parametrize("hosts", [set(), {"10.0.0.1", "10.0.0.2"}])
def test_engines_that_no_agent_can_choose_among_are_named(hosts: set[str]) -> None:
    values, warnings = read("agent", services(pd_fusion_endpoint=at("10.0.0.1:80", "10.0.0.2:81")), hosts)
    assert values == {}
    assert len(warnings) == 1
    assert "among http://10.0.0.1:80, http://10.0.0.2:81; run one agent for each engine" in warnings[0]


def test_grpc_address_is_one_above_the_engine_s_http_port() -> None:
    values, _ = read("agent", services(pd_fusion_endpoint=at("h:8081", protocol="grpc")))
    assert values == {"agent.engine_url": "http://h:8080"}


def test_static_discovery_names_engines_too() -> None:
    endpoint = {"address": "any", "discovery": {"type": "static-env", "hosts": ["[::1]:8080"]}}
    values, _ = read("agent", services(pd_fusion_endpoint=endpoint))
    assert values == {"agent.engine_url": "http://[::1]:8080"}


def test_own_hosts_hold_the_loopback() -> None:
    assert {"localhost", "127.0.0.1"} <= own_hosts()


def test_the_documentation_names_every_key_that_sets_something() -> None:
    text = (files("dispatcher") / "docs" / "settings.md").read_text()
    for row in ROWS:
        if row.settings:
            assert f"`{row.key.removeprefix('role_endpoints[].')}`" in text
            for setting in row.settings:
                assert f"`{setting.partition('.')[2]}`" in text
        assert all(variable in text or not row.settings for variable in row.document.variables)
