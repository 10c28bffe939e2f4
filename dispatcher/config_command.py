"""`flexlb config`: the settings as they count, and where each comes from.

The agent's settings are the agent's own to read: its process prints them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from dispatcher.backends.effective_settings import print_effective
from dispatcher.backends.environment import add_file_flag, read_effective
from dispatcher.settings import DispatcherSettings

AGENT = "workers_agent"
WRONG = 2


def configure_config(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb config`."""
    parser.add_argument(
        "process",
        nargs="?",
        choices=("dispatcher", "agent", "all"),
        default="all",
        help="whose settings (default all)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also what each setting is and what it may be"
    )
    add_file_flag(parser)


async def run_config(options: argparse.Namespace) -> int:
    """Print the settings asked for; returns 0, or 2 when some are wrong."""
    form = "json" if options.json else "verbose" if options.verbose else "text"
    named = getattr(options, "config_file", None)
    texts, code = [], 0
    if options.process in {"dispatcher", "all"}:
        effective = read_effective(DispatcherSettings, {"config_file": named} if named else {})
        texts.append(print_effective(effective, form))
    if options.process in {"agent", "all"}:
        code, text = await _agent(form, named)
        if text:
            texts.append(text)
    if options.json:
        together = {table: found for text in texts for table, found in json.loads(text).items()}
        texts = [json.dumps(together, indent=2)]
    print("\n\n".join(texts))
    return code


async def _agent(form: str, named: str | None) -> tuple[int, str]:
    """What the agent's process prints of its settings; what is wrong with them goes to stderr."""
    words = [sys.executable, "-m", AGENT, "--print-config", form, *(["--config", named] if named else [])]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return (WRONG if process.returncode else 0), out.decode().strip()
