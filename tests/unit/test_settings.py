"""Settings from every source: which one wins, and what a wrong one is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from dispatcher.backends.addresses import (
    SentinelAddress,
    is_http_url,
    is_kafka_servers,
    is_redis_url,
    is_zeromq_endpoint,
    masked,
    sentinel_address,
)
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.effective_settings import print_effective, rows_of
from dispatcher.backends.environment import (
    ALIKE,
    DEFAULT,
    SHARED,
    TABLES,
    expected_of,
    read_effective,
    table_of,
)
from dispatcher.errors import SettingsError
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.services.watch import RECONCILE_S
from dispatcher.settings import DispatcherSettings
from workers_agent.settings import AgentSettings

KINDS: tuple[type[BaseSettings], ...] = (DispatcherSettings, AgentSettings, FrontendSettings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flexlb.toml"


def told(
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    kind: type[BaseSettings] = DispatcherSettings,
) -> str:
    """What a wrong set of sources is told."""
    with pytest.raises(SettingsError) as raised:
        read_effective(kind, flags or {}, environ or {})
    return str(raised.value)


def test_each_source_wins_over_the_next(file: Path) -> None:
    file.write_text('[dispatcher]\npolicy = "round_robin"\n')
    legacy = {"FLEXLB_CONFIG": '{"loadBalanceStrategy": "SHORTEST_TTFT"}'}
    with_file = {**legacy, "FLEXLB_CONFIG_FILE": str(file)}
    with_variable = {**with_file, "FLEXLB_POLICY": "random"}
    flags: dict[str, object] = {"policy": "least_outstanding_tokens"}
    seen = [
        (effective.settings.policy, effective.sources["policy"])
        for effective in (
            read_effective(DispatcherSettings, {}, {}),
            read_effective(DispatcherSettings, {}, legacy),
            read_effective(DispatcherSettings, {}, with_file),
            read_effective(DispatcherSettings, {}, with_variable),
            read_effective(DispatcherSettings, flags, with_variable),
        )
    ]
    assert seen == [
        ("prefill_cost", DEFAULT),
        ("shortest_ttft", "FLEXLB_CONFIG: loadBalanceStrategy"),
        ("round_robin", f"{file}: dispatcher.policy"),
        ("random", "FLEXLB_POLICY"),
        ("least_outstanding_tokens", "--policy"),
    ]


def test_no_batching_window_outlasts_the_guard_s_patience() -> None:
    message = told({"batch_wait_ms": "1001"})
    assert "--batch-wait-ms: expected a number from 0 to 1000" in message
    assert RECONCILE_S >= 2 * 1.0, "what waits for its batch must not be seen twice as bound and pending"


def test_an_unknown_policy_is_told_which_exist() -> None:
    message = told({"policy": "LEAST_KV"})
    assert message.startswith("--policy: expected one of prefill_cost, least_outstanding_tokens, random, ")
    assert "cost_based_prefill (" in message
    assert "COST_BASED_PREFILL" in message
    assert message.endswith("seen 'LEAST_KV'")


def test_flag_names_the_file_over_the_variable(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    file.write_text('pool = "a"')
    other.write_text('pool = "b"')
    effective = read_effective(
        DispatcherSettings, {"config_file": str(file)}, {"FLEXLB_CONFIG_FILE": str(other)}
    )
    assert effective.settings.pool == "a"


def test_one_file_serves_every_process(file: Path) -> None:
    file.write_text(
        'redis = "redis://r/1"\npool = "p"\n[dispatcher]\npool = "own"\nseed = 3\n[agent]\nmax_running = 7\n'
        "[frontend]\nport = 8080\n"
    )
    environ = {"FLEXLB_CONFIG_FILE": str(file)}
    dispatcher = read_effective(DispatcherSettings, {}, environ).settings
    agent = read_effective(AgentSettings, {}, environ).settings
    assert (dispatcher.redis, dispatcher.pool, dispatcher.seed) == ("redis://r/1", "own", 3)
    assert (agent.redis, agent.pool, agent.max_running) == ("redis://r/1", "p", 7)
    frontend = read_effective(FrontendSettings, {}, environ).settings
    assert (frontend.redis, frontend.pool, frontend.port) == ("redis://r/1", "p", 8080)


def test_a_shared_key_that_a_process_does_not_have_is_left_to_those_that_do(file: Path) -> None:
    file.write_text("metrics_port = 9100\ndefault_deadline_s = 60\n")
    environ = {"FLEXLB_CONFIG_FILE": str(file)}
    assert read_effective(AgentSettings, {}, environ).settings.metrics_port == 9100
    assert read_effective(FrontendSettings, {}, environ).settings.default_deadline_s == 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[dispatcher]\nwindow_byte = 1", ["dispatcher.window_byte: ", "did you mean 'window_bytes'?"]),
        ("[dispacher]\nseed = 1", ["dispacher: ", "did you mean 'dispatcher'?"]),
        ("rediss = 'x'", ["rediss: ", "did you mean 'redis'?"]),
        ("zzzzzz = 1", ["zzzzzz: expected a setting, seen an unknown key; 'flexlb config -v' names all"]),
        ("seed = 1", ["seed: ", "move it into [dispatcher]"]),
        ("dispatcher = 1", ["dispatcher: expected a table, seen '1'; write [dispatcher]"]),
        ("agent = []", ["agent: expected a table"]),
        (
            "[dispatcher]\nseed = 'x'",
            ["dispatcher.seed: expected a whole number of at least 0 (", "seen 'x'"],
        ),
        ("[dispatcher]\npool = ['a']", ["dispatcher.pool: expected text", "seen \"['a']\""]),
        ("[dispatcher]\nleader_ttl_s = 61", ["dispatcher.leader_ttl_s: expected a number from 0.2 to 60"]),
        ("kafka = 'a:b'", ["kafka: expected host:port[,host:port] (", "seen 'a:b'"]),
        ("redis = 'redis://u:hush@h/x'", ["redis: expected a URL like ", "seen 'redis://u:***@h/x'"]),
        ("pool =", ["expected TOML: "]),
    ],
)
def test_wrong_file_is_told_with_its_path(file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    message = told({"config_file": str(file)})
    assert message.startswith(f"{file}: ")
    for word in words:
        assert word in message


def test_absent_file_is_told() -> None:
    assert told({"config_file": "/nowhere/x.toml"}).startswith("--config: expected a file that can be read")


def test_another_process_s_table_is_left_to_it(file: Path) -> None:
    file.write_text("[agent]\nmax_runing = 7\n")
    environ = {"FLEXLB_CONFIG_FILE": str(file)}
    assert read_effective(DispatcherSettings, {}, environ).settings == DispatcherSettings()
    assert "did you mean 'max_running'?" in told(environ=environ, kind=AgentSettings)


def test_every_wrong_value_is_named_at_once(file: Path) -> None:
    file.write_text("[dispatcher]\nspan_limit = 1\nunheard = 2\n")
    message = told(
        {"metrics_port": "70000", "config_file": str(file)},
        {"FLEXLB_POLICY": "best", "FLEXLB_ELECTION": "perhaps"},
    )
    lines = sorted(message.splitlines())
    assert len(lines) == 5
    assert "--metrics-port: expected a whole number from 0 to 65535 (" in message
    assert "FLEXLB_POLICY: expected one of prefill_cost, least_outstanding_tokens, random, " in message
    assert "FLEXLB_ELECTION: expected true or false (" in message
    assert f"{file}: dispatcher.span_limit: expected a whole number of at least 100 (" in message
    assert f"{file}: dispatcher.unheard: " in message


def test_values_that_contradict_each_other_are_told() -> None:
    message = told({"lookahead_min_s": "3"}, {"FLEXLB_LOOKAHEAD_MAX_S": "2"})
    assert message == "lookahead_min_s: expected at most lookahead_max_s (2), seen 3"


def test_slip_in_a_variable_s_name_is_warned_of() -> None:
    environ = {"FLEXLB_REDISS": "redis://x/0", "FLEXLB_MAX_RUNNING": "1", "FLEXLB_POOL": "p"}
    warnings = read_effective(DispatcherSettings, {}, environ).warnings
    assert warnings == ("FLEXLB_REDISS: no dispatcher setting has this name; did you mean FLEXLB_REDIS?",)


def test_keys_above_the_tables_are_those_that_several_processes_have() -> None:
    counted = Counter(name for kind in KINDS for name in kind.model_fields)
    # What a frontend lists is not what an agent serves.
    assert {name for name, count in counted.items() if count > 1} - {"models"} == SHARED
    assert tuple(table_of(kind) for kind in KINDS) == TABLES


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_takes_another_s_variable_for_a_slip(kind: type[BaseSettings]) -> None:
    names = {name for one in KINDS for name, field in one.model_fields.items() if field.annotation is str}
    environ = {f"FLEXLB_{name.upper()}": "x" for name in names | ALIKE if name not in kind.model_fields}
    assert read_effective(kind, {}, environ).warnings == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described_and_every_number_bounded(kind: type[BaseSettings]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert " from " in expected_of(field) or " at least " in expected_of(field), name
        for ending, unit in (("_s", "seconds"), ("_bytes", "bytes"), ("_tokens", "tokens")):
            assert not name.endswith(ending) or unit in field.description, name


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("redis://user:secret@host:1/0", "redis://user:***@host:1/0"),
        ("rediss://:se@cret@host", "rediss://:***@host"),
        ("unix:///run/r.sock?db=0&password=secret&x=1", "unix:///run/r.sock?db=0&password=***&x=1"),
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis+sentinel://u:secret@a:1,b:2/name/0", "redis+sentinel://u:***@a:1,b:2/name/0"),
        ("a:9092,b:9092", "a:9092,b:9092"),
    ],
)
def test_passwords_are_masked(value: str, shown: str) -> None:
    assert masked(value) == shown


@pytest.mark.parametrize(
    ("fits", "right", "wrong"),
    [
        (
            is_redis_url,
            [
                "redis://h",
                "redis://:p@h:1/0",
                "rediss://u:p@[::1]:1/3",
                "unix:///r.sock?db=1",
                "redis://h/0?x=y",
                "redis+sentinel://h/name",
                "rediss+sentinel://u:p@a:1,b,[::1]:2/name/3",
            ],
            [
                "",
                "h:1",
                "http://h",
                "redis://h:x/0",
                "redis://h:99999",
                "redis://h:0",
                "redis://h/x",
                "unix://",
                "redis+sentinel://h",
                "redis+sentinel://h:1/name/x",
                "redis+sentinel://h:99999/name",
                "redis+sentinel://a,,b/name",
                "redis+sentinel://u:p@/name",
                "redis+sentinel://h/name?db=1",
            ],
        ),
        (
            is_kafka_servers,
            ["h", "h:1", "a:1,b:2", "a:1, b:2", "[::1]:9092", "127.0.0.1:65535"],
            ["", "h:", "h:x", "h:0", "h:65536", "a:1,", "http://h:1", "a b:1", ":9092"],
        ),
        (
            is_zeromq_endpoint,
            [
                "tcp://h:1",
                "tcp://*:5557",
                "tcp://127.0.0.1:5557",
                "tcp://[::1]:1",
                "ipc:///run/kv",
                "tcp://*:0",
            ],
            ["", "h:1", "tcp://h", "tcp://:1", "tcp://h:99999", "http://h:1", "ipc://"],
        ),
        (
            is_http_url,
            ["http://h", "https://h:1/x", "http://[::1]:1"],
            ["", "h:1", "ftp://h", "http://", "http://h:x"],
        ),
    ],
)
def test_addresses_are_checked_before_anybody_connects(
    fits: Callable[[str], bool], right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not fits(text)] == []
    assert [text for text in wrong if fits(text)] == []


def test_address_of_sentinels_is_read_whole() -> None:
    assert sentinel_address("rediss+sentinel://u%40x:p%2Fw@a:1,b,[::1]:2/my%20one/3") == SentinelAddress(
        sentinels=(("a", 1), ("b", 26379), ("::1", 2)),
        service="my one",
        database=3,
        user="u@x",
        password="p/w",
        has_tls=True,
    )
    assert sentinel_address("redis+sentinel://:p@a/m") == SentinelAddress(
        sentinels=(("a", 26379),), service="m", password="p"
    )
    assert sentinel_address("redis://a:1/0") is None


def test_clients_refuse_an_address_without_showing_its_password() -> None:
    with pytest.raises(SettingsError, match=r"seen 'redis://:\*\*\*@h:x'$"):
        connect_redis("redis://:hush@h:x")
    with pytest.raises(SettingsError, match=r"^kafka: expected host:port\[,host:port\], seen 'a:b'$"):
        connect_kafka("a:b")


@pytest.mark.parametrize("form", ["text", "verbose", "json"])
def test_printed_settings_hold_sources_and_no_secret(form: str) -> None:
    effective = read_effective(DispatcherSettings, {"pool": "p"}, {"FLEXLB_REDIS": "redis://:hush@h/0"})
    text = print_effective(effective, form)
    assert "hush" not in text
    assert "redis://:***@h/0" in text
    for word in ("FLEXLB_REDIS", "--pool", DEFAULT, "leader_ttl_s"):
        assert word in text


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (DispatcherSettings, {"pool": "p", "election": "false"}),
        (AgentSettings, {"role": "prefill", "models": "a,b"}),
        (FrontendSettings, {"port": "0", "api_keys_file": "/run/keys"}),
    ],
)
def test_printed_settings_are_a_file_of_their_own(
    file: Path, kind: type[BaseSettings], flags: dict[str, object]
) -> None:
    effective = read_effective(kind, flags, {})
    file.write_text(print_effective(effective, "verbose"))
    again = read_effective(kind, {"config_file": str(file)}, {})
    assert again.settings == effective.settings
    assert len(rows_of(again)) == len(kind.model_fields)
