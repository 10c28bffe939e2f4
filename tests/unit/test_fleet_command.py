"""`flexlb simulate`: its table, JSON, picture, knee and errors."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from dispatcher.cli import main
from dispatcher.simulation.fleet_report import Report, Run, Times, knees, times_ms

SHORT = ["simulate", "--requests", "120", "--nodes", "4"]


def run(policy: str, rate: float, attainment: float) -> Run:
    times = Times(mean=1.0, p50=1.0, p90=1.0, p99=1.0)
    return Run(
        policy=policy,
        trace="t",
        profile="p",
        rate=rate,
        per_s=rate,
        nodes=1,
        seed=1,
        requests=1,
        ttft_ms=times,
        tpot_ms=times,
        slo_attainment=attainment,
        goodput_per_s=1.0,
        hit_ratio=0.0,
        load_max_over_mean=1.0,
        busy=0.5,
        preemptions=0,
        wall_s=0.0,
    )


def test_a_run_prints_a_row_for_each_policy_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    arguments = ["--policy", "flexlb", "--policy", "flexlb:random", "--policy", "round_robin", "--rate", "2"]
    assert main([*SHORT, *arguments, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["policy", "flexlb", "flexlb:random", "round_robin"]
    report = json.loads(path.read_text())
    assert [one["policy"] for one in report["runs"]] == ["flexlb", "flexlb:random", "round_robin"]
    for one in report["runs"]:
        assert one["requests"] == 120
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
    assert "within 4000 ms" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["knee"].keys() == {"round_robin", "random"}
    rates = [one["rate"] for one in report["runs"] if one["policy"] == "random"]
    assert len(rates) > 2
    assert rates == sorted(rates)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_knee_is_below_the_first_rate_that_was_missed() -> None:
    runs = [run("a", 1, 0.99), run("a", 2, 0.89), run("a", 3, 0.95), run("b", 1, 0.5)]
    assert knees(runs) == {"a": 1, "b": 0.0}


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
    arguments = ["--policy", "flexlb", "--policy", "flexlb:work_weight=0.0,sampled=2", "--rate", "4"]
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
