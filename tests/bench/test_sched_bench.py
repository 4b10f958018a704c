"""The benchmark of the scheduler: its replicas act like engines, its figures are what they say, and it runs whole."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import OrderedDict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from preble.bench.peers.process import PeerFailed
from preble.bench.sched import plan, suite, workload
from preble.bench.sched.contest import run_peer
from preble.bench.sched.page_cache import PageCache
from preble.bench.sched.peers import PEERS, worker
from preble.bench.sched.plan import Plan
from preble.bench.sched.replica import FakeReplica, make_flight
from preble.bench.sched.results import ContestResult, Pace
from preble.bench.sched.traffic import OUTPUT_TOKENS, Times, Traffic, percentile
from preble.bench.sched.workload import WORKLOADS, Workload, distinct_prompts
from preble.errors import InvalidRequest
from preble.sched import POLICIES, GlobalScheduler, Progressed, StepTimed

SMALL = Workload("small", prompt_tokens=200, prefixes=5, goal=1)
TINY = Plan(
    fill=60,
    measured=40,
    rounds=2,
    distinct=250,
    segment=100,
    policy_fill=30,
    peer_fill=10,
    peer_measured={100: 20},
    workloads=(SMALL, Workload("longer", 9_000, 3, goal=1e12)),
    tool_use=SMALL,
)


@pytest.mark.parametrize("load", WORKLOADS, ids=lambda one: one.name)
def test_prompts_share_what_the_workload_says(load: Workload) -> None:
    prompts = list(islice(load.prompts(0), 12))
    assert {(len(one), one.dtype) for one in prompts} == {(load.prompt_tokens, np.dtype(np.int32))}
    again = islice(load.prompts(0), 12)
    assert all(np.array_equal(one, other) for one, other in zip(prompts, again, strict=True))
    heads = {one[: load.shared_tokens].tobytes() for one in prompts}
    assert 1 < len(heads) < len(prompts)
    assert len({one[: load.shared_tokens + 5].tobytes() for one in prompts}) == len(prompts)


def test_distinct_prompts_differ_in_their_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few windows that all of them recur.
    monkeypatch.setattr(workload, "TEXT", 400)
    prompts = list(islice(distinct_prompts(100, 0), 40_000))
    assert len({one[:16].tobytes() for one in prompts}) == len(prompts)
    assert all(one.dtype == np.int32 and one.min() >= 0 for one in prompts[::1000])


@pytest.mark.parametrize("seed", range(20))
def test_the_page_cache_evicts_the_far_end_of_what_was_not_used_for_longest(seed: int) -> None:
    source = random.Random(seed)
    capacity = source.randint(6, 30)
    cache = PageCache(capacity)
    in_order_of_use: OrderedDict[int, None] = OrderedDict()
    for _ in range(200):
        choices = "".join(source.choices("ab", k=source.randint(1, 6)))
        prompt = [hash(choices[: end + 1]) for end in range(len(choices))]
        assert cache.held(prompt) == sum(page in in_order_of_use for page in prompt)
        entered = [page for page in prompt if page not in in_order_of_use]
        for page in reversed(prompt):
            in_order_of_use[page] = None
            in_order_of_use.move_to_end(page)
        gone = {in_order_of_use.popitem(last=False)[0] for _ in range(len(in_order_of_use) - capacity)}
        stored, evicted = cache.use(prompt)
        assert stored == entered
        assert len(evicted) == len(gone)
        assert set(evicted) == gone
        assert cache.pages == set(in_order_of_use)


def test_a_request_is_reported_as_an_engine_would() -> None:
    replica = FakeReplica(0, page_size=16, capacity_pages=2000)
    flight = make_flight("a", np.arange(20_000, dtype=np.int32), np.arange(43, dtype=np.int32), 16)
    events = [*replica.prefill(flight), *replica.decode(flight, 1), *replica.finish(flight)]
    progress = [event for event in events if isinstance(event, Progressed)]
    assert [event.computed_tokens for event in progress] == [8192, 16384, 20_000, 20_001, 20_042]
    assert [token for event in progress for token in event.new_tokens] == list(range(43))
    for _ in range(11):
        events += replica.decode(make_flight("b", np.arange(32, dtype=np.int32), np.arange(9, dtype=np.int32), 16), 1)
    (step,) = (event for event in events if isinstance(event, StepTimed))
    assert (step.new_tokens, step.decodes) == (20_042 + 11, 12)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_requests_end_and_the_scheduler_knows_what_the_replicas_hold(policy: str) -> None:
    scheduler = GlobalScheduler(replicas=3, capacity_tokens=3200, page_size=16, policy=policy, seed=0)
    prompts = islice(SMALL.prompts(1), 300)
    traffic = Traffic(scheduler, prompts, replicas=3, page_size=16, capacity_tokens=3200)
    times = [traffic.run(150), traffic.run(100, streamed=True), traffic.run(1000)]
    assert [len(one.whole) for one in times] == [150, 100, 50]
    traffic.drain()
    assert traffic.finished == traffic.submitted == 300
    assert not scheduler.waiting
    scheduler.check()
    for replica in traffic.replicas:
        assert not scheduler.in_flight(replica.number)
        assert scheduler.resident_pages(replica.number) == replica.cache.pages
    assert 0 < traffic.hit_rate < 1
    for one in times:
        assert (one.whole >= one.submit).all()
        assert (one.submit > 0).all()


def test_rates_and_percentiles() -> None:
    values = np.array([4_000, 1_000, 2_000, 3_000])
    assert [percentile(values, cut) for cut in (0.25, 0.5, 0.99, 1.0)] == [1_000, 2_000, 4_000, 4_000]
    assert Times(values, values, values, values).per_second == 400_000


def test_a_ratio_compares_within_a_round() -> None:
    # A round in which the whole machine was slow does not count against anybody.
    paces = {"preble": (10.0, 100.0, 10.0), "dynamo": (35.0, 350.0, 1.0)}
    rounds = {name: [Pace(one, 2 * one, one, 2 * one, 0.5) for one in values] for name, values in paces.items()}
    result = ContestResult(2_000, rounds)
    assert result.ratio("dynamo", lambda one: one.decision) == 3.5
    assert result.met is True
    assert ContestResult(2_000, {"preble": rounds["preble"]}).met is None
    rounds["dynamo"][0] = replace(rounds["dynamo"][0], decision=20.0)
    assert result.met is False


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(words)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan, "QUICK", TINY)
    out = tmp_path / "results" / "sched.json"
    assert suite.run(arguments("--quick", "--peer-python", "no-such-python", "--json", str(out))) == 0
    document = json.loads(out.read_text())
    assert document["settings"]["plan"]["distinct"] == 250
    assert [(one["workload"]["name"], one["page_size"], one["output_events"]) for one in document["workloads"]] == [
        (name, page_size, told)
        for page_size in (16, 64)
        for name in ("small", "longer")
        for told in ("two per request", "one per token")
    ]
    assert [one["met"] for one in document["workloads"]] == [True, True, False, False] * 2
    for one in document["workloads"]:
        assert len(one["rounds"]) == TINY.rounds
        for summary in one["rounds"]:
            assert 0 < summary["submit_p50"] <= summary["submit_p99"] <= summary["submit_max"] < summary["whole_max"]
        assert 0 < one["hit_rate"] < 1
    fleets = document["replicas"]
    for what in ("whole", "submit"):
        few, many = fleets[f"{what}_microseconds"].values()
        assert len(few) == len(many) == TINY.rounds
        assert min(many) / max(few) <= fleets[f"{what}_ratio"] <= max(many) / min(few)
    flat = document["flat"]
    assert [one["prompts"] for one in flat["segments"]] == [100, 200, 250]
    assert flat["ratio"] == flat["segments"][-1]["microseconds"] / flat["segments"][0]["microseconds"]
    assert flat["memory_met"] is True
    # A request fills three pages of 64. None is forgotten yet, and the last 8 prompts are not computed.
    assert [one["tree_pages"] for one in flat["segments"]] == [300, 600, 750]
    assert [one["bound_pages"] for one in flat["segments"]] == [3 * (92 + 100), 3 * (192 + 200), 3 * (242 + 250)]
    assert [one["policy"] for one in document["policies"]] == list(POLICIES)
    peers = document["peers"]
    assert list(peers["skipped"]) == list(PEERS)
    (contest,) = peers["results"]
    assert (contest["prompt_tokens"], contest["met"]) == (100, None)
    assert len(contest["rounds"]["preble"]) == TINY.rounds
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == len(PEERS)
    assert "no-such-python" in printed
    assert "Ray" not in printed


def test_one_part_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "QUICK", TINY)
    out = tmp_path / "sched.json"
    assert suite.run(arguments("--quick", "--part", "flat", "--json", str(out))) == 0
    document = json.loads(out.read_text())
    assert document["flat"]["memory_met"] is True
    assert document.keys().isdisjoint({"workloads", "replicas", "policies", "peers"})


def test_a_peer_reads_the_very_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = np.stack(list(islice(SMALL.prompts(2), 4)))
    prompts.tofile(tmp_path / "prompts")
    case = {
        "prompt_tokens": 200,
        "file": "prompts",
        "fill": 1,
        "vocabulary": 32_000,
        "replicas": 8,
        "page_size": 16,
        "capacity_tokens": 1000,
        "in_flight": 2,
        "queued": 1,
        "output_tokens": OUTPUT_TOKENS,
    }
    (tmp_path / worker.CASES).write_text(json.dumps([case]))
    seen: list[list[int]] = []

    def run(case: worker.Case, prompts: list[list[int]]) -> worker.Tally:
        seen.extend(prompts)
        return worker.Tally([case.fill], [7], [2], [9], 0.5)

    monkeypatch.setattr(sys, "argv", ["peer", str(tmp_path)])
    worker.serve(lambda: worker.Peer({"a": "1"}, {}, run))
    assert seen == prompts.tolist()
    assert json.loads((tmp_path / worker.ANSWER).read_text()) == {
        "versions": {"a": "1"},
        "settings": {},
        "tallies": [{"decision": [1], "whole": [7], "decision_wall": [2], "whole_wall": [9], "hit_rate": 0.5}],
    }


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_fails_says_why(peer: str, tmp_path: Path) -> None:
    # Without its package it cannot be loaded; with it, there are no cases in the folder.
    with pytest.raises(PeerFailed, match=rf"{peer} ended: .*(No module named|{worker.CASES})"):
        run_peer(peer, sys.executable, tmp_path)


def test_bad_arguments() -> None:
    with pytest.raises(InvalidRequest, match="--peers"):
        suite.run(arguments("--peers", "dynamo,vllm"))
