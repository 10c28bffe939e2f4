"""A data folder of Apache Kafka that knows users by SCRAM from its first start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dispatcher.local import apache_kafka


def format_with_scram(folder: Path, users: Mapping[str, tuple[str, str]]) -> None:
    """Format `folder` for a broker; (user, password) by mechanism. Blocks for the run of a JVM.

    Raises:
        ServerError: Java failed; carries what it printed.
    """
    home = apache_kafka.provision()
    folder.mkdir(parents=True)
    settings = folder / "format.properties"
    settings.write_text(apache_kafka._settings(folder / "data", broker_port=9092, controller_port=9093))
    tool = ["kafka.tools.StorageTool", "format", "-t", apache_kafka.CLUSTER_ID, "-c", str(settings)]
    for mechanism, (user, password) in users.items():
        tool += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
    apache_kafka._run("kafka.tools.StorageTool", apache_kafka._java_command(home, main=tool))
