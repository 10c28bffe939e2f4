"""A picture of a sweep: times to the first token and goodput against the rate, a line for each policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dispatcher.errors import SettingsError
from dispatcher.simulation.fleet_report import Report, Run

PANELS: tuple[tuple[str, bool, Callable[[Run], float]], ...] = (
    ("TTFT p50, ms", True, lambda run: run.ttft_ms.p50),
    ("TTFT p90, ms", True, lambda run: run.ttft_ms.p90),
    ("TTFT p99, ms", True, lambda run: run.ttft_ms.p99),
    ("goodput, requests/s within the SLO", False, lambda run: run.goodput_per_s),
)
"""Title, whether the axis is logarithmic, what is shown."""


def plotting() -> Any:
    """The plotting library, drawing to files only.

    Raises:
        SettingsError: it isn't installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SettingsError(
            "--plot: expected matplotlib, seen none; install flexlb[plot], or leave --plot out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(report: Report, path: Path, title: str) -> None:
    """Draw the report into a PNG. Raises as `plotting`."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    for axis, (name, is_logarithmic, value) in zip(axes.flat, PANELS, strict=True):
        for policy in dict.fromkeys(run.policy for run in report.runs):
            runs = sorted((run for run in report.runs if run.policy == policy), key=lambda run: run.per_s)
            axis.plot(
                [run.per_s for run in runs], [value(run) for run in runs], marker="o", ms=4, label=policy
            )
        axis.set_title(name)
        axis.set_xlabel("requests/s offered")
        axis.grid(alpha=0.3)
        if is_logarithmic:
            axis.set_yscale("log")
    axes.flat[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
