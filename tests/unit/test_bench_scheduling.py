"""The comparison of routing policies: its ratios, its cases on a tiny workload, what it writes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from dispatcher.errors import SettingsError
from dispatcher.simulation.fleet import coarse
from dispatcher.simulation.fleet_report import Run
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.goodput import cold_prefill_s
from dispatcher.simulation.named_router import router_of
from dispatcher.simulation.policies import BY_NAME, TUNABLE
from dispatcher.simulation.profiles import PROFILES
from tests.bench import ablation, scheduling, tuning
from tests.bench.scheduling import DEGRADED, SHARES, SLOW
from tests.bench.scheduling_floor import floor_of
from tests.bench.scheduling_ratios import MEASURES, ratios
from tests.bench.tuning import Tunings, Workload, combinations, read_tuned
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


def turn(prompt_tokens: int, *blocks: int) -> Turn:
    return Turn(pause_s=0.0, prompt_tokens=prompt_tokens, output_tokens=1, blocks=blocks)


def test_the_floor_has_every_earlier_prefix_cached_and_every_engine_idle() -> None:
    profile = coarse(PROFILES["test"], 100)
    sessions = [[turn(250, 1, 2), turn(350, 1, 2, 3)], [turn(200, 1, 9)], [turn(200, 7, 8)]]
    floor = floor_of(FleetWorkload(sessions=sessions, block_tokens=100, per_s=1.0), profile)
    seconds = [
        cold_prefill_s(profile, 250),
        cold_prefill_s(profile, 200, 100),
        cold_prefill_s(profile, 200),
        cold_prefill_s(profile, 350, 200),
    ]
    assert floor.hit_ratio == 0.3
    assert floor.ttft_mean_ms == pytest.approx(1000 * sum(seconds) / 4, abs=0.001)
    assert floor.ttft_p99_ms == pytest.approx(1000 * max(seconds), abs=0.001)
    assert cold_prefill_s(profile, 200, 100) < cold_prefill_s(profile, 200)


def test_nobody_is_below_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "scheduling.json"
    assert scheduling.main([*TINY, "--baseline", "lmetric", "--json", str(path)]) == 0
    (comparison,) = json.loads(path.read_text())["comparisons"]
    floor = comparison["floor"]
    for case in comparison["cases"]:
        for one in case["runs"]:
            assert one["ttft_ms"]["mean"] >= floor["ttft_mean_ms"]
            assert one["hit_ratio"] <= floor["hit_ratio"]


def test_an_ablation_holds_each_variant_against_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ablation.json"
    assert ablation.main(["--requests", "60", "--nodes", "3", "--seeds", "2", "--json", str(path)]) == 0
    (told,) = json.loads(path.read_text())["ablations"]
    assert len(told["variants"]) == len(ablation.SHARES) * (1 + len(ablation.PARTS))
    printed = capsys.readouterr().out
    for one in told["variants"]:
        assert {run["seed"] for run in one["runs"]} == {1, 2}
        assert {run["policy"] for run in one["runs"]} == {one["policy"]}
        assert one["part"] in printed
        if one["policy"] == "flexlb":
            assert one["good_ratio"] == one["ttft_mean_ratio"] == one["tpot_mean_ratio"] == 1
    assert {one["policy"] for one in told["variants"]} == {"flexlb", *ablation.PARTS.values()}


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


SHORT = [
    "--requests",
    "60",
    "--nodes",
    "3",
    "--seed",
    "7",
    "--baseline",
    "rtp_llm_cost",
    "--baseline",
    "random",
]


def test_a_grid_has_every_combination_once_the_defaults_first() -> None:
    for baseline in BY_NAME:
        names = list(combinations(baseline))
        assert names[0] == baseline
        assert len(set(names)) == len(names) == prod(map(len, TUNABLE[baseline].values()))
        for name in names:
            router_of(name)


def test_constants_are_tuned_by_the_knee_and_found_again_by_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = tmp_path / "tuned.json", tmp_path / "scheduling.json"
    assert tuning.main([*SHORT, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    (found,) = read_tuned(path).workloads
    cost, plain = found.tuned
    assert (found.requests, found.nodes, found.seeds) == (60, 3, [7])
    assert len(cost.tried) == 16
    assert [one.slo_attainment for one in cost.tried] == sorted(
        (one.slo_attainment for one in cost.tried), reverse=True
    )
    knees = {one.policy: one.knee_per_s for one in cost.tried if one.knee_per_s is not None}
    assert knees.keys() >= {"rtp_llm_cost", *[one.policy for one in cost.tried[:2]]}
    assert cost.knee_per_s == knees[cost.policy] >= cost.default_knee_per_s
    best = max(knees.values())
    assert cost.knee_per_s == (best if best > 1.02 * cost.default_knee_per_s else cost.default_knee_per_s)
    assert (plain.policy, plain.knee_per_s) == ("random", plain.default_knee_per_s)
    assert f"{cost.knee_per_s:.2f}" in printed

    tiny = ["--requests", "60", "--nodes", "3", "--seeds", "2", "--quick", "--tuned", str(path)]
    policies = ["--baseline", "rtp_llm_cost", "--baseline", "round_robin", "--ours", "lmetric"]
    assert scheduling.main([*tiny, *policies, "--json", str(report)]) == 0
    (comparison,) = json.loads(report.read_text())["comparisons"]
    assert comparison["knee"].keys() == {"lmetric", cost.policy, "round_robin"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "4"], r"mooncake_conversation_2000.jsonl.gz on 4 x h100-llama-8b, seen .* on 3 x h100"),
        (["--nodes", "3", "--profile", "l4-llama-8b"], r"on 3 x l4-llama-8b, seen "),
        (["--prefill", "2", "--decode", "1"], r"on 2 prefill \+ 1 decode x "),
    ],
)
def test_constants_of_another_fleet_are_not_taken(tmp_path: Path, arguments: list[str], said: str) -> None:
    path = tmp_path / "tuned.json"
    found = Workload(
        trace="mooncake_conversation_2000.jsonl.gz",
        profile="h100-llama-8b",
        nodes=3,
        decode=0,
        requests=1,
        seeds=[1],
        tuned=[],
    )
    path.write_bytes(
        msgspec.json.encode(Tunings(bench="tuning", machine="", objectives="", workloads=[found]))
    )
    with pytest.raises(SettingsError, match=said):
        scheduling.main(["--quick", *arguments, "--tuned", str(path)])


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("{}", "expected what tuning --json wrote")]
)
def test_a_file_that_holds_no_tunings_is_told(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=said):
        scheduling.main(["--quick", "--tuned", str(path)])
