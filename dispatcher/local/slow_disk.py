"""A slow disk for one process: strace delays its writes to some files, and its syncs to any.

Called by `flexlb chaos`. Other calls of the process are stopped for microseconds each, its sockets' too. It
ends with the tracer, however that ends: the kernel lets a process go whose tracer is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from dispatcher.errors import ServerError
from dispatcher.local.processes import death_with_parent

ATTACH_TIMEOUT_S = 5.0
DETACH_TIMEOUT_S = 10.0
POLL_S = 0.01
WRITES = "write,writev,pwrite64,pwritev"
SYNCS = "fsync,fdatasync"


@contextlib.asynccontextmanager
async def slow_disk(pid: int, files: Iterable[Path], *, write_s: float, sync_s: float) -> AsyncIterator[None]:
    """Slow a process's disk down while the context is open; it is slow from the start.

    Args:
        files: what it writes to.
        write_s: what a write to one of them waits before it is done.
        sync_s: the same of a sync.
    Raises:
        ServerError: it can't be traced.
    """
    paths = [word for file in files for word in ("-P", str(file.resolve()))]
    tracer = await _attached(
        pid,
        [
            *paths,
            *("-e", f"inject={WRITES}:delay_enter={round(write_s * 1e6)}"),
            *("-e", f"inject={SYNCS}:delay_enter={round(sync_s * 1e6)}"),
        ],
    )
    try:
        yield
    finally:
        await _end(tracer)


async def why_no_slow_disk() -> str | None:
    """Why no process of this machine can have a slow disk, None when it can: tried on a child of ours."""
    argv = (sys.executable, "-c", "import time; time.sleep(60)")
    child = await asyncio.create_subprocess_exec(*argv, preexec_fn=death_with_parent())
    try:
        async with slow_disk(child.pid, [Path("/dev/null")], write_s=0.001, sync_s=0.001):
            return None
    except ServerError as error:
        return str(error)
    finally:
        child.kill()
        await child.wait()


async def _attached(pid: int, flags: Sequence[str]) -> Process:
    strace = shutil.which("strace")
    if strace is None:
        raise ServerError("there is no strace in PATH")
    common = ("-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={WRITES},{SYNCS}")
    tracer = await asyncio.create_subprocess_exec(
        strace, *common, *flags, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, preexec_fn=death_with_parent()
    )
    assert tracer.stderr is not None
    try:
        async with asyncio.timeout(ATTACH_TIMEOUT_S):
            while not _is_traced(pid, tracer.pid):
                if tracer.returncode is not None:
                    said = (await tracer.stderr.read()).decode(errors="replace").strip()
                    raise ServerError(f"strace can't attach: {said[-300:]}")
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        await _end(tracer)
        raise ServerError(f"strace did not attach within {ATTACH_TIMEOUT_S:g} s") from None
    except BaseException:
        await _end(tracer)
        raise
    return tracer


async def _end(tracer: Process) -> None:
    """Let go of what is traced; a tracer that does not is killed, which does it too."""
    with contextlib.suppress(ProcessLookupError):
        tracer.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(DETACH_TIMEOUT_S):
            await tracer.wait()
    except TimeoutError:
        tracer.kill()
        await tracer.wait()


def _is_traced(pid: int, tracer: int) -> bool:
    """Whether all threads of a process have that tracer."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return bool(tasks) and all(
            f"TracerPid:\t{tracer}\n" in (task / "status").read_text() for task in tasks
        )
    except OSError:
        return False
