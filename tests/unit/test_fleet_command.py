"""`flexlb simulate`: its table, JSON, picture, knee and errors."""

from __future__ import annotations

import builtins
import json
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dispatcher.backends.legacy_environment import POLICIES as ORIGINAL
from dispatcher.cli import main
from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import FleetResult
from dispatcher.simulation.fleet_report import (
    Report,
    RoleLoad,
    Run,
    Times,
    estimate,
    knees,
    run_of,
    table,
    times_ms,
)
from dispatcher.simulation.goodput import Objectives
from dispatcher.simulation.named_router import oracle_of, router_of
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.profiles import PROFILES
from tests.support.told_run import told_run

SHORT = ["simulate", "--requests", "120", "--nodes", "4"]


def run(policy: str, rate: float, attainment: float, seed: int = 1) -> Run:
    return told_run(policy, rate=rate, seed=seed, good=attainment)


def test_a_simulated_request_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "why.json"
    assert main([*SHORT, "--explain", "120", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("policy ")
    assert "request   119, record i0_119, model sim" in out
    (told,) = json.loads(path.read_text())
    assert f">  {told['node']} " in out
    assert len(told["candidates"]) == 4
    assert min(told["candidates"], key=lambda one: one["cost_ms"])["is_tied"]


def test_both_stages_of_a_simulated_request_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--requests", "60", "--prefill", "2", "--decode", "2", "--explain"]
    stages = set()
    for number in range(1, 60, 12):
        assert main([*arguments, str(number)]) == 0
        stages |= {line.split(", ")[1] for line in capsys.readouterr().out.splitlines() if "decided" in line}
    assert {"prefill stage of attempt 1 of epoch 1", "decode stage of attempt 2 of epoch 1"} <= stages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--explain", "121"], "expected 1 to 120, the workload's requests, seen 121"),
        (["--explain", "1", "--policy", "random"], "expected flexlb or flexlb:... with --explain"),
        (["--explain", "1", "--rate", "1", "--rate", "2"], "expected one policy, rate and seed"),
        (["--explain", "1", "--policy", "flexlb", "--policy", "lpwl"], "expected one policy, rate and seed"),
        (["--explain", "1", "--sweep"], "no --sweep"),
    ],
)
def test_what_can_not_be_explained_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_run_prints_a_row_for_each_policy_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    arguments = ["--policy", "flexlb", "--policy", "flexlb:random", "--policy", "round_robin", "--rate", "2"]
    assert main([*SHORT, *arguments, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines[: lines.index("")]]
    assert named == ["policy", "flexlb", "flexlb:random", "round_robin"]
    report = json.loads(path.read_text())
    assert [one["policy"] for one in report["runs"]] == ["flexlb", "flexlb:random", "round_robin"]
    for one in report["runs"]:
        assert one["requests"] == 120
        assert one["completion"] == 1
        assert one["ttft_ms"]["p50"] <= one["ttft_ms"]["p90"] <= one["ttft_ms"]["p99"]
        assert 0 <= one["hit_ratio"] < 1 <= one["load_max_over_mean"]
        assert one["tpot_ms"]["mean"] > 0
    assert report["knee"] == {}


def test_the_same_seed_gives_the_same_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for name in ("a", "b"):
        main([*SHORT, "--policy", "flexlb", "--poisson", "--seed", "5", "--json", str(tmp_path / name)])
        report = json.loads((tmp_path / name).read_text())
        for one in report["runs"]:
            del one["wall_s"]
        reports.append(report)
    assert reports[0] == reports[1]
    capsys.readouterr()


def test_a_sweep_finds_each_policys_knee_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, path = tmp_path / "sweep.png", tmp_path / "sweep.json"
    arguments = ["--sweep", "--policy", "round_robin", "--policy", "random", "--ttft-slo-ms", "4000"]
    assert main([*SHORT, *arguments, "--plot", str(picture), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "TTFT within 4000 ms or 3 x the cold prefill, TPOT within 50 ms" in printed
    report = json.loads(path.read_text())
    assert f"{len(report['runs'])} runs" in printed
    assert report["knee"].keys() == {"round_robin", "random"}
    for policy, knee in report["knee"].items():
        seen = {one["rate"]: one["slo_attainment"] for one in report["runs"] if one["policy"] == policy}
        assert list(seen) == sorted(seen)
        good = max(rate for rate in seen if rate <= knee)
        bad = min(rate for rate in seen if rate > knee)
        assert seen[good] >= 0.9 > seen[bad]
        assert bad <= 1.0201 * good
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_the_same_on_two_cores_and_at_its_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(name: str, *arguments: str) -> Any:
        path = tmp_path / name
        policies = ["--policy", "flexlb", "--policy", "random", "--seed", "1", "--seed", "2"]
        assert main([*SHORT, *policies, *arguments, "--json", str(path)]) == 0
        found = json.loads(path.read_text())
        for one in found["runs"]:
            del one["wall_s"]
        return found

    alone = report("one", "--sweep")
    assert report("two", "--sweep", "--jobs", "2") == alone
    assert "by seed" in capsys.readouterr().out
    last = alone["runs"][-1]
    again = report("again", "--rate", str(last["rate"]))
    assert last in again["runs"]
    header, *rows = capsys.readouterr().out.splitlines()
    assert "TTFT mean" in header
    # A row holds both seeds, with the interval between them.
    assert [row.split()[0] for row in rows[:2]] == ["flexlb", "random"]
    assert " ±" in rows[0]


def test_what_is_amiss_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    amiss = ["--slow", "0.25:0.5", "--report-delay-s", "0.5", "--drop-kv-events", "0.1", "--perturb", "0.3"]
    assert (
        main([*SHORT, "--policy", "flexlb", "--policy", "smg_expected_wait", *amiss, "--json", str(path)])
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == (
        "amiss: 25% of the nodes at 0.5 of the speed, load reports 0.5 s late, 10% of block events lost, "
        "engines' coefficients up to 30% off the profile"
    )
    conditions = {
        "slow_share": 0.25,
        "slow_factor": 0.5,
        "report_delay_s": 0.5,
        "dropped_kv_events": 0.1,
        "perturbed": 0.3,
    }
    assert [one["conditions"] for one in json.loads(path.read_text())["runs"]] == [conditions] * 2


def test_prefill_and_decode_apart_are_told_each_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "sweep.png"
    arguments = ["simulate", "--requests", "120", "--prefill", "3", "--decode", "2", "--sweep"]
    policies = ["--policy", "lmetric", "--policy", "round_robin"]
    assert main([*arguments, *policies, "--json", str(path), "--plot", str(picture)]) == 0
    header, *_ = printed = capsys.readouterr().out.splitlines()
    assert "P max/mean" in header
    assert "D max/mean" in header
    assert "nodes: 3 prefill + 2 decode (P, D)" in printed
    report = json.loads(path.read_text())
    assert report["knee"]["lmetric"] > 0
    for one in report["runs"]:
        assert (one["nodes"], one["prefill"], one["decode"]) == (5, 3, 2)
        assert one["completion"] == 1
        loads = [one["by_role"][role]["load_max_over_mean"] for role in ("prefill", "decode")]
        assert min(loads) >= 1
        assert one["load_max_over_mean"] == max(loads)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_load_is_told_within_each_role() -> None:
    result = FleetResult(
        ttft_s=[0.5],
        tpot_s=[0.01],
        prompt_tokens=[100],
        cached_tokens=0,
        busy_s=[1.0, 3.0, 8.0, 8.0],
        preemptions=0,
        arrivals_s=2.0,
        span_s=10.0,
        wall_s=0.0,
    )
    told = run_of(
        result,
        policy="a",
        trace="t",
        profile=PROFILES["h100-llama-8b"],
        rate=1.0,
        per_s=2.0,
        nodes=4,
        decode=2,
        seed=1,
        objectives=Objectives(),
        conditions=Conditions(),
    )
    assert told.by_role == {
        "prefill": RoleLoad(load_max_over_mean=1.5, busy=0.2),
        "decode": RoleLoad(load_max_over_mean=1.0, busy=0.8),
    }
    assert (told.prefill, told.decode, told.load_max_over_mean, told.busy) == (2, 2, 1.5, 0.5)


def test_every_policy_is_simulated_apart_when_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--requests", "20", "--prefill", "2", "--decode", "1", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == ["flexlb", *BY_NAME]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prefill", "2"], "seen --nodes None --prefill 2 --decode None"),
        (["--nodes", "4", "--prefill", "2", "--decode", "2"], "leave out what does not belong"),
    ],
)
def test_nodes_are_of_one_kind_or_of_two(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--requests", "20", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("flexlb", "flexlb:knows_speeds"),
        ("flexlb:sampled=2", "flexlb:sampled=2,knows_speeds=True"),
        ("flexlb:shortest_ttft", None),
        ("lmetric", None),
    ],
)
def test_ours_can_be_told_the_speeds(name: str, oracle: str | None) -> None:
    assert oracle_of(name) == oracle
    if oracle is not None:
        assert router_of(oracle)().wants_blocks


@pytest.mark.parametrize(
    "name",
    [
        *ORIGINAL,
        "COST_BASED_PREFILL:tie_s=0.0,hotspot_multiplier=2.5,near_tie=0.1,batch_wait_s=0.1",
        "SHORTEST_TTFT:mode='fixed',size=3",
        "flexlb:COST_BASED_PREFILL",
        "flexlb:cost_based_prefill,queue_limit=8",
        "flexlb:batch_wait_s=0.1,batch_size=4",
        "rtp_llm_cost:queue_limit=8",
    ],
)
def test_the_original_s_names_and_constants_are_understood(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "--policy", name]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{name} ")


def test_the_original_s_name_is_the_live_policy(tmp_path: Path) -> None:
    figures = []
    for name in ("COST_BASED_PREFILL", "flexlb:cost_based_prefill"):
        path = tmp_path / "report.json"
        assert main([*SHORT, "--policy", name, "--json", str(path)]) == 0
        (run,) = msgspec.json.decode(path.read_bytes(), type=Report).runs
        figures.append((run.ttft_ms, run.tpot_ms, run.hit_ratio))
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WEIGHTED_CACHE", "expected one of flexlb, flexlb:prefill_cost, "),
        ("WEIGHTED_CACHE", ", COST_BASED_PREFILL, SHORTEST_TTFT, RANDOM, "),
        ("COST_BASED_PREFILL:size=3", "unexpected keyword argument 'size'"),
        ("rtp_llm_cost:size=3", "unexpected keyword argument 'size'"),
        ("flexlb:nonsense", "expected NAME or KEY=VALUE after the colon, seen 'nonsense'"),
    ],
)
def test_an_unknown_policy_or_constant_is_told_what_there_is(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "--policy", name]) == 2
    told = capsys.readouterr().err
    assert f"--policy {name}: " in told
    assert said in told


@pytest.mark.parametrize("value", ["1", "-0.1", "x"])
def test_a_perturbation_leaves_something_of_each_coefficient(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--perturb", value])
    assert "--perturb" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2:0.5", "0.3", "0.3:0", "x:y"])
def test_slow_nodes_are_a_share_and_a_factor(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, "--slow", value])
    assert "--slow" in capsys.readouterr().err


def test_every_policy_is_simulated_when_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--requests", "20", "--nodes", "2", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == ["flexlb", *BY_NAME]


def test_the_knee_is_where_the_mean_over_the_seeds_first_crosses() -> None:
    runs = [run("a", 1, 0.92), run("a", 2, 0.88), run("a", 3, 0.95), run("b", 1, 0.5), run("c", 4, 0.9)]
    assert knees(runs) == {"a": 1.5, "b": 0.0, "c": 4}
    seeds = [run("a", 1, 0.96), run("a", 1, 0.9, 2), run("a", 2, 0.9), run("a", 2, 0.84, 2)]
    assert knees(seeds) == {"a": 1.5}


def test_an_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.3 / 3**0.5)
    assert estimate([5.0]).half == 0
    assert estimate([5.0, inf]).mean == inf


def test_times_without_an_answer_are_infinite_and_null_in_json() -> None:
    times = times_ms([0.001, inf])
    assert (times.mean, times.p50, times.p99) == (inf, inf, inf)
    assert msgspec.json.decode(msgspec.json.encode(times))["p99"] is None
    result = FleetResult(
        ttft_s=[0.5, inf, 0.5, 2.0],
        tpot_s=[0.01, 0.0, 0.06, 0.01],
        prompt_tokens=[100, 100, 100, 100],
        cached_tokens=100,
        busy_s=[2.0, 1.0],
        preemptions=0,
        arrivals_s=2.0,
        span_s=50.0,
        wall_s=0.0,
    )
    told = run_of(
        result,
        policy="a",
        trace="t",
        profile=PROFILES["h100-llama-8b"],
        rate=1.0,
        per_s=2.0,
        nodes=2,
        seed=1,
        objectives=Objectives(),
        conditions=Conditions(),
    )
    assert (told.completion, told.slo_attainment, told.goodput_per_s) == (0.75, 0.25, 0.5)
    assert "inf" in table(Report(runs=[told], knee={}), Objectives())


def test_percentiles_are_nearest_ranks() -> None:
    times = times_ms([one / 1000 for one in range(1, 101)])
    assert (times.mean, times.p50, times.p90, times.p99) == (50.5, 51, 91, 100)
    assert times_ms([]) == Times(mean=0.0, p50=0.0, p90=0.0, p99=0.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "nobody"], "expected one of flexlb, flexlb:prefill_cost"),
        (["--policy", "flexlb:wrong=1"], "wrong"),
        (["--policy", "random:1"], "expected NAME or KEY=VALUE"),
        (["--json", "/nowhere/at/all"], "name a file that can be written"),
        (["/nowhere/at/all"], "No such file"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_our_constants_can_be_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    arguments = ["--policy", "flexlb", "--policy", "flexlb:stall_weight=0.0,sampled=2", "--rate", "4"]
    assert main([*SHORT, *arguments, "--json", str(path)]) == 0
    ours, other = json.loads(path.read_text())["runs"]
    assert ours["ttft_ms"] != other["ttft_ms"]
    capsys.readouterr()


def test_a_picture_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return known(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*SHORT, "--plot", str(tmp_path / "a.png")]) == 2
    assert "install flexlb[plot]" in capsys.readouterr().err


def test_the_report_is_named_as_documented() -> None:
    assert Report.__struct_fields__ == ("runs", "knee")
