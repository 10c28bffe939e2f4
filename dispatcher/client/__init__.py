"""The Python SDK: send requests, follow replies, receive outcomes. It needs Kafka and nothing else."""

from dispatcher.client.client import Client, Progress
from dispatcher.client.reader import Ended, ReplyEvent, ReplyReader, Restarted, TextAdded

__all__ = [
    "Client",
    "Ended",
    "Progress",
    "ReplyEvent",
    "ReplyReader",
    "Restarted",
    "TextAdded",
]
