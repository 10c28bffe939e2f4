"""Logins and TLS of Redis and Kafka, as settings of every process and as what `connect` needs of them.

A password never appears in a repr, an error or a flag: it comes from the environment, the settings file or a
file of its own, which is read anew for each client.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from dispatcher.errors import SettingsError

Protocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files of a TLS client, PEM; no CA file for the system's authorities. `of` is redis or kafka."""

    of: str
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def is_set(self) -> bool:
        """Whether any file is named."""
        return bool(self.ca_file or self.cert_file or self.key_file)

    def context(self) -> ssl.SSLContext:
        """What checks the server, and its host name, and shows our certificate.

        Raises:
            SettingsError: a file is missing, can't be read, or holds something else.
        """
        if self.key_file and not self.cert_file:
            raise SettingsError(f"{self.of}_key_file: expected {self.of}_cert_file beside it, seen none")
        name, file = f"{self.of}_ca_file", self.ca_file
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.cert_file:
                name, file = f"{self.of}_cert_file", self.cert_file
                context.load_cert_chain(self.cert_file, self.key_file or None)
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(
                f"{name}: expected a PEM file that can be read (and the key of a certificate), "
                f"seen {file!r}: {why}"
            ) from None
        return context


@dataclass(frozen=True, kw_only=True)
class RedisAccess:
    """How to log in to Redis, a user and password in the address win, and to its Sentinels."""

    user: str = ""
    password: str = field(default="", repr=False)
    sentinel_user: str = ""
    sentinel_password: str = field(default="", repr=False)
    tls: Tls = Tls(of="redis")


@dataclass(frozen=True, kw_only=True)
class KafkaAccess:
    """How to log in to Kafka, and over which protocol.

    Raises:
        SettingsError: a protocol without the settings that it needs, or settings without the protocol.
    """

    protocol: Protocol = "PLAINTEXT"
    mechanism: Mechanism = "PLAIN"
    user: str = ""
    password: str = field(default="", repr=False)
    tls: Tls = Tls(of="kafka")

    def __post_init__(self) -> None:
        logs_in, is_encrypted = self.protocol.startswith("SASL_"), self.protocol.endswith("SSL")
        if logs_in and not (self.user and self.password):
            raise SettingsError(
                f"kafka_user, kafka_password: expected both with kafka_protocol {self.protocol}; set them"
            )
        if (self.user or self.password) and not logs_in:
            raise SettingsError(
                "kafka_protocol: expected SASL_SSL or SASL_PLAINTEXT with kafka_user or kafka_password, seen "
                f"{self.protocol}"
            )
        if self.tls.is_set and not is_encrypted:
            raise SettingsError(
                "kafka_protocol: expected SSL or SASL_SSL with a CA or certificate file, seen "
                f"{self.protocol}"
            )

    @property
    def options(self) -> dict[str, object]:
        """Arguments of aiokafka's clients."""
        options: dict[str, object] = {"security_protocol": self.protocol}
        if self.protocol.endswith("SSL"):
            options["ssl_context"] = self.tls.context()
        if self.protocol.startswith("SASL_"):
            options["sasl_mechanism"] = self.mechanism
            options["sasl_plain_username"] = self.user
            options["sasl_plain_password"] = self.password
        return options


class AccessSettings(BaseSettings):
    """Settings that every process has. A base class, so that sixteen fields are not written three times."""

    redis_user: str = Field(default="", description="Redis user, when the address names none")
    redis_password: str = Field(
        default="", repr=False, description="Redis password, when the address has none; not a flag"
    )
    redis_password_file: str = Field(default="", description="file that holds the Redis password")
    redis_sentinel_user: str = Field(default="", description="user at Sentinels that want a login")
    redis_sentinel_password: str = Field(
        default="", repr=False, description="password at Sentinels that want a login; not a flag"
    )
    redis_sentinel_password_file: str = Field(default="", description="file that holds that password")
    redis_ca_file: str = Field(
        default="", description="PEM authorities of a rediss:// server; else the system's"
    )
    redis_cert_file: str = Field(default="", description="PEM certificate shown to a rediss:// server")
    redis_key_file: str = Field(default="", description="PEM key, when in a file of its own")
    kafka_protocol: Protocol = Field(default="PLAINTEXT", description="protocol of Kafka's listener")
    kafka_mechanism: Mechanism = Field(default="PLAIN", description="how to log in to a SASL listener")
    kafka_user: str = Field(default="", description="user of a SASL listener")
    kafka_password: str = Field(default="", repr=False, description="password of a SASL listener; not a flag")
    kafka_password_file: str = Field(default="", description="file that holds Kafka's password")
    kafka_ca_file: str = Field(
        default="", description="PEM authorities of an SSL listener; the system's when absent"
    )
    kafka_cert_file: str = Field(default="", description="PEM certificate shown to an SSL listener")
    kafka_key_file: str = Field(default="", description="PEM key, when in a file of its own")

    @property
    def redis_access(self) -> RedisAccess:
        """How to log in to Redis; raises SettingsError."""
        tls = Tls(
            of="redis",
            ca_file=self.redis_ca_file,
            cert_file=self.redis_cert_file,
            key_file=self.redis_key_file,
        )
        return RedisAccess(
            user=self.redis_user,
            password=_password("redis", self.redis_password, self.redis_password_file),
            sentinel_user=self.redis_sentinel_user,
            sentinel_password=_password(
                "redis_sentinel", self.redis_sentinel_password, self.redis_sentinel_password_file
            ),
            tls=tls,
        )

    @property
    def kafka_access(self) -> KafkaAccess:
        """How to log in to Kafka; raises SettingsError."""
        tls = Tls(
            of="kafka",
            ca_file=self.kafka_ca_file,
            cert_file=self.kafka_cert_file,
            key_file=self.kafka_key_file,
        )
        return KafkaAccess(
            protocol=self.kafka_protocol,
            mechanism=self.kafka_mechanism,
            user=self.kafka_user,
            password=_password("kafka", self.kafka_password, self.kafka_password_file),
            tls=tls,
        )


REDIS_ACCESS = frozenset(name for name in AccessSettings.model_fields if name.startswith("redis_"))
KAFKA_ACCESS = frozenset(name for name in AccessSettings.model_fields if name.startswith("kafka_"))


def _password(of: str, given: str, file: str) -> str:
    if given and file:
        raise SettingsError(f"{of}_password, {of}_password_file: expected one of them, seen both")
    if not file:
        return given
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SettingsError(
            f"{of}_password_file: expected a file that can be read, seen {file!r}: {why}"
        ) from None
