"""A picture of runs: times to the first token, good requests, time per token, against the rate by policy."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from dispatcher.errors import SettingsError
from dispatcher.simulation.fleet_report import Report, Run, by_rate, estimate
from dispatcher.simulation.knee import ATTAINED


class Panel(NamedTuple):
    """What is shown, and whether on a logarithmic axis."""

    title: str
    is_logarithmic: bool
    value: Callable[[Run], float]


PANELS = (
    Panel("TTFT p50, ms", True, lambda run: run.ttft_ms.p50),
    Panel("TTFT p90, ms", True, lambda run: run.ttft_ms.p90),
    Panel("TTFT p99, ms", True, lambda run: run.ttft_ms.p99),
    Panel("good requests, %", False, lambda run: 100 * run.slo_attainment),
    Panel("goodput, good requests/s", False, lambda run: run.goodput_per_s),
    Panel("TPOT p90, ms", True, lambda run: run.tpot_ms.p90),
)
ATTAINMENT = 3
"""The panel that shows where the knee is."""
MARKS = "os^vD<>phX*Pd"


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
    """Draw the report into a PNG; bands are 95 % intervals over the seeds. Raises as `plotting`."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(2, 3, figsize=(18, 10))
    curves: dict[str, list[list[Run]]] = {}
    for (policy, _), same in sorted(by_rate(report.runs).items(), key=lambda one: one[0][1]):
        curves.setdefault(policy, []).append(same)
    policies = list(dict.fromkeys(run.policy for run in report.runs))
    pairs = pyplot.get_cmap("tab20").colors
    colours = (*pairs[::2], *pairs[1::2])
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        for place, policy in enumerate(policies):
            found = [estimate([panel.value(run) for run in same]) for same in curves[policy]]
            rates = [same[0].per_s for same in curves[policy]]
            style = {
                "color": "black" if not place else colours[(place - 1) % len(colours)],
                "linewidth": 2.5 if not place else 1.2,
                "zorder": 3 if not place else 2,
            }
            # An infinite time has no place on the axis: the line breaks off.
            means = [one.mean if one.mean < 1e9 else nan for one in found]
            axis.plot(rates, means, marker=MARKS[place % len(MARKS)], ms=5, label=policy, **style)
            low, high = ([one.mean + sign * one.half for one in found] for sign in (-1, 1))
            axis.fill_between(rates, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.set_title(panel.title)
        axis.set_xlabel("requests/s offered")
        axis.grid(alpha=0.3, which="both" if panel.is_logarithmic else "major")
        if panel.is_logarithmic:
            axis.set_yscale("log")
        else:
            # Bands of a few seeds reach where no share can be.
            top = max(panel.value(run) for run in report.runs)
            axis.set_ylim(0, 1.08 * top or 1)
    axes.flat[ATTAINMENT].axhline(100 * ATTAINED, color="black", linestyle=":")
    axes.flat[ATTAINMENT].legend(fontsize="small", loc="lower left")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
