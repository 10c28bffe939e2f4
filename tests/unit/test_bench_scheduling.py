"""The comparison of routing policies: its ratios, its cases on a tiny workload, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from dispatcher.simulation.fleet_report import Run
from tests.bench import scheduling
from tests.bench.scheduling import DEGRADED, SHARES, SLOW
from tests.bench.scheduling_ratios import MEASURES, ratios
from tests.support.told_run import told_run

TINY = ["--requests", "80", "--nodes", "4", "--seeds", "2", "--quick"]
BASELINES = ["random", "round_robin", "lmetric"]


def run(policy: str, seed: int, *, good: float = 1.0, mean: float = 1.0, hits: float = 0.1) -> Run:
    return told_run(policy, seed=seed, good=good, mean=mean, hits=hits)


def test_each_measure_is_compared_with_its_own_best_seed_by_seed() -> None:
    runs = [
        run("ours", 1, good=0.75, mean=30),
        run("ours", 2, good=0.5, mean=20),
        run("busy", 1, good=1.0, mean=90),
        run("busy", 2, good=0.5, mean=90),
        run("quick", 1, good=0.25, mean=10),
        run("quick", 2, good=0.25, mean=20),
    ]
    found = ratios(runs, "ours", ["busy", "quick"])
    assert found.keys() == MEASURES.keys()
    goodput, mean = found["goodput"], found["TTFT mean"]
    assert (goodput.policy, goodput.ours, goodput.other) == ("busy", 0.625, 0.75)
    assert goodput.ratio == pytest.approx((0.75 / 1 + 0.5 / 0.5) / 2)
    assert goodput.half > 0
    assert (mean.policy, mean.ratio) == ("quick", 2)


def test_what_the_best_has_none_of_is_left_out() -> None:
    runs = [replace(run(policy, 1), hit_ratio=0.0) for policy in ("ours", "other")]
    assert "hits" not in ratios(runs, "ours", ["other"])


def test_a_tiny_comparison_has_all_its_cases_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plots = tmp_path / "scheduling.json", tmp_path / "plots"
    baselines = [part for name in BASELINES for part in ("--baseline", name)]
    arguments = [*TINY, *baselines, "--json", str(path), "--plots", str(plots)]
    assert scheduling.main(arguments) == 0
    printed = capsys.readouterr().out
    (comparison,) = json.loads(path.read_text())["comparisons"]
    policies = {"flexlb", *BASELINES}
    assert comparison["knee"].keys() == policies
    assert comparison["first"] in BASELINES
    best = comparison["knee"][comparison["first"]]
    assert best == max(comparison["knee"][policy] for policy in BASELINES)
    nominal, close, at_random, slow, *degraded = comparison["cases"]
    assert nominal["rate"] == pytest.approx(SHARES[0] * best, rel=1e-4)
    assert close["rate"] == pytest.approx(SHARES[1] * best, rel=1e-4)
    assert at_random["rate"] == pytest.approx(comparison["knee"]["random"], rel=1e-4)
    assert {run["policy"] for run in at_random["runs"]} == {"flexlb", "random"}
    # One of four nodes at half speed.
    assert slow["rate"] == pytest.approx(0.875 * nominal["rate"], rel=1e-4)
    assert slow["runs"][0]["conditions"]["slow_share"] == SLOW.slow_share
    assert len(degraded) == len(DEGRADED)
    knowledge = comparison["knowledge"]
    assert knowledge["oracle"] == "flexlb:knows_speeds"
    assert {run["policy"] for run in knowledge["sweep"]} == {"flexlb", knowledge["oracle"]}
    assert {run["conditions"]["slow_share"] for run in knowledge["sweep"]} == {0.3}
    ratio = knowledge["knee"] / knowledge["oracle_knee"]
    assert f"flexlb to flexlb:knows_speeds, by knee: {ratio:.2f}" in printed
    for case in comparison["cases"]:
        assert case["to_best"]["goodput"]["ratio"] > 0
        assert {run["seed"] for run in case["runs"]} == {1, 2}
        if case is not at_random:
            assert {run["policy"] for run in case["runs"]} == policies
        assert case["name"] in printed
    assert {one.name for one in plots.iterdir()} == {
        "mooncake_conversation_2000-4-sweep.png",
        "mooncake_conversation_2000-4-ratios.png",
    }


def test_a_comparison_where_prefill_and_decode_are_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plots = tmp_path / "scheduling.json", tmp_path / "plots"
    nodes = ["--requests", "80", "--seeds", "2", "--quick", "--prefill", "2", "--decode", "1"]
    policies = ["--ours", "lmetric", "--baseline", "random", "--baseline", "dynamo_kv"]
    assert scheduling.main([*nodes, *policies, "--json", str(path), "--plots", str(plots)]) == 0
    assert "2 prefill + 1 decode x h100-llama-8b" in capsys.readouterr().out
    (comparison,) = json.loads(path.read_text())["comparisons"]
    assert (comparison["nodes"], comparison["prefill"], comparison["decode"]) == (3, 2, 1)
    assert comparison["knowledge"] is None
    assert all(run["decode"] == 1 for case in comparison["cases"] for run in case["runs"])
    assert {one.name for one in plots.iterdir()} == {
        "mooncake_conversation_2000-2p1d-sweep.png",
        "mooncake_conversation_2000-2p1d-ratios.png",
    }
