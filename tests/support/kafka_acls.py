"""The table of Kafka's ACLs in `docs/security.md`, read as it stands, and entered into a real broker."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aiokafka.protocol.admin import CreateAclsRequest

from dispatcher.backends.connect import KafkaClients
from dispatcher.protocol.names import Names

SECURITY = Path(__file__).parents[2] / "dispatcher/docs/security.md"
TOPIC, GROUP, CLUSTER, TRANSACTIONAL_ID = 2, 3, 4, 5
OPERATIONS = {
    "Read": 3,
    "Write": 4,
    "Create": 5,
    "Delete": 6,
    "Alter": 7,
    "Describe": 8,
    "DescribeConfigs": 10,
}
LITERAL, ALLOW = 3, 3
_ROW = re.compile(r"^\| (?P<who>[^|]+) \|(?P<topics>[^|]*)\|(?P<other>[^|]*)\|$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Acl:
    """One allowed operation on one resource."""

    kind: int
    name: str
    operation: int


def documented(principal: str, names: Names) -> list[Acl]:
    """What the documentation gives a principal, named as in the first words of its row."""
    text = SECURITY.read_text()
    table = text[text.index("## Kafka's ACLs") :]
    (row,) = [found for found in _ROW.finditer(table) if found["who"].split(",")[0] == principal]
    acls = [acl for part in row["topics"].split(";") for acl in _on_topics(part.strip(), names)]
    for part in filter(None, (part.strip() for part in row["other"].split(";"))):
        operation, _, rest = part.partition(" ")
        kind = GROUP if rest.startswith("group ") else TRANSACTIONAL_ID
        (name,) = _names(rest, names)
        acls.append(Acl(kind=kind, name=name, operation=OPERATIONS[operation]))
    return acls


def _on_topics(part: str, names: Names) -> Iterable[Acl]:
    operation, _, rest = part.partition(" ")
    topics = names.topics if rest == "of all" else _names(rest, names)
    assert set(topics) <= set(names.topics), f"{part}: expected topics of a pool, seen {topics}"
    return [Acl(kind=TOPIC, name=topic, operation=OPERATIONS[operation]) for topic in topics]


def _names(text: str, names: Names) -> list[str]:
    """`P.requests`, `.requests.batch`: each after `P`, written or not."""
    return [
        f"flexlb.{names.pool}.{name.removeprefix('P').lstrip('.')}" for name in re.findall(r"`([^`]+)`", text)
    ]


async def allow(kafka: KafkaClients, principal: str, acls: Iterable[Acl]) -> None:
    """Enter ACLs of a user, as its administrator."""
    admin = kafka.admin()
    await admin.start()
    try:
        for acl in acls:
            request = CreateAclsRequest(
                acl.kind, acl.name, LITERAL, f"User:{principal}", "*", acl.operation, ALLOW
            )
            answer = await admin._send_request(request)
            ((code, message),) = answer.creation_responses
            assert code == 0, f"{principal} {acl}: {message}"
    finally:
        await admin.close()
