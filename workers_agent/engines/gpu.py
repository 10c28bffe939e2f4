"""Utilisation and memory of the GPUs beside us, by NVIDIA's management library, where there are any."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True, kw_only=True)
class GpuLoad:
    """Shares from 0 to 1; 0 when unknown."""

    utilisation: float = 0.0
    memory_used: float = 0.0


def chosen_gpus(setting: str, visible: str | None) -> tuple[int, ...]:
    """GPU numbers: of the setting, else of `CUDA_VISIBLE_DEVICES`, else the first.

    Names other than numbers (`GPU-<uuid>`, MIG slices) can't be told here and are left out.
    """
    text = setting or (visible if visible is not None else "0")
    return tuple(int(part) for part in text.split(",") if part.strip().isdigit())


@functools.cache
def _has_library() -> bool:
    """Whether the library is here and works; loading it is asked for once."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


class GpuWatch:
    """Reads the GPUs of one engine; their mean."""

    def __init__(self, setting: str = "") -> None:
        self._handles: list[object] = []
        if not _has_library():
            return
        try:
            for number in chosen_gpus(setting, os.environ.get("CUDA_VISIBLE_DEVICES")):
                self._handles.append(pynvml.nvmlDeviceGetHandleByIndex(number))
        except pynvml.NVMLError:
            self._handles = []

    @property
    def is_there(self) -> bool:
        """Whether there is a GPU to read."""
        return bool(self._handles)

    def read(self) -> GpuLoad:
        """The load now."""
        if not self._handles:
            return GpuLoad()
        try:
            rates = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in self._handles]
            memories = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in self._handles]
        except pynvml.NVMLError:
            return GpuLoad()
        used = [memory.used / memory.total for memory in memories if memory.total]
        return GpuLoad(
            utilisation=sum(rates) / len(rates), memory_used=sum(used) / len(used) if used else 0.0
        )
