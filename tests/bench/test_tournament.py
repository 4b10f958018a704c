"""Tournaments: rates are what they say, nothing is run twice, ratios are true, and other routers can take part."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from preble.bench.sim import digest as digests
from preble.bench.sim.comparison import Latencies, Ratio, mean_ratio, ratios_in_setting
from preble.bench.sim.condition import CONDITIONS
from preble.bench.sim.digest import BOUND, digest
from preble.bench.sim.entry import Entry
from preble.bench.sim.grids import GRIDS, PAPER_E2, PAPER_LOADS, PAPER_WORKLOADS, paper_policies, paper_settings
from preble.bench.sim.job import Job, seconds_of
from preble.bench.sim.peers import PEERS
from preble.bench.sim.peers.base import PeerRouter
from preble.bench.sim.report import markdown, sections
from preble.bench.sim.results import Results
from preble.bench.sim.setting import Setting
from preble.bench.sim.source import AT_ONCE, Source
from preble.bench.sim.standings import Contest, Standings, standings
from preble.bench.sim.tournament import SATURATED_BY, Tournament
from preble.bench.sim.worker import PeerFailed, perform
from preble.cli import main
from preble.errors import InvalidRequest
from preble.sched.events import Stored
from preble.sched.hashing import Tokens
from preble.sched.policies import POLICIES
from preble.sim.html import page
from preble.sim.settings import Failure, Settings
from preble.sim.simulate import simulate
from preble.sim.trace import Trace, TracedRequest

PEER_PYTHON = os.environ.get("PEER_PYTHON", sys.executable)
"""As for the benchmarks: an interpreter that has the packages of peers."""
TINY = Source("tool-use", None, 60)
SETTING = Setting(TINY, 2, "mistral-7b-a6000", 0.9)
ENTRIES = [Entry("e2", "hrrn"), Entry("round-robin", "fcfs")]


def write_trace(path: Path, requests: int = 40) -> Path:
    """Half of them begin alike."""
    lines = [
        {
            "t": number * 0.5,
            "in": 640,
            "out": 8,
            "block": 64,
            "blocks": [*shared(number), *range(k := number * 10 + 20, k + 5)],
        }
        for number in range(requests)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shared(number: int) -> list[int]:
    return [0, 1, 2, 3, 4] if number % 2 else [5 + 100_000 * number + step for step in range(5)]


def tournament(folder: Path, *settings: Setting, peer_python: str = sys.executable) -> Tournament:
    return Tournament(settings or [SETTING], ENTRIES, Results(folder), peer_python, 1)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Tournament:
    """Two settings of one workload, and two seeds of each."""
    settings = [replace(SETTING, load=load, seed=seed) for load in (0.5, 1.2) for seed in (0, 1)]
    made = tournament(tmp_path_factory.mktemp("played"), *settings)
    assert made.run() == []
    return made


# Settings


def test_a_trace_arrives_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    source = Source.of_file(write_trace(tmp_path / "some.trace.jsonl"), 30)
    assert source.name == "some"
    trace = source.trace(7.0, 4, 0)
    assert len(trace.requests) == 30
    assert trace.rate == pytest.approx(7.0)
    assert {one.arrival for one in source.trace(AT_ONCE, 4, 0).requests} == {0.0}


def test_a_workload_grows_with_the_fleet() -> None:
    source = Source("tool-use", None, None)
    few, many = source.trace(20.0, 2, 0), source.trace(20.0, 4, 0)
    assert len(many.requests) == 2 * len(few.requests) == 7200
    assert many.rate == pytest.approx(20.0, rel=0.05)
    assert {one.arrival for one in TINY.trace(AT_ONCE, 4, 0).requests} == {0.0}
    again = TINY.trace(20.0, 2, 1)
    assert any(
        not np.array_equal(one.blocks, other.blocks)
        for one, other in zip(TINY.trace(20.0, 2, 0).requests, again.requests, strict=True)
    )


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no workload 'tool-uses'"):
        Source("tool-uses", None, 5).trace(1.0, 2, 0)
    with pytest.raises(InvalidRequest, match=r"gone\.jsonl cannot be read"):
        Source.of_file(tmp_path / "gone.jsonl", 5).fingerprint()
    at_once = tmp_path / "once.jsonl"
    at_once.write_text('{"t": 1, "in": 5, "out": 1}\n{"t": 1, "in": 6, "out": 1}\n')
    with pytest.raises(InvalidRequest, match="arrive at once"):
        Source.of_file(at_once, None).trace(2.0, 2, 0)


def test_conditions_are_what_their_names_say() -> None:
    trace = TINY.trace(10.0, 2, 0)
    fleets = {name: replace(SETTING, condition=name).fleet(trace, "fcfs") for name in CONDITIONS}
    plain = fleets["plain"]
    assert plain == Settings(replicas=2, cost="mistral-7b-a6000", order="fcfs")
    assert fleets["delayed"] == replace(plain, event_delay=0.5)
    assert fleets["slow-replica"] == replace(plain, slowness=(2.0,))
    assert fleets["lost-replica"].failures == (Failure(0, trace.duration / 2),)
    assert fleets["closed-loop"] == replace(plain, closed_loop=True)
    for name, factor in (("dear", 2.0), ("cheap", 0.5)):
        believed = fleets[name].believed_cost
        assert believed is not None
        assert not isinstance(believed, str)
        assert believed.prefill_seconds(500) == factor * plain.cost_model.prefill_seconds(500)
    with pytest.raises(InvalidRequest, match="condition must be one of"):
        replace(SETTING, condition="dire").fleet(trace, "fcfs")
    assert "lost-replica" in replace(SETTING, condition="lost-replica").name


# Entries


def test_an_entry_is_a_policy_with_switches_and_an_order() -> None:
    plain = Entry.parse("lmetric", "hrrn")
    assert (plain.name, plain.peer) == ("lmetric@hrrn", None)
    switched = Entry.parse("dynamo:decode_active_request_weight=32@fcfs", "hrrn")
    assert switched.order == "fcfs"
    assert vars(switched.make())["decode_active_request_weight"] == 32
    assert vars(Entry.parse(f"{PAPER_E2}:rebalancing=off", "hrrn").make())["rebalancing"] is False
    assert Entry.parse(switched.name, "hrrn") == switched
    assert Entry.parse("ray-tree", "preble").peer == "ray-tree"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("e3", "policy must be one of"),
        ("e2@lifo", "lifo"),
        ("e2:rebalancing", "NAME=on, NAME=off or NAME=NUMBER, not 'rebalancing'"),
        ("e2:zeal=on", "unexpected keyword argument 'zeal'"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Entry.parse(text, "hrrn")


# Sources


def test_a_policy_of_its_own_changes_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: read_by_digest(monkeypatch, name) for name in (*POLICIES, *PEERS, BOUND)}
    for name, paths in files.items():
        assert {"sched/scheduler.py", "sched/local.py", "sim/simulation.py", "sim/workloads/make.py"} <= paths, name
        assert not any("html" in path or "cli" in path for path in paths), name
    assert {path for path in files["lmetric"] if "policies/" in path} == {
        "sched/policies/base.py",
        "sched/policies/lmetric.py",
    }
    assert {path for path in files["ray-tree"] if "/peers/" in path} == {
        "bench/sim/peers/__init__.py",
        "bench/sim/peers/base.py",
        "bench/sim/peers/ray_tree.py",
    }
    assert "sim/bound.py" in files[BOUND]
    assert len({digest(name) for name in files}) == len(files)


def read_by_digest(monkeypatch: pytest.MonkeyPatch, policy: str) -> set[str]:
    """The files that count for it."""
    hashed: list[Path] = []
    read_bytes = Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (hashed.append(path), read_bytes(path))[1])
        digests.digest.__wrapped__(policy)
    return {str(path.relative_to(digests.ROOT)) for path in hashed}


def test_the_key_tells_everything_apart(tmp_path: Path) -> None:
    source = Source.of_file(write_trace(tmp_path / "one.jsonl"), 10)
    job = Job(replace(SETTING, source=source), ENTRIES[0], 3.0)
    others = [
        replace(job, rate=4.0),
        replace(job, entry=ENTRIES[1]),
        replace(job, entry=None),
        replace(job, entry=replace(ENTRIES[0], order="fcfs")),
        replace(job, setting=replace(job.setting, replicas=3)),
        replace(job, setting=replace(job.setting, condition="delayed")),
        replace(job, setting=replace(job.setting, seed=1)),
        # Other requests in a file of the same name; a fingerprint is taken once per process, so it has another folder.
        replace(
            job, setting=replace(job.setting, source=replace(source, file=str(write_trace(tmp_path / "two.jsonl", 11))))
        ),
    ]
    assert len({one.key for one in (job, *others)}) == len(others) + 1
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    at_once = replace(job, rate=AT_ONCE)
    assert Job.from_dict(json.loads(json.dumps(at_once.to_dict()))).key == at_once.key


# Runs


def test_saturation_is_what_a_router_that_reuses_prefixes_can_do(played: Tournament) -> None:
    """All at once, it does its requests in the busy time of its replicas; far below that rate these are idle."""
    row = played.results.get(played.saturation_job(played.settings[0]))
    assert row is not None
    assert {row["setting"]["load"], row["rate"]} == {1.0, None}
    saturation = played.saturation(played.settings[0])
    assert saturation == pytest.approx(60 / np.mean(row["figures"]["busy_seconds"]))
    assert played.rate(played.settings[0]) == saturation / 2
    assert played.rate(replace(SETTING, rate=3.0, load=1.5)) == 4.5
    light, heavy = (Job(SETTING, SATURATED_BY, load * saturation).run()["figures"] for load in (0.1, 3.0))
    assert light["utilization"] < 0.5
    assert heavy["utilization"] > 0.9
    assert heavy["ttft"]["mean"] > 4 * light["ttft"]["mean"]


def test_a_row_holds_what_the_simulation_said(played: Tournament) -> None:
    setting = played.settings[0]
    job = Job(setting, ENTRIES[0], played.rate(setting))
    row = played.results.get(job)
    assert row is not None
    trace = TINY.trace(job.rate, 2, 0)
    (outcome,) = simulate(trace, setting.fleet(trace, "hrrn"), ["e2"])
    assert seconds_of(row, "ttft") == pytest.approx(outcome.ttft, rel=1e-6)
    assert seconds_of(row, "e2e") == pytest.approx(outcome.e2e, rel=1e-6)
    assert row["figures"] == json.loads(json.dumps(outcome.to_dict()))


def test_nothing_is_run_twice(played: Tournament, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Tournament(played.settings, ENTRIES, Results(played.results.path.parent), sys.executable, 1)
    before = played.results.path.read_bytes()
    assert again.run() == []
    assert played.results.path.read_bytes() == before
    assert before.count(b"\n") == 2 + 4 * 3  # a saturation per seed; two entries and the bound per setting
    # Other sources: all of it has to be run again.
    monkeypatch.setattr("preble.bench.sim.job.digest", lambda policy: f"changed {policy}")
    with pytest.raises(InvalidRequest, match="no run says yet what saturates"):
        list(again.jobs())


def test_a_line_cut_off_is_run_again_and_the_rest_is_kept(played: Tournament, tmp_path: Path) -> None:
    text = played.results.path.read_text()
    path = Results(tmp_path).path
    path.write_text(text[:-300])
    results = Results(tmp_path)
    jobs = list(played.jobs())
    missing = [job for job in jobs if results.get(job) is None]
    assert len(missing) == 1
    results.add(missing[0].run())
    assert all(Results(tmp_path).get(job) is not None for job in jobs)
    path.write_text('{"t": 1, "in": 2}\nnot json\n{}\n')
    with pytest.raises(InvalidRequest, match="line 2: this is no row"):
        Results(tmp_path)


def test_a_run_that_fails_keeps_no_other_from_being_made(tmp_path: Path) -> None:
    """Its interpreter does not exist."""
    entries = [*ENTRIES, Entry("ray-tree", "hrrn")]
    made = Tournament(
        [replace(SETTING, rate=5.0), replace(SETTING, rate=6.0)],
        entries,
        Results(tmp_path),
        str(tmp_path / "python"),
        1,
    )
    (complaint,) = made.run()
    assert complaint.startswith("ray-tree is left out: ")
    assert "No such file" in complaint
    assert len(Results(tmp_path).path.read_text().splitlines()) == 6
    standing = standings(made, ENTRIES[0])
    assert standing.missing == 2
    assert standing.mean("ray-tree@hrrn") is None


# Comparisons


def latencies(values: list[float]) -> Latencies:
    seconds = np.array(values)
    return Latencies(seconds, 2 * seconds)


def test_ratios_are_rival_to_reference() -> None:
    generator = np.random.default_rng(0)
    base = generator.exponential(1.0, 500)
    reference, rival = Latencies(base, base + 1), Latencies(base * 3, base + 1)
    ratio = ratios_in_setting({"rival": rival}, reference)["rival"]
    assert ratio.value == pytest.approx([3, 3, 1, 1])
    # On the same requests, it is 3 however they are drawn.
    assert ratio.low == pytest.approx([3, 3, 1, 1])
    assert ratio.high == pytest.approx([3, 3, 1, 1])


def test_the_interval_is_as_wide_as_chance_makes_it() -> None:
    """Independent requests: about 1.96 standard errors to either side, for the mean of one over that of the other."""
    generator = np.random.default_rng(1)
    base, other = generator.normal(10, 1, 2000), generator.normal(10, 1, 2000)
    ratio = ratios_in_setting({"rival": latencies(other.tolist())}, latencies(base.tolist()))["rival"]
    width = math.log(ratio.high[0] / ratio.low[0]) / 2
    assert width == pytest.approx(1.96 * 0.1 * math.sqrt(2 / 2000), rel=0.35)
    assert ratio.low[0] < ratio.value[0] < ratio.high[0]


def test_requests_that_wait_for_each_other_make_it_wider() -> None:
    """The same values, in long waves and shuffled."""
    waves = 10 + np.sin(np.arange(2000) / 2000 * 2 * np.pi * 20)
    shuffled = np.random.default_rng(0).permutation(waves)
    flat = latencies([10.0] * 2000)

    def width(values: np.ndarray) -> float:
        ratio = ratios_in_setting({"rival": latencies(values.tolist())}, flat)["rival"]
        return float(ratio.high[0] - ratio.low[0])

    assert width(waves) > 2 * width(shuffled)


def test_settings_count_alike_in_a_geometric_mean() -> None:
    ratio = mean_ratio([np.full(4, 2.0), np.full(4, 0.5), np.full(4, 4.0)])
    assert ratio.value == pytest.approx([4 ** (1 / 3)] * 4)
    assert all(ratio.low < ratio.value)
    assert ratio.low[0] == pytest.approx(0.5, rel=0.3)
    assert ratio.high[0] == pytest.approx(4.0, rel=0.3)


def test_standings_are_over_settings_and_their_seeds_together(played: Tournament) -> None:
    standing = standings(played, ENTRIES[0])
    assert standing.reference == "e2@hrrn"
    assert standing.rivals == ["round-robin@fcfs"]
    assert [one.setting.load for one in standing.contests] == [0.5, 1.2]
    assert standing.missing == 0
    contest = standing.contests[1]
    rows = [
        played.results.get(Job(setting, ENTRIES[1], played.rate(setting)))
        for setting in played.settings
        if setting.load == 1.2
    ]
    pooled = np.concatenate([seconds_of(row, "ttft") for row in rows if row is not None])
    assert len(pooled) == 120
    assert contest.figures["round-robin@fcfs"][0] == pytest.approx(pooled.mean())
    ratio = contest.figures["round-robin@fcfs"] / contest.figures["e2@hrrn"]
    assert contest.ratios["round-robin@fcfs"].value == pytest.approx(ratio)
    assert contest.bound is not None
    assert all((contest.figures[name] >= contest.bound * (1 - 1e-6)).all() for name in contest.figures)
    above = standing.above_bound("e2@hrrn")
    assert above is not None
    assert (above > 1).all()
    # From the other side all is upside down.
    other = standings(played, ENTRIES[1])
    mean, back = standing.mean("round-robin@fcfs"), other.mean("e2@hrrn")
    assert mean is not None
    assert back is not None
    assert mean.value * back.value == pytest.approx(1)
    lost = [*standing.losses("round-robin@fcfs", 0), *other.losses("e2@hrrn", 0)]
    assert all(one.ratios[name].high[0] < 1 / 1.05 for one in other.losses("e2@hrrn", 0) for name in one.ratios)
    assert lost, "round robin is as good as E2 at 1.2 times saturation"


def test_a_loss_is_beyond_the_interval_and_the_worst_comes_first() -> None:
    def contest(load: float, value: float, high: float) -> Contest:
        ratio = Ratio(np.full(4, value), np.full(4, value - 0.1), np.full(4, high))
        return Contest(replace(SETTING, load=load), 1.0, {}, None, {"rival": ratio}, {}, {})

    contests = [contest(1, 0.9, 0.97), contest(2, 0.85, 0.94), contest(3, 0.7, 0.8), contest(4, 1.5, 2.0)]
    standing = Standings("reference", ["rival", "absent"], contests, 0)
    assert [one.setting.load for one in standing.losses("rival", 0)] == [3, 2]
    assert standing.losses("absent", 0) == []


def test_a_seed_that_is_missing_takes_its_setting_out(played: Tournament, tmp_path: Path) -> None:
    gone = list(played.jobs())[1]  # of the first seed of the first setting
    results = Results(tmp_path)
    for line in played.results.path.read_text().splitlines():
        row = json.loads(line)
        if row["key"] != gone.key:
            results.add(row)
    partly = Tournament(played.settings, ENTRIES, results, sys.executable, 1)
    assert [one.setting.load for one in standings(partly, ENTRIES[0]).contests] == [1.2]
    with pytest.raises(InvalidRequest, match="has completed no setting"):
        standings(partly, Entry("lmetric", "hrrn"))


def test_who_loses_requests_is_told_and_not_compared(played: Tournament, tmp_path: Path) -> None:
    results = Results(tmp_path)
    for line in played.results.path.read_text().splitlines():
        row = json.loads(line)
        if row["entry"] == {"policy": "round-robin", "order": "fcfs"} and row["setting"]["load"] == 0.5:
            row["figures"]["completed"] -= 3
        results.add(row)
    standing = standings(Tournament(played.settings, ENTRIES, results, sys.executable, 1), ENTRIES[0])
    assert [one.lost for one in standing.contests] == [{"round-robin@fcfs": 6}, {}]
    assert [list(one.ratios) for one in standing.contests] == [[], ["round-robin@fcfs"]]
    assert "lost 6" in markdown("", sections(standing, about=""))


def test_the_report_says_the_same_in_every_form(played: Tournament) -> None:
    standing = standings(played, ENTRIES[0])
    parts = sections(standing, about="a test")
    text, document = markdown("Title", parts), json.loads(json.dumps(standing.to_dict()))
    mean = standing.mean("round-robin@fcfs")
    assert mean is not None
    assert document["rivals"]["round-robin@fcfs"]["ratio"] == pytest.approx(mean.value.tolist())
    figure = f"{mean.value[0]:.2f} ({mean.low[0]:.2f}-{mean.high[0]:.2f})"
    for form in (text, page("Title", *parts)):
        assert figure in form
        assert "tool-use, 2 x mistral-7b-a6000, load 1.2" in form
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for above, below in pairwise(tables):
        if below.startswith("| :--"):
            assert above.count("|") == below.count("|")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_trace(tmp_path / "half.jsonl")
    out = tmp_path / "out"
    command = f"bench sim --traces {file} --replicas 2 --loads 1.1 --cost mistral-7b-a6000 --out {out} --jobs 1".split()
    policies = ["--policies", "round-robin,dynamo:decode_active_request_weight=8@preble"]
    assert main([*command, *policies]) == 0
    told = capsys.readouterr().out
    assert "Everybody against e2@hrrn" in told
    document = json.loads((out / "report.json").read_text())
    assert set(document["rivals"]) == {"round-robin@hrrn", "dynamo:decode_active_request_weight=8@preble"}
    assert document["settings"][0]["source"]["file"] == str(file)
    report = (out / "report.md").read_text()
    assert main([*command, *policies, "--report-only"]) == 0
    assert (out / "report.md").read_text() == report
    assert main([*command, "--policies", "lmetric", "--report-only", "--reference", "lmetric"]) == 1
    assert "lmetric@hrrn has completed no setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loads", "0.5,x"], "--loads takes positive numbers by commas, not '0.5,x'"),
        (["--replicas", "0"], "--replicas takes positive numbers"),
        (["--cost", "cheap"], "cost must be one of"),
        (["--conditions", "dire"], "condition must be one of"),
        (["--policies", "e3"], "policy must be one of"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--grid", "paper", "--loads", "1"], "leave out --loads"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sim", "--out", str(tmp_path), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_the_grids_can_be_run() -> None:
    for grid in GRIDS.values():
        assert grid.reference in grid.policies
        assert {Entry.parse(name, "hrrn").policy for name in grid.policies} == set(grid.policies)
    settings = paper_settings(None, seeds=2)
    assert len(settings) == 2 * len(PAPER_WORKLOADS) * len(PAPER_LOADS) * 2
    assert {(one.source.name, one.rate) for one in settings} == {
        ("tool-use", 36.0),
        ("embodied", 30.0),
        ("programming", 9.0),
        ("video-qa", 6.0),
        ("long-document", 1.4),
    }
    steps = [Entry.parse(name, "hrrn") for name in paper_policies()]
    assert [one.order for one in steps] == ["fcfs"] * 4 + ["preble"]
    switches = [vars(one.make()) for one in steps[1:]]
    parts = [[made[name] for name in ("rebalancing", "autoscaling", "prefill_decode_balance")] for made in switches]
    assert parts == [[False, False, False], [True, True, False], [True, True, True], [True, True, True]]


# Other routers


class First(PeerRouter):
    """Takes the first replica that serves, and writes down what it is told."""

    def __init__(self, replicas: int) -> None:
        super().__init__("first", replicas)
        self.told: list[tuple[str, object]] = []

    def choose(self, request_id: str, tokens: Tokens, now: float) -> tuple[int, str]:
        self.told.append(("choose", dict(self.in_flight())))
        return min(self.up), "first"

    def computed(self, booked: object) -> None:
        self.told.append(("computed", booked))

    def finished(self, booked: object) -> None:
        self.told.append(("finished", booked))

    def cached(self, event: object) -> None:
        self.told.append(("cached", event))

    def left(self, replica: int) -> None:
        self.told.append(("left", replica))

    def joined(self, replica: int) -> None:
        self.told.append(("joined", replica))


def requests(count: int, tokens: int = 640, output: int = 20) -> Trace:
    return Trace(
        "made",
        64,
        tuple(
            TracedRequest(number * 0.05, tokens, output, np.arange(number * 10, number * 10 + 10, dtype=np.int32))
            for number in range(count)
        ),
    )


def test_another_router_hears_of_every_request_in_order() -> None:
    router = First(2)
    (outcome,) = simulate(requests(12), Settings(replicas=2, cost="mistral-7b-a6000"), [router])
    assert outcome.policy == "first"
    assert outcome.completed == 12
    assert set(outcome.replica.tolist()) == {0}
    assert outcome.reasons == {"first": 12}
    what = [name for name, _ in router.told]
    assert [what.count(name) for name in ("choose", "computed", "finished")] == [12, 12, 12]
    stored = [event for _, event in router.told if isinstance(event, Stored)]
    assert sum(len(event.hashes) for event in stored) >= 12 * 10
    loads = [load for name, load in router.told if name == "choose"]
    assert loads[0] == {0: 0, 1: 0}
    assert loads[1] == {0: 1, 1: 0}
    assert not router.booked
    for number in range(12):
        mine = [name for name, one in router.told if getattr(one, "request_id", "") == str(number)]
        assert mine == ["computed", "finished"]


def test_another_router_routes_anew_what_a_lost_replica_had() -> None:
    router = First(2)
    fleet = Settings(replicas=2, cost="mistral-7b-a6000", failures=(Failure(0, 0.4, 1.0),))
    (outcome,) = simulate(requests(60), fleet, [router])
    assert outcome.completed == 60
    assert outcome.moves > 0
    what = [name for name, _ in router.told]
    assert (what.count("left"), what.count("joined")) == (1, 1)
    assert what.count("choose") == 60 + outcome.moves
    assert set(outcome.replica.tolist()) == {0, 1}
    assert not router.booked


@pytest.mark.parametrize("peer", sorted(PEERS))
def test_the_real_thing_places_every_request(peer: str) -> None:
    """In its own interpreter, on a setting in which it reuses prefixes."""
    job = Job(replace(SETTING, replicas=3), Entry(peer, "hrrn"), 12.0)
    needed = {"dynamo-service": "dynamo.llm, zmq, msgpack, numpy", "ray-tree": "ray.llm, numpy"}[peer]
    have = subprocess.run([PEER_PYTHON, "-c", f"import {needed}"], capture_output=True, text=True, check=False)
    if have.returncode:
        pytest.skip(f"$PEER_PYTHON lacks {needed}: {have.stderr.strip().splitlines()[-1]}")
    row = perform(job, PEER_PYTHON)
    assert row["key"] == job.key
    assert row["figures"]["completed"] == 60
    assert row["figures"]["hit_rate"] > 0.05
    assert row["peer"]


def test_a_peer_that_is_not_there_says_so() -> None:
    job = Job(SETTING, Entry("ray-tree", "hrrn"), 5.0)
    with pytest.raises(PeerFailed, match=r"nowhere/python: No such file"):
        perform(job, "nowhere/python")
