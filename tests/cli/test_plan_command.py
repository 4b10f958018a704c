"""`preble plan`, and the arguments that it shares with other commands about fleets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from preble.cli import main
from preble.cli.fleet_options import (
    add_fleet_arguments,
    add_request_arguments,
    add_slo_argument,
    fleet_settings,
    read_requests,
)
from preble.sched import PRESETS, FittedCost, StepTimed
from preble.sim.planner import plan
from preble.sim.settings import Failure, Settings
from preble.sim.slo import SLO
from preble.sim.traces import write_trace
from preble.sim.workloads import WORKLOADS, make_workload

SMALL = ["plan", "--workload", "tool-use", "--requests", "60", "--rate", "30"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    add_fleet_arguments(parser, replicas=4)
    add_slo_argument(parser)
    return parser.parse_args(arguments)


def test_prints_every_probe_and_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "plan.json"
    slo = "ttft=0.15,tpot=0.015"
    assert main([*SMALL, "--slo", slo, "--policy", "e2,round-robin", "--json", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    document = json.loads(file.read_text())
    assert [one["policy"] for one in document["policies"]] == ["e2", "round-robin"]
    trace = make_workload("tool-use", requests=60, rate=30.0)
    for one in document["policies"]:
        expected = plan(trace, Settings(), SLO.parse(slo), policy=one["policy"])
        assert one == json.loads(json.dumps(expected.to_dict()))
        assert one["replicas"] > 1
        title, header, *rows = shown[: len(one["probes"]) + 2]
        verdict, *shown = shown[len(one["probes"]) + 2 :]
        assert title.startswith("tool-use: 60 requests")
        assert one["policy"] in title
        assert header.split() == ["replicas", "attained", "TTFT", "p99", "TPOT", "p99", "utilisation"]
        assert [int(row.split()[0]) for row in rows] == [probe["replicas"] for probe in one["probes"]]
        assert verdict.startswith(f"{one['replicas']} replicas are enough: ")
        assert f"on {one['replicas'] - 1}, " in verdict
    assert not shown
    settings = document["settings"]
    assert (settings["requests"], settings["slo"], settings["attain"], settings["seed"]) == (60, slo, 0.99, 0)
    assert settings["cost"] == "generic"
    assert "replicas" not in settings


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        assert main([*SMALL, "--seed", "3", "--json", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_replica_may_be_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--workload", "tool-use", "--requests", "20", "--rate", "0.2", "--slo", "e2e=30"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 replica is enough: 100.00 % of the requests keep e2e=30."


def test_the_most_may_not_be_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--slo", "ttft=0.15,tpot=0.015", "--max-replicas", "1"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("1 replica is not enough: ")
    assert "at best, on 1. " in last
    assert "--max-replicas" in last


def test_the_status_tells_whether_every_policy_has_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, statuses = tmp_path / "plan.json", set()
    for most in range(1, 8):
        arguments = ["--slo", "ttft=0.15,tpot=0.015", "--policy", "e2,round-robin,least-loaded"]
        status = main([*SMALL, *arguments, "--max-replicas", str(most), "--json", str(file)])
        answers = [one["replicas"] for one in json.loads(file.read_text())["policies"]]
        assert status == (1 if None in answers else 0)
        statuses.add((status, None in answers, any(answers)))
    assert len(statuses) > 1


def test_nothing_may_be_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--slo", "tpot=0.001"]) == 1
    _, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("No number of replicas is enough: 60 of 60 requests take longer than tpot=0.001 ")
    assert main([*SMALL, "--kv-tokens", "1300"]) == 1
    _, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("No number of replicas is enough: ")
    assert "--kv-tokens" in verdict


def test_a_trace_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    write_trace(make_workload("chat", requests=40, rate=2.0), file)
    assert main(["plan", "--trace", str(file), "--requests", "30", "--slo", "ttft=5"]) == 0
    assert ": 30 requests, " in capsys.readouterr().out
    assert main(["plan", "--trace", str(file), "--json", str(file)]) == 1
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workload chat --trace x.jsonl", "not allowed with"),
        ("", "one of the arguments --trace --workload is required"),
        ("--workload nothing", "invalid choice: 'nothing'"),
        ("--workload chat --rate 2 --rate-scale 2", "not allowed with"),
        ("--workload chat --rate -2", "--rate: must be a positive number, not '-2'"),
        ("--workload chat --rate-scale inf", "--rate-scale: must be a positive number, not 'inf'"),
        ("--workload chat --requests 0", "--requests: must be a positive integer"),
        ("--workload chat --slo ttft=0", "--slo: an SLO names ttft, tpot or e2e"),
        ("--workload chat --policy e2,e3", "--policy: policy must be one of"),
        ("--workload chat --cost fast", "--cost: cost must be one of"),
        ("--workload chat --cost missing.json", "--cost: missing.json cannot be read: No such file or directory"),
        ("--workload chat --believed-cost fast", "--believed-cost: cost must be one of"),
        ("--workload chat --fail 1", "--fail: a failure is REPLICA@SECONDS"),
        ("--workload chat --slow 1@-2", "--slow: a slow replica is REPLICA@FACTOR"),
        ("--workload chat --order last", "invalid choice: 'last'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments.split()])
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--attain 2", "attain must be a share above 0 and at most 1, not 2.0"),
        ("--fail 7@1 --max-replicas 4", "max_replicas must be at least 8"),
        ("--seed -1", "the seed must be at least 0, not -1"),
        ("--event-delay -1", "event_delay must be at least 0 seconds"),
    ],
)
def test_values_out_of_range(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments.split()]) == 1
    assert message in capsys.readouterr().err


def test_every_argument_reaches_the_settings() -> None:
    arguments = parse(
        *"--workload chat --kv-tokens 5000 --page-size 16 --max-batched-tokens 512 --order fcfs --closed-loop".split(),
        *"--event-delay 0.5 --fail 2@3+4 --fail 0@9 --slow 1@2 --slow 3@0.5 --seed 7 --replicas 5".split(),
        *"--cost mistral-7b-a100 --believed-cost generic".split(),
    )
    assert arguments.replicas == 5
    assert fleet_settings(arguments, arguments.replicas) == Settings(
        replicas=5,
        cost="mistral-7b-a100",
        believed_cost="generic",
        capacity_tokens=5000,
        page_size=16,
        max_batched_tokens=512,
        order="fcfs",
        closed_loop=True,
        event_delay=0.5,
        failures=(Failure(2, 3.0, 4.0), Failure(0, 9.0)),
        slowness=(1.0, 2.0, 1.0, 0.5),
        seed=7,
    )


def test_without_arguments_the_settings_are_the_defaults() -> None:
    arguments = parse("--workload", "chat")
    assert fleet_settings(arguments, 4) == Settings()
    assert arguments.policy == ("e2",)
    assert arguments.slo == SLO()


def test_a_workload_at_any_rate() -> None:
    usual = WORKLOADS["chat"]
    by_default = read_requests(parse("--workload", "chat"))
    assert len(by_default.requests) == usual.requests
    assert by_default.rate == pytest.approx(usual.rate, rel=0.1)
    arguments = ("--workload", "chat", "--requests", "1000")
    assert read_requests(parse(*arguments, "--rate", "100")).rate == pytest.approx(100, rel=0.1)
    assert read_requests(parse(*arguments, "--rate-scale", "3")).rate == pytest.approx(3 * usual.rate, rel=0.1)
    assert read_requests(parse(*arguments, "--arrivals", "uniform")).rate == pytest.approx(usual.rate, rel=1e-6)
    times = [[one.arrival for one in read_requests(parse(*arguments, "--seed", seed)).requests] for seed in "12"]
    assert times[0] != times[1]


def test_a_file_at_any_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    write_trace(make_workload("chat", requests=50, rate=2.0, arrivals="uniform"), file)
    source = ("--trace", str(file))
    assert read_requests(parse(*source)).rate == pytest.approx(2.0)
    assert read_requests(parse(*source, "--rate-scale", "3")).rate == pytest.approx(6.0)
    assert read_requests(parse(*source, "--rate", "5")).rate == pytest.approx(5.0)
    assert len(read_requests(parse(*source, "--requests", "20")).requests) == 20
    assert main(["plan", *source, "--arrivals", "poisson"]) == 1
    assert "--arrivals is for a --workload" in capsys.readouterr().err
    write_trace(make_workload("chat", requests=5, rate=2.0, arrivals="at-once"), file)
    assert main(["plan", *source, "--rate", "5"]) == 1
    assert "arrive at once" in capsys.readouterr().err


def test_a_fitted_cost_model(tmp_path: Path) -> None:
    fitted = FittedCost(PRESETS["generic"])
    for tokens in range(1, 65):
        fitted.observe(StepTimed(0, tokens, 0, tokens, 1.0 + tokens, tokens * tokens))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fitted.to_dict()))
    settings = fleet_settings(parse("--workload", "chat", "--cost", str(file)), 4)
    assert settings.cost_model.name == "mine.json"
    assert settings.kv_tokens == 200_000
    for shape in ((((100, 300),), 3, 900), ((), 5, 4000)):
        assert settings.cost_model.step_seconds(*shape) == pytest.approx(fitted.step_seconds(*shape))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cost.json is no JSON: "),
        (b"\xff", "cost.json is no JSON: "),
        (b"[]", "cost.json: a fitted cost model must be a mapping"),
        (b'{"format": "preble-cost-1"}', "cost.json: start of a fitted cost model must be a name"),
    ],
)
def test_a_file_that_is_no_cost_model(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit):
        main([*SMALL, "--cost", str(file)])
    assert message in capsys.readouterr().err
