"""`flexlb config`: the settings as they count, and where each comes from.

The agent's settings are the agent's own to read: its process prints them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from pydantic_settings import BaseSettings

from dispatcher.backends.effective_settings import print_effective
from dispatcher.backends.environment import add_file_flag, read_effective
from dispatcher.errors import SettingsError
from dispatcher.frontend.settings import FrontendSettings
from dispatcher.settings import DispatcherSettings

OWN: dict[str, type[BaseSettings]] = {"dispatcher": DispatcherSettings, "frontend": FrontendSettings}
AGENT = "agent"
AGENT_MODULE = "workers_agent"
ALL = "all"
WRONG = 2


def configure_config(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb config`."""
    parser.add_argument(
        "process", nargs="?", choices=(*OWN, AGENT, ALL), default=ALL, help=f"whose settings (default {ALL})"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also what each setting is and what it may be"
    )
    add_file_flag(parser)


async def run_config(options: argparse.Namespace) -> int:
    """Print the settings asked for; returns 0, or 2 when some are wrong: those of the others are printed."""
    form = "json" if options.json else "verbose" if options.verbose else "text"
    named = getattr(options, "config_file", None)
    texts, code = [], 0
    for process, kind in OWN.items():
        if options.process in {process, ALL}:
            try:
                effective = read_effective(kind, {"config_file": named} if named else {})
                texts.append(print_effective(effective, form))
            except SettingsError as error:
                print(f"flexlb {process}: {error}", file=sys.stderr)
                code = WRONG
    if options.process in {AGENT, ALL}:
        is_right, text = await _agent(form, named)
        if is_right:
            texts.append(text)
        else:
            code = WRONG
    if options.json:
        together = {table: found for text in texts for table, found in json.loads(text).items()}
        texts = [json.dumps(together, indent=2)]
    if texts:
        print("\n\n".join(texts))
    return code


async def _agent(form: str, named: str | None) -> tuple[bool, str]:
    """What the agent's process prints of its settings; what is wrong with them goes to stderr."""
    words = [sys.executable, "-m", AGENT_MODULE, "--print-config", form]
    process = await asyncio.create_subprocess_exec(
        *words, *(["--config", named] if named else []), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return process.returncode == 0, out.decode().strip()
