"""Servers on this machine, for tests and one-machine use: Valkey and a Kafka-protocol broker."""
