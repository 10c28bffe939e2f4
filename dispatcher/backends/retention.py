"""How long Kafka keeps a pool's records, as its brokers are configured."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.kafka_errors import NO_ANSWER
from dispatcher.errors import LogUnavailable


async def retention_ms(kafka: KafkaClients, topics: Sequence[str]) -> dict[str, int]:
    """How long each topic keeps a record; those that keep it for ever, or of which nobody tells, are absent.

    Raises:
        LogUnavailable: the broker did not answer.
    """
    admin = kafka.admin()
    try:
        await admin.start()
        answers = await admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": None}) for topic in topics]
        )
    except NO_ANSWER as error:
        raise LogUnavailable(f"retention: {error!r}") from error
    finally:
        await admin.close()
    kept = {}
    for answer in answers:
        for resource in answer.to_object()["resources"]:
            for entry in resource["config_entries"]:
                if entry["config_names"] == "retention.ms" and int(entry["config_value"] or -1) >= 0:
                    kept[resource["resource_name"]] = int(entry["config_value"])
    return kept
