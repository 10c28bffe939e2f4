"""Logins as settings: which go together, and that passwords are never shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.access import KafkaAccess
from dispatcher.backends.environment import add_flags, read_effective
from dispatcher.errors import SettingsError
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.settings import DispatcherSettings
from workers_agent.settings import AgentSettings

PASSWORD = "canary-of-a-password"


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_kafka_s_clients_are_given_the_login(mechanism: Any) -> None:
    access = KafkaAccess(protocol="SASL_PLAINTEXT", mechanism=mechanism, user="u", password=PASSWORD)
    assert access.options == {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": "u",
        "sasl_plain_password": PASSWORD,
    }
    assert PASSWORD not in repr(access)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kafka_protocol": "SASL_SSL"}, "kafka_user, kafka_password: expected both"),
        ({"kafka_user": "u", "kafka_password": PASSWORD}, "kafka_protocol: expected SASL_SSL"),
        ({"kafka_ca_file": "ca.pem"}, "kafka_protocol: expected SSL"),
        ({"kafka_password": PASSWORD, "kafka_password_file": "f"}, "expected one of them"),
        ({"kafka_password_file": "/nowhere/f"}, "kafka_password_file: expected a file"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as seen:
        assert DispatcherSettings.model_validate(fields).kafka_access
    assert PASSWORD not in str(seen.value)


@pytest.mark.parametrize("kind", [DispatcherSettings, AgentSettings, FrontendSettings])
def test_every_process_has_them_and_no_flag_shows_a_password(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "flexlb.toml"
    file.write_text(f'redis_password = "{PASSWORD}"\nkafka_protocol = "SSL"\nredis_user = "u"\n')
    settings = read_effective(kind, {"config_file": str(file)}, {}).settings
    assert settings.redis_access.password == PASSWORD
    assert settings.kafka_access.protocol == "SSL"
    assert PASSWORD not in repr(settings)
    parser = argparse.ArgumentParser()
    add_flags(parser, kind)
    assert "--redis-user" in parser.format_help()
    assert "--redis-password " not in parser.format_help()


def test_a_password_of_the_wrong_type_is_not_echoed(tmp_path: Path) -> None:
    file = tmp_path / "flexlb.toml"
    file.write_text("redis_password = 8675309\n")
    with pytest.raises(SettingsError, match="redis_password") as seen:
        read_effective(DispatcherSettings, {"config_file": str(file)}, {})
    assert "8675309" not in str(seen.value)
