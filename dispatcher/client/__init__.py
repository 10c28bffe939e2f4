"""The Python SDK: send requests, follow replies, receive outcomes. It needs Kafka and nothing else."""

from dispatcher.client.client import Client, ClientSettings, RequestTimes
from dispatcher.client.reader import Ended, ReplyEvent, ReplyReader, Restarted, TextAdded

__all__ = [
    "Client",
    "ClientSettings",
    "Ended",
    "ReplyEvent",
    "ReplyReader",
    "RequestTimes",
    "Restarted",
    "TextAdded",
]
