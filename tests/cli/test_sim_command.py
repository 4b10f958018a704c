"""`preble sim`, from its arguments to its files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preble.cli import main
from preble.sched import PRESETS, FittedCost
from preble.sim import SLO, WORKLOADS, Failure, Settings, make_workload, simulate, write_trace

SMALL = ["sim", "--workload", "tool-use", "--requests", "40", "--rate", "30"]
FIGURES = {"mean", "p50", "p90", "p99"}


def document(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes."""
    file = tmp_path / "out.json"
    assert main([*arguments, "--json", str(file)]) == 0
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def test_a_table_with_a_row_per_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policy", "e2,round-robin", "--replicas", "2"]) == 0
    title, header, *others = capsys.readouterr().out.splitlines()
    rows, legend = others[:2], " ".join(others[2:])
    assert title.startswith("tool-use: 40 requests, ")
    assert title.endswith("on 2 x generic with 400,000 KV tokens")
    headings = re.split(r"  +", header)
    cells = [dict(zip(headings, re.split(r"  +", row), strict=True)) for row in rows]
    outcomes = simulate(make_workload("tool-use", requests=40, rate=30.0), Settings(replicas=2), ["e2", "round-robin"])
    assert [one["policy"] for one in cells] == ["e2", "round-robin"]
    for one, outcome in zip(cells, outcomes, strict=True):
        assert one["completed"] == "40"
        assert one["hit"] == f"{outcome.hit_rate:.1%}"
        assert float(one["TTFT"]) == pytest.approx(outcome.ttft.mean(), rel=0.01)
        assert float(one["TPOT"]) == pytest.approx(outcome.to_dict()["tpot"]["mean"], rel=0.01)
        assert float(one["latency"]) == pytest.approx(outcome.e2e.mean(), rel=0.01)
        assert float(one["goodput"]) == pytest.approx(outcome.goodput, rel=0.01)
        assert float(one["imbalance"]) == pytest.approx(outcome.imbalance, abs=0.006)
        assert int(one["decisions/s"].replace(",", "")) > 0
    assert legend.endswith("ttft=2,tpot=0.1")


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_every_figure(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A narrow one has a column per policy."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes it a terminal for rich
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*SMALL, "--policy", "e2,prefix-affinity", "--replicas", "2"]) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).splitlines()
    assert "…" not in "".join(shown)
    table = [re.split(r"  +", line.strip()) for line in shown if line.startswith(" ") and line.strip("─ ")]
    if columns == 140:
        table = [list(column) for column in zip(*table, strict=True)]
    figures = {heading: values for heading, *values in table}
    outcomes = simulate(
        make_workload("tool-use", requests=40, rate=30.0), Settings(replicas=2), ["e2", "prefix-affinity"]
    )
    assert figures["policy"] == ["e2", "prefix-affinity"]
    assert figures["hit"] == [f"{one.hit_rate:.1%}" for one in outcomes]
    assert figures["imbalance"] == [f"{one.imbalance:.2f}" for one in outcomes]
    assert len(figures) == 12


def test_the_file_has_every_setting_and_figure(tmp_path: Path) -> None:
    read = document(tmp_path, *SMALL, "--policy", "round-robin,e2", "--replicas", "3", "--seed", "5")
    assert set(read) == {"settings", "policies"}
    settings = read["settings"]
    assert set(settings) == {
        *Settings.__dataclass_fields__,
        *("trace", "workload", "arrivals", "requests", "rate", "rate_scale", "slo"),
    }
    assert (settings["trace"], settings["workload"], settings["arrivals"]) == ("tool-use", "tool-use", "poisson")
    assert (settings["requests"], settings["replicas"], settings["seed"], settings["rate_scale"]) == (40, 3, 5, None)
    trace = make_workload("tool-use", requests=40, rate=30.0, seed=5)
    expected = simulate(trace, Settings(replicas=3, seed=5), ["round-robin", "e2"])
    assert read["policies"] == json.loads(json.dumps([one.to_dict() for one in expected]))
    for one in read["policies"]:
        for name in ("ttft", "tpot", "e2e", "queueing"):
            assert set(one[name]) == FIGURES
            assert one[name]["p50"] <= one[name]["p90"] <= one[name]["p99"]
        assert set(one) >= {"policy", "requests", "completed", "hit_rate", "goodput", "imbalance"}
        assert set(one) >= {"evicted_tokens", "recomputed_tokens"}


def test_every_option_reaches_the_fleet(tmp_path: Path) -> None:
    fitted = tmp_path / "fitted.json"
    fitted.write_text(json.dumps(FittedCost(PRESETS["llama-3-70b-2xh100"]).to_dict()))
    options = (
        f"--workload chat --requests 30 --rate-scale 2 --arrivals bursty --closed-loop --seed 3 --replicas 3 "
        f"--policy least-loaded --cost {fitted} --believed-cost mistral-7b-a100 --kv-tokens 30000 --page-size 16 "
        f"--max-batched-tokens 512 --order fcfs --event-delay 0.25 --fail 1@0.5+1 --fail 2@1 --slow 0@2 "
        f"--slo ttft=1,e2e=9"
    )
    read = document(tmp_path, "sim", *options.split())
    trace = make_workload("chat", requests=30, rate=2 * WORKLOADS["chat"].rate, seed=3, arrivals="bursty")
    assert read["settings"] == {
        "trace": "chat",
        "workload": "chat",
        "arrivals": "bursty",
        "requests": 30,
        "rate": trace.rate,
        "rate_scale": 2.0,
        "slo": "ttft=1,e2e=9",
        "replicas": 3,
        "cost": "fitted.json",
        "believed_cost": "mistral-7b-a100",
        "capacity_tokens": 30_000,
        "page_size": 16,
        "max_batched_tokens": 512,
        "max_running": 256,
        "order": "fcfs",
        "closed_loop": True,
        "event_delay": 0.25,
        "failures": [{"replica": 1, "at": 0.5, "seconds": 1.0}, {"replica": 2, "at": 1.0, "seconds": None}],
        "slowness": [2.0],
        "max_tokens": 4096,
        "leap_seconds": 0.2,
        "seed": 3,
    }
    fleet = Settings(
        replicas=3,
        cost=FittedCost.from_dict(json.loads(fitted.read_text())).model,
        believed_cost="mistral-7b-a100",
        capacity_tokens=30_000,
        page_size=16,
        max_batched_tokens=512,
        order="fcfs",
        closed_loop=True,
        event_delay=0.25,
        failures=(Failure(1, 0.5, 1.0), Failure(2, 1.0)),
        slowness=(2.0,),
        seed=3,
    )
    (expected,) = simulate(trace, fleet, ["least-loaded"], slo=SLO.parse("ttft=1,e2e=9"))
    assert read["policies"] == [expected.to_dict()]
    assert expected.completed == 30
    assert expected.moves > 0


def test_a_trace_file_at_another_rate(tmp_path: Path) -> None:
    file = tmp_path / "recorded.jsonl"
    trace = make_workload("programming", requests=30, rate=5.0, seed=1)
    write_trace(trace, file)
    whole = document(tmp_path, "sim", "--trace", str(file), "--policy", "round-robin")
    assert whole["settings"]["requests"] == whole["policies"][0]["requests"] == 30
    slow = document(tmp_path, "sim", "--trace", str(file), "--requests", "20", "--policy", "e2")
    fast = document(tmp_path, "sim", "--trace", str(file), "--requests", "20", "--policy", "e2", "--rate-scale", "4")
    assert slow["settings"]["requests"] == fast["settings"]["requests"] == 20
    assert fast["settings"]["rate"] == pytest.approx(4 * slow["settings"]["rate"])
    assert (slow["settings"]["workload"], slow["settings"]["arrivals"]) == (None, None)
    assert fast["policies"][0]["makespan"] < slow["policies"][0]["makespan"]
    assert fast["policies"][0]["prompt_tokens"] == sum(one.prompt_tokens for one in trace.requests[:20])


def test_the_same_arguments_give_the_same_file(tmp_path: Path) -> None:
    """From two processes that hash differently."""
    files = []
    for seed in ("1", "2"):
        files.append(tmp_path / f"{seed}.json")
        command = [sys.executable, "-m", "preble", *SMALL, "--policy", "e2,prefix-affinity", "--json", str(files[-1])]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "a progress bar where nobody watches"
        assert "\x1b" not in done.stdout
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_page_with_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "page.html"
    assert main([*SMALL, "--policy", "e2,round-robin", "--html", str(file)]) == 0
    page = file.read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "round-robin" in page
    assert "<svg" in page


def test_what_did_not_end_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = document(tmp_path, *SMALL, "--replicas", "1", "--fail", "0@0.5", "--kv-tokens", "2048", "--policy", "e2")
    (one,) = read["policies"]
    assert one["refused"] > 0
    assert one["completed"] + one["refused"] < 40
    refused, lost = capsys.readouterr().err.splitlines()
    assert refused == f"e2: {one['refused']} requests are longer than a replica's KV pages (--kv-tokens)"
    assert lost == f"e2: {40 - one['refused'] - one['completed']} requests did not end, as every replica is down"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "--trace --workload is required"),
        ("--trace a --workload tool-use", 2, "not allowed with"),
        ("--trace missing.jsonl", 1, "missing.jsonl"),
        ("--workload tools", 2, "'tools'"),
        ("--workload tool-use --policy e2,fastest", 2, "fastest"),
        ("--workload tool-use --policy e2,", 2, "--policy"),
        ("--workload tool-use --cost gpu", 2, "gpu"),
        ("--workload tool-use --cost missing.json", 2, "missing.json"),
        ("--workload tool-use --replicas 0", 2, "--replicas: must be a positive integer"),
        ("--workload tool-use --requests 0", 2, "--requests: must be a positive integer"),
        ("--workload tool-use --rate-scale 0", 2, "--rate-scale: must be a positive number"),
        ("--workload tool-use --page-size 0", 2, "--page-size: must be a positive integer"),
        ("--workload tool-use --kv-tokens 10", 1, "less than a page"),
        ("--workload tool-use --event-delay -1", 1, "event_delay must be at least 0"),
        ("--workload tool-use --fail 0", 2, "REPLICA@SECONDS"),
        ("--workload tool-use --fail 4@1", 1, "no replica 4 to fail"),
        ("--workload tool-use --slow 4@2", 1, "slowness"),
        ("--workload tool-use --slow 2", 2, "REPLICA@FACTOR"),
        ("--workload tool-use --slo 2.0", 2, "an SLO names ttft, tpot or e2e"),
        ("--workload tool-use --order lifo", 2, "'lifo'"),
        ("--workload tool-use --json .", 1, "cannot be written"),
        ("--workload tool-use --html .", 1, "cannot be written"),
        ("--workload tool-use --json same --html same", 1, "same would be overwritten"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    arguments: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        got = main(["sim", *arguments.split()])
    except SystemExit as exit_:
        got = exit_.code
    shown = capsys.readouterr()
    assert got == status
    (line,) = shown.err.splitlines()
    assert line.startswith("preble sim: ")
    assert message in line
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_output_never_overwrites_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recorded.jsonl"
    write_trace(make_workload("programming", requests=3, rate=5.0), file)
    before = file.read_bytes()
    assert main(["sim", "--trace", str(file), "--json", str(file)]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_page_without_matplotlib_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("preble.sim.html.find_spec", lambda name: None)
    assert main([*SMALL, "--html", str(tmp_path / "page.html")]) == 1
    shown = capsys.readouterr()
    assert "preble[report]" in shown.err
    assert shown.out == ""
