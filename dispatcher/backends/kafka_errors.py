"""What the Kafka client raises when the brokers gave no usable answer."""

from __future__ import annotations

from aiokafka.errors import KafkaError

NO_ANSWER = (KafkaError, OSError, TimeoutError, RuntimeError, AssertionError)
"""Beside its own errors the client asserts what a broker that just starts may not hold: that there are
brokers, that a coordinator is known, that a transaction it lost is still open."""
