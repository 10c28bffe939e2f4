"""Dashboards and alerts against the code: they ask for nothing that no process exposes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from dispatcher.frontend.metrics import FrontendMetrics
from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.profiles import PROFILES
from dispatcher.telemetry.metrics import DispatcherMetrics, ShadowMetrics
from workers_agent.metrics import AgentMetrics
from workers_agent.simulator.engine_metrics import EngineMetrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "dispatcher/telemetry/dashboards").glob("*.json"))
ALERTS = ROOT / "dispatcher/deploy/alerts.yaml"
OF_PROMETHEUS = {"up", "ALERTS"}
WORDS = {"and", "or", "unless", "by", "on", "without", "ignoring", "group_left", "group_right", "bool"}
VARIABLES = {"datasource", "pool", "node"}
WIDTH = 24

_LABELS = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)|\{[^}]*\}|\[[^]]*\]")
_NAME = re.compile(r"(?<![\w:.$])[a-zA-Z_][\w:]*(?!\w|\s*\()")
_COUNTED = re.compile(r"\b(?:rate|increase)\(([\w:]+)")
_STRING = re.compile(r'"[^"]*"')


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    return set(_NAME.findall(_LABELS.sub("", _STRING.sub("", expression)))) - WORDS


def exposed_names(metrics: Iterable[Metric]) -> dict[str, str]:
    """Names of time series as Prometheus stores them, with their types."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        metric.name + suffix: metric.type for metric in metrics for suffix in suffixes.get(metric.type, ("",))
    }


def all_exposed() -> dict[str, str]:
    """What the processes of FlexLB expose."""
    dispatcher, agent, frontend = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    DispatcherMetrics(dispatcher)
    ShadowMetrics(dispatcher)
    AgentMetrics(agent)
    FrontendMetrics(frontend)
    engine = EngineMetrics(EngineModel(PROFILES["test"]), "sim", 1.0).registry
    registries = (dispatcher, agent, frontend, engine)
    return exposed_names(itertools.chain.from_iterable(registry.collect() for registry in registries))


def panels_of(path: Path) -> list[dict[str, Any]]:
    """A dashboard's panels but for the headings of rows."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def alert_rules() -> list[dict[str, Any]]:
    """The rules of alerts.yaml."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def all_expressions() -> Iterator[tuple[str, str]]:
    """Every expression, with where it stands."""
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        for panel in panels_of(path):
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
        for annotation in board["annotations"]["list"]:
            yield f"{path.name}: annotation {annotation['name']}", annotation["expr"]
        for variable in board["templating"]["list"]:
            if found := re.fullmatch(r"label_values\((.+), \w+\)", variable.get("definition", "")):
                yield f"{path.name}: variable {variable['name']}", found[1]
    for rule in alert_rules():
        yield f"{ALERTS.name}: {rule['alert']}", rule["expr"]


def used_metrics() -> set[str]:
    """All metrics that dashboards and alerts read, but for Prometheus's own."""
    return set().union(*(names_in(expression) for _, expression in all_expressions())) - OF_PROMETHEUS


def test_reads_the_metrics_of_an_expression_and_nothing_else() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le, node) (rate(a_bucket{pool="x and y"}[5m]))) / vllm:b '
        "and on (instance) c == 1 unless d > 1e3 or absent(e)"
    )

    assert names_in(expression) == {"a_bucket", "vllm:b", "c", "d", "e"}


def test_every_metric_of_dashboards_and_alerts_is_exposed_by_some_process() -> None:
    exposed = all_exposed()

    missing = [
        f"{where}: {name}"
        for where, expression in all_expressions()
        for name in sorted(names_in(expression) - OF_PROMETHEUS - exposed.keys())
    ]

    assert not missing
    assert {"flexlb_leading", "flexlb_agent_engine_ok", "vllm:kv_cache_usage_perc"} <= used_metrics()


def test_rates_are_taken_of_what_only_grows() -> None:
    exposed = all_exposed()

    wrong = [
        f"{where}: {name}"
        for where, expression in all_expressions()
        for name in _COUNTED.findall(expression)
        if exposed[name] not in ("counter", "histogram")
    ]

    assert not wrong


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_in_which_unit_and_asks_the_chosen_source(path: Path) -> None:
    board = json.loads(path.read_text())
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = panels_of(path)

    assert board["uid"]
    assert board["title"]
    assert {variable["name"] for variable in board["templating"]["list"]} == VARIABLES
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == source, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == source, panel["title"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= VARIABLES | {"__rate_interval"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(path.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= WIDTH, panel["title"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_every_alert_waits_has_a_severity_and_says_what_to_do() -> None:
    rules = alert_rules()

    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert re.fullmatch(r"\d+[sm]", rule["for"]), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "runbook"}, rule["alert"]
        assert rule["annotations"]["runbook"].endswith("."), rule["alert"]
