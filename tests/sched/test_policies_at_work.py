"""Every policy in the scheduler that it was made for."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from preble.sched import POLICIES, Admitted, Finished, GlobalScheduler, Placement, Policy, Progressed, Stored
from preble.sched.hashing import namespace_salt, page_hashes
from preble.sched.policies.dynamo import Dynamo
from preble.sched.policies.llm_d import LlmD

PAGE = 16
PREFIX = list(range(640))


class Fleet:
    """A scheduler, and replicas that compute a prompt as soon as they are told to."""

    def __init__(self, policy: str | Policy, replicas: int = 4, seed: int = 0) -> None:
        self.scheduler = GlobalScheduler(
            replicas, capacity_tokens=50_000, page_size=PAGE, policy=policy, cost="mistral-7b-a6000", seed=seed
        )
        self.now = 0.0
        self.prompts: dict[str, list[int]] = {}
        self.stored = Counter[int]()

    def submit(self, prompt: list[int], **options: Any) -> Placement:
        """The next request."""
        self.now += 0.02
        name = str(len(self.prompts))
        self.prompts[name] = prompt
        placement = self.scheduler.submit(name, prompt, now=self.now, **options)
        assert isinstance(placement, Placement)
        return placement

    def compute(self, placement: Placement) -> None:
        """The prompt is computed and in the cache; the first token is there."""
        replica, name = placement.replica, placement.request_id
        prompt = self.prompts[name]
        self.stored[replica] += 1
        pages = page_hashes(np.array(prompt, np.int32), PAGE, base=namespace_salt(""))
        for event in (
            Admitted(replica, name, placement.cached_tokens),
            Stored(replica, self.stored[replica], "", pages),
            Progressed(replica, name, len(prompt), (7,)),
        ):
            assert self.scheduler.apply(event, now=self.now) == []

    def finish(self, placement: Placement) -> None:
        """The request ended."""
        assert self.scheduler.apply(Finished(placement.replica, placement.request_id), now=self.now) == []

    def in_flight(self) -> list[int]:
        """Requests in flight, by replica."""
        return [books.in_flight for books in self.scheduler.replicas]


def history(policy: str, *, explain: bool) -> list[Placement]:
    """What becomes of 150 requests with six prefixes, of which about twelve are in flight at a time."""
    fleet, chance = Fleet(policy, seed=5), random.Random(5)
    placements: list[Placement] = []
    running: list[Placement] = []
    for turn in range(150):
        kind = chance.randrange(6)
        prompt = [kind] * (kind * 100) + [chance.randrange(1000) for _ in range(chance.randrange(1, 200))]
        if explain:
            foreseen = fleet.scheduler.explain(prompt, now=fleet.now + 0.02)
        placements.append(fleet.submit(prompt))
        running.append(placements[-1])
        if explain:
            assert (foreseen.replica, foreseen.reason) == (placements[-1].replica, placements[-1].reason)
            terms = {candidate.replica: candidate.costs for candidate in foreseen.candidates}
            assert terms[placements[-1].replica].keys() >= placements[-1].costs.keys()
        fleet.compute(running[chance.randrange(len(running))])
        if len(running) > 12:
            fleet.finish(running.pop(chance.randrange(len(running))))
        if turn % 10 == 0:
            fleet.scheduler.check()
    fleet.scheduler.check()
    return placements


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_decides_the_same_whoever_asks_in_between(policy: str) -> None:
    placements = history(policy, explain=True)
    assert placements == history(policy, explain=False)
    assert {one.replica for one in placements} == {0, 1, 2, 3}
    assert all(one.reason and one.costs for one in placements)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"round-robin", "least-loaded"}))
def test_idle_replicas_follow_the_prefix(policy: str) -> None:
    fleet = Fleet(policy)
    first = fleet.submit([*PREFIX, 1, 2, 3])
    fleet.compute(first)
    fleet.finish(first)
    for last in range(20):
        again = fleet.submit([*PREFIX, last])
        assert (again.replica, again.cached_tokens) == (first.replica, 640)
        fleet.compute(again)
        fleet.finish(again)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_cold_burst_spreads(policy: str) -> None:
    fleet = Fleet(policy)
    for number in range(40):
        fleet.submit([number] * 300)
    assert fleet.in_flight() == [10, 10, 10, 10]


def test_sglang_gives_cold_prompts_one_by_one_to_the_first() -> None:
    fleet = Fleet("sglang")
    for number in range(20):
        cold = fleet.submit([number] * 300)
        assert cold.replica == 0
        fleet.compute(cold)
        fleet.finish(cold)


def test_dynamo_spreads_repeats_only_if_it_counts_requests() -> None:
    for policy, expected in ((Dynamo(), 1), (Dynamo(decode_active_request_weight=64), 4)):
        fleet = Fleet(policy)
        for _ in range(8):
            fleet.compute(fleet.submit(PREFIX, expected_tokens=PAGE))
        assert sum(count > 0 for count in fleet.in_flight()) == expected


def test_llm_d_leaves_the_holder_when_it_is_saturated() -> None:
    fleet = Fleet(LlmD(max_ttft_penalty_ms=500))
    fleet.compute(fleet.submit(PREFIX * 4))
    reasons = [fleet.submit([*PREFIX * 4, *[9000 + number] * 600]).reason for number in range(40)]
    assert reasons[0] == "exploit"
    assert "saturated" in reasons
    assert min(fleet.in_flight()) > 0


def test_ray_draws_two_when_the_holders_queue_is_too_long() -> None:
    fleet = Fleet("ray")
    assert [fleet.submit([*PREFIX, number]).reason for number in range(11)] == ["explore"] + ["exploit"] * 10
    assert sorted(fleet.in_flight()) == [0, 0, 0, 11]
    assert [fleet.submit([*PREFIX, 50 + number]).reason for number in range(2)] == ["power-of-two"] * 2


def test_pmc_copies_a_prefix_that_has_become_too_hot() -> None:
    fleet = Fleet("pmc")
    first = fleet.submit([*PREFIX * 2, 1])
    fleet.compute(first)
    assert fleet.submit([*PREFIX * 2, 2]).replica == first.replica
    for number in range(200):
        fleet.compute(fleet.submit([*PREFIX * 2, *[2000 + number] * 200]))
    loads = fleet.in_flight()
    assert min(loads) > 0.5 * max(loads)
