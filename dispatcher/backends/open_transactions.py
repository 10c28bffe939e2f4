"""Whose transaction is open at a place of a topic: two requests of Kafka's that the client library lacks.

A partition's leader tells which producer, by its number, began a transaction there and at which offset; each
broker tells the transactional ids of the transactions that it coordinates, with those numbers. A transaction
that no coordinator knows is one that Kafka calls hanging: nothing but an operator ends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

TEXT = CompactString("utf-8")
TAGS = ("tags", TaggedFields)


class _DescribeProducersResponse(Response):  # type: ignore[misc]
    API_KEY = 61
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", TEXT),
                (
                    "partitions",
                    CompactArray(
                        ("partition_index", Int32),
                        ("error_code", Int16),
                        ("error_message", TEXT),
                        (
                            "active_producers",
                            CompactArray(
                                ("producer_id", Int64),
                                ("producer_epoch", Int32),
                                ("last_sequence", Int32),
                                ("last_timestamp", Int64),
                                ("coordinator_epoch", Int32),
                                ("current_txn_start_offset", Int64),
                                TAGS,
                            ),
                        ),
                        TAGS,
                    ),
                ),
                TAGS,
            ),
        ),
        TAGS,
    )


class _DescribeProducersStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 61
    API_VERSION = 0
    RESPONSE_TYPE = _DescribeProducersResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("name", TEXT), ("partition_indexes", CompactArray(Int32)), TAGS)), TAGS
    )


class _DescribeProducers(Request[_DescribeProducersStruct]):  # type: ignore[misc]
    API_KEY = 61

    def __init__(self, topic: str, partition: int) -> None:
        self._topics: list[tuple[str, list[int], dict[int, bytes]]] = [(topic, [partition], {})]

    def build(self, request_struct_class: type[_DescribeProducersStruct]) -> _DescribeProducersStruct:
        return request_struct_class(self._topics, {})


class _ListTransactionsResponse(Response):  # type: ignore[misc]
    API_KEY = 66
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("unknown_state_filters", CompactArray(TEXT)),
        (
            "transaction_states",
            CompactArray(
                ("transactional_id", TEXT), ("producer_id", Int64), ("transaction_state", TEXT), TAGS
            ),
        ),
        TAGS,
    )


class _ListTransactionsStruct(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 66
    API_VERSION = 0
    RESPONSE_TYPE = _ListTransactionsResponse
    SCHEMA = Schema(("state_filters", CompactArray(TEXT)), ("producer_id_filters", CompactArray(Int64)), TAGS)


class _ListTransactions(Request[_ListTransactionsStruct]):  # type: ignore[misc]
    API_KEY = 66

    def __init__(self, producers: Iterable[int]) -> None:
        self._producers = list(producers)

    def build(self, request_struct_class: type[_ListTransactionsStruct]) -> _ListTransactionsStruct:
        return request_struct_class([], self._producers, {})


async def transactional_id_at(admin: Any, topic: str, partition: int, offset: int) -> str | None:
    """Who began the transaction that is open since an offset of a partition.

    Args:
        admin: aiokafka's admin client, started.
    Returns:
        Its transactional id; "" when no coordinator knows the transaction; None when that is not told, as by
        brokers before 3.0 or to a user without the right.
    """
    try:
        (described,) = await admin.describe_topics([topic])
        leader = {one["partition"]: one["leader"] for one in described["partitions"]}[partition]
        # The admin client has no public way to send requests of our own.
        told = await admin._send_request_to_node(leader, _DescribeProducers(topic, partition))
        ((_, ((_, error, _, producers, _),), _),) = told.topics
        if error:
            return None
        began = [producer[0] for producer in producers if producer[-2] == offset]
        if not began:
            return None
        for broker in (await admin.describe_cluster())["brokers"]:
            listed = await admin._send_request_to_node(broker["node_id"], _ListTransactions(began))
            if listed.error_code:
                return None
            for transactional_id, *_ in listed.transaction_states:
                return str(transactional_id)
    except (KafkaError, KeyError):
        return None
    return ""
