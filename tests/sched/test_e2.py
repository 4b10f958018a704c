"""E2, rule by rule, on a scheduler whose replicas compute a thousand tokens per second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from preble.sched import (
    E2,
    Admitted,
    CostModel,
    Evicted,
    Finished,
    GlobalScheduler,
    Placement,
    Progressed,
    ReplicaView,
    Stored,
    Waiting,
)
from preble.sched.hashing import page_hashes

PAGE = 10


class PerToken(CostModel):
    """So many seconds per token, and nothing else."""

    name = "per-token"

    def __init__(self, prefill: float = 0.001, decode: float = 0.0) -> None:
        self.prefill, self.decode = prefill, decode

    def step_seconds(self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int) -> float:
        return self.prefill * sum(new for new, _ in prefills) + self.decode * decodes


class World:
    """A scheduler and replicas that do at once what they are told to."""

    def __init__(self, replicas: int = 2, *, cost: CostModel | None = None, seed: int = 0, **switches: Any) -> None:
        capacity = switches.pop("capacity_tokens", 1_000_000)
        window = switches.pop("window", 100.0)
        self.policy = E2(**switches)
        self.now = 0.0
        self.scheduler = GlobalScheduler(
            replicas,
            capacity_tokens=capacity,
            page_size=PAGE,
            policy=self.policy,
            cost=cost or PerToken(),
            seed=seed,
            window=window,
        )
        self.submitted = 0
        self.sequences: Counter[int] = Counter()
        self.prompts: dict[str, list[int]] = {}

    def submit(self, prompt: list[int], **options: Any) -> Placement:
        answer = self.try_to(prompt, **options)
        assert isinstance(answer, Placement)
        return answer

    def try_to(self, prompt: list[int], **options: Any) -> Placement | Waiting:
        self.submitted += 1
        options = {"expected_tokens": 1, **options}
        answer = self.scheduler.submit(f"r{self.submitted}", prompt, now=self.now, **options)
        self.prompts[answer.request_id] = prompt
        return answer

    def start(self, placement: Placement) -> list[Placement]:
        """Admit the request and compute its prompt, and a first token."""
        replica, name, prompt = placement.replica, placement.request_id, self.prompts[placement.request_id]
        self.scheduler.apply(Admitted(replica, name, placement.cached_tokens), now=self.now)
        self.store(replica, prompt)
        return self.scheduler.apply(Progressed(replica, name, len(prompt), (7,)), now=self.now)

    def finish(self, placement: Placement) -> list[Placement]:
        released = self.start(placement)
        return released + self.scheduler.apply(Finished(placement.replica, placement.request_id), now=self.now)

    def run(self, prompt: list[int], **options: Any) -> Placement:
        placement = self.submit(prompt, **options)
        self.finish(placement)
        return placement

    def store(self, replica: int, prompt: list[int]) -> None:
        self.sequences[replica] += 1
        self.scheduler.apply(Stored(replica, self.sequences[replica], "", names(prompt)), now=self.now)

    def evict(self, replica: int, prompt: list[int], first_page: int = 0) -> None:
        self.sequences[replica] += 1
        event = Evicted(replica, self.sequences[replica], "", names(prompt)[first_page:])
        self.scheduler.apply(event, now=self.now)

    def load(self, replica: int) -> float:
        books = self.books(replica)
        return books.window_prefill_seconds + books.window_decode_seconds

    def books(self, replica: int) -> ReplicaView:
        return next(one for one in self.scheduler.replicas if one.replica == replica)


def names(prompt: list[int]) -> np.ndarray:
    return page_hashes(np.array(prompt, np.int32), PAGE)


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


DOCUMENT = tokens(1000, 1000)


def ask(number: int, length: int = 100, document: list[int] = DOCUMENT) -> list[int]:
    """The document and a question of its own."""
    return document + tokens(10_000 * (number + 1), length)


# Exploit or explore


def test_more_cached_than_missed_exploits_and_less_explores() -> None:
    world = World(4)
    home = world.run(ask(0)).replica
    exploiting = world.submit(ask(1, 999))
    assert (exploiting.replica, exploiting.reason, exploiting.cached_tokens) == (home, "exploit", 1000)
    exploring = world.submit(ask(2, 1000))
    assert (exploring.reason, exploring.cached_tokens) == ("explore", 0)
    assert exploring.replica != home, "the others have less load, and the match is no longer than the rest"


def test_an_exact_repeat_is_a_hit() -> None:
    world = World(4)
    home = world.run(DOCUMENT).replica
    again = world.submit(DOCUMENT)
    assert (again.replica, again.reason, again.cached_tokens) == (home, "exploit", 1000)
    assert again.costs["prefill_seconds"] == pytest.approx(0.001), "its last token is computed"


def test_of_several_holders_the_one_with_the_least_load_is_exploited() -> None:
    world = World(3)
    homes = [0, 2]
    world.run(DOCUMENT)
    for replica in homes:
        world.store(replica, DOCUMENT)
    loads = {replica: world.load(replica) for replica in homes}
    placement = world.submit(ask(1))
    assert placement.replica in (replica for replica in homes if loads[replica] == min(loads.values()))
    assert placement.reason == "exploit"


def test_what_everybody_has_carries_no_signal() -> None:
    world = World(3)
    for number in range(3):
        world.run(tokens(100_000 * (number + 1), 500))
    busiest = world.run(tokens(900_000, 700)).replica
    for replica in range(3):
        world.store(replica, DOCUMENT)
    world.run(DOCUMENT)
    loads = {replica: world.load(replica) for replica in range(3)}
    placement = world.submit(ask(1))
    assert placement.reason == "explore"
    assert loads[placement.replica] == min(loads.values())
    assert placement.replica != busiest


def test_cold_prompts_spread_out_and_ties_are_drawn() -> None:
    world = World(4)
    counts = Counter(world.submit(tokens(10_000 * number, 400)).replica for number in range(1, 41))
    assert set(counts.values()) == {10}
    assert {World(4, seed=seed).submit(DOCUMENT).replica for seed in range(40)} == {0, 1, 2, 3}
    assert [World(4, seed=3).submit(DOCUMENT).replica for _ in range(3)] == [
        World(4, seed=3).submit(DOCUMENT).replica
    ] * 3


# The load cost


def test_load_is_the_prefill_and_decode_time_of_the_window() -> None:
    world = World(1, cost=PerToken(0.001, 0.5))
    world.submit(tokens(10_000, 400), expected_tokens=6)
    assert world.books(0).window_prefill_seconds == pytest.approx(0.4)
    assert world.books(0).window_decode_seconds == pytest.approx(6 * 0.5), "alone, each step is all its own"
    world.now = 60.0
    world.submit(tokens(20_000, 300), expected_tokens=2)
    assert world.load(0) == pytest.approx(0.4 + 3 + 0.3 + 1)
    world.now = 100.5
    world.scheduler.poll(world.now)
    assert world.load(0) == pytest.approx(0.3 + 1), "the first was placed before the window"
    world.scheduler.check()


def test_what_the_replica_reports_corrects_the_load() -> None:
    world = World(1, cost=PerToken(0.001, 0.5))
    placement = world.submit(DOCUMENT, expected_tokens=10)
    assert world.load(0) == pytest.approx(1 + 5)
    world.scheduler.apply(Admitted(0, placement.request_id, 600), now=0.0)
    assert world.load(0) == pytest.approx(0.4 + 5)
    world.scheduler.apply(Progressed(0, placement.request_id, 1002, (1, 2, 3)), now=0.0)
    world.scheduler.apply(Finished(0, placement.request_id), now=0.0)
    assert world.load(0) == pytest.approx(0.4 + 1.5), "three tokens rather than ten"


def test_exploring_counts_what_is_missing_on_each_replica() -> None:
    world = World(2)
    world.run(tokens(500_000, 300))
    first = next(one for one in (0, 1) if world.load(one) == 0)
    world.store(1 - first, DOCUMENT)
    world.submit(DOCUMENT[:10])  # so that the tree knows the tokens
    placement = world.submit(ask(1, 1000))
    assert placement.reason == "explore"
    assert placement.replica == 1 - first, "0.3 s of load there, against 1 s of prefill saved"


def test_a_faster_replica_gets_more() -> None:
    world = World(1, cost=PerToken(0.001))
    fast = world.scheduler.add_replica(cost=PerToken(0.00025))
    counts = Counter(world.submit(tokens(10_000 * number, 100)).replica for number in range(1, 101))
    assert counts[fast] == pytest.approx(80, abs=2)


# Eviction


def filled(popularity: tuple[int, int], **switches: Any) -> World:
    """Two replicas with room for 1,200 tokens: each holds a prompt of 1,000 that so many requests have used."""
    world = World(2, capacity_tokens=1200, rebalancing=False, patience=float("inf"), **switches)
    for replica, uses in enumerate(popularity):
        prompt = tokens(100_000 * (replica + 1), 1000)
        world.store(replica, prompt)
        assert {world.run(prompt).replica for _ in range(uses)} == {replica}
    return world


def test_the_price_of_an_eviction_is_recomputation_times_uses() -> None:
    world = filled((3, 1))

    def price() -> dict[int, float]:
        candidates = world.scheduler.explain(tokens(1, 400), now=world.now, expected_tokens=1).candidates
        return {one.replica: one.costs["eviction_seconds"] for one in candidates}

    assert price() == pytest.approx({0: 3 * 0.21, 1: 0.21}), "21 pages must go for 400 tokens and an output"
    world.evict(0, tokens(100_000, 1000), first_page=90)
    assert price()[0] == pytest.approx(3 * 0.11)
    world.evict(0, tokens(100_000, 1000), first_page=50)
    assert price()[0] == 0, "there is room now"
    world.now = 101.0
    world.scheduler.poll(world.now)
    world.evict(1, tokens(200_000, 1000), first_page=99)
    assert price()[1] == 0, "nobody used it within the window"


@pytest.mark.parametrize("counted", [True, False])
def test_eviction_cost_decides_when_loads_are_close(counted: bool) -> None:
    world = filled((5, 1), eviction_cost=counted)
    assert world.run(tokens(900_000, 10)).replica == 1, "the fewest exact repeats are the least load"
    assert world.load(0) < world.load(1)
    assert world.submit(tokens(1, 400)).replica == (1 if counted else 0)


def test_pages_of_running_requests_are_not_for_eviction() -> None:
    world = World(1, capacity_tokens=1000)
    world.start(world.submit(tokens(10_000, 600)))
    world.run(tokens(20_000, 300))
    (candidate,) = world.scheduler.explain(tokens(1, 300), now=0.0).candidates
    # 600 in use, of 300 idle ones 200 must go for 300 and an output: at most those can be paid for.
    assert 0.2 <= candidate.costs["eviction_seconds"] <= 0.3


# Rebalancing


def overload(**switches: Any) -> tuple[World, int, int]:
    """Three replicas of which one has all documents; returns it, and the one with the least to do."""
    world = World(3, cost=PerToken(0.01), patience=float("inf"), late_binding=False, autoscaling=False, **switches)
    home = world.run(DOCUMENT).replica
    loads = {home}
    for length in (200, 300):  # so that the other two have loads of 2 and 3 s
        loads.add(world.run(tokens(900_000 + 1000 * length, length)).replica)
    assert loads == {0, 1, 2}
    light = min(range(3), key=world.load)
    for number in range(50, 62):
        assert world.run(ask(number, 200)).replica == home
    return world, home, light


def test_what_would_exploit_a_heavy_replica_goes_to_the_light_one_until_the_gap_closes() -> None:
    world, home, light = overload()
    before = world.submit(ask(10))
    assert (before.replica, before.reason) == (home, "exploit"), "nobody has looked yet"
    world.now = 1.0
    moved = world.submit(ask(11))
    assert (moved.replica, moved.reason) == (light, "rebalance")
    reasons, gap = [], 0.0
    for number in range(40):
        world.now += 0.9
        gap = world.load(home) / min(map(world.load, range(3)))
        document = tokens(2_000_000 + 10_000 * number, 200)
        world.store(home, document)
        reasons.append(world.run(document + [number]).reason)
        if reasons[-1] == "exploit":
            break
    assert len(reasons) > 5
    assert set(reasons[:-1]) == {"rebalance"}
    assert gap < 1.5


def test_rebalancing_has_a_threshold_and_a_switch() -> None:
    for switches in ({"rebalancing": False}, {"th_bal": 30.0}):
        world, home, _ = overload(**switches)
        world.now = 1.0
        assert world.submit(ask(11)).replica == home


def test_an_idle_cluster_is_in_balance_whatever_the_ratio() -> None:
    world = World(2)
    home = world.run(DOCUMENT[:100]).replica
    world.now = 2.0
    assert world.submit(DOCUMENT[:100]).replica == home


def test_rebalancing_forgets_a_replica_that_leaves() -> None:
    world, home, light = overload()
    world.now = 1.0
    assert world.submit(ask(11)).replica == light
    world.scheduler.remove_replica(light, now=1.0)
    assert world.submit(ask(12)).replica != light
    world.scheduler.check()


# Autoscaling of a prefix


def hot(replicas: int = 3, **switches: Any) -> tuple[World, int]:
    """A document whose requests queued 0.5 s in one half window, and 4 s in the next."""
    world = World(replicas, window=40.0, patience=float("inf"), rebalancing=False, late_binding=False, **switches)
    home = world.run(ask(0)).replica
    wait_for(world, 0.5, first=1)
    world.now = 25.0
    wait_for(world, 4.0, first=20)
    return world, home


def wait_for(world: World, seconds: float, first: int) -> None:
    placements = [world.submit(ask(first + number)) for number in range(10)]
    world.now += seconds
    for placement in placements:
        world.finish(placement)


def test_a_prefix_whose_queueing_time_doubles_gets_one_copy_per_half_window() -> None:
    world, home = hot()
    copied = world.submit(ask(40))
    assert copied.reason == "replicate"
    assert copied.replica != home
    assert copied.cached_tokens == 0
    world.finish(copied)
    assert world.submit(ask(41)).reason == "exploit", "one per half window"
    world.scheduler.check()


@pytest.mark.parametrize("switches", [{"autoscaling": False}, {"th_auto": 10.0}])
def test_autoscaling_has_a_threshold_and_a_switch(switches: dict[str, Any]) -> None:
    world, home = hot(**switches)
    assert (world.submit(ask(40)).reason, world.submit(ask(41)).replica) == ("exploit", home)


def test_waiting_less_than_a_copy_costs_makes_no_copy() -> None:
    world = World(2, window=40.0, patience=float("inf"), rebalancing=False)
    home = world.run(ask(0)).replica
    wait_for(world, 0.01, first=1)
    world.now = 25.0
    wait_for(world, 0.5, first=20)
    assert (world.submit(ask(40)).replica, world.submit(ask(41)).reason) == (home, "exploit")


def test_a_copy_retires_when_the_prefix_cools_and_comes_back_first_when_it_is_hot_again() -> None:
    world, home = hot()
    copy = world.run(ask(40)).replica
    world.now = 45.0
    wait_for(world, 0.01, first=50)
    world.run(ask(70))
    assert {world.run(ask(number)).replica for number in range(71, 90)} == {home}, "the copy is there, and not used"
    world.now = 65.0
    wait_for(world, 5.0, first=100)
    again = world.submit(ask(140))
    assert (again.replica, again.reason, again.cached_tokens) == (copy, "replicate", 1000)


# Leaving a replica that is too busy


def busy_home(**switches: Any) -> tuple[World, int]:
    """The document's replica has 0.5 s of prefill queued behind it."""
    world = World(2, rebalancing=False, autoscaling=False, **switches)
    home = world.run(DOCUMENT).replica
    for number in range(5):
        assert world.submit(ask(number, 100)).replica == home
    return world, home


def test_a_replica_is_left_when_waiting_costs_more_than_computing_again() -> None:
    world, home = busy_home()
    assert world.books(home).queued_prefill_seconds == pytest.approx(0.5)
    stays = world.submit(ask(10, 10))
    assert (stays.replica, stays.reason) == (home, "exploit"), "0.5 s of waiting against 1 s of prefill"
    for number in range(11, 27):
        stays = world.submit(ask(number, 100))
    assert (stays.replica, stays.reason) == (1 - home, "relieve"), "more than twice what computing it again costs"
    assert world.books(home).queued_prefill_seconds == pytest.approx(2.0, abs=0.15)


def test_endless_patience_never_leaves() -> None:
    world, home = busy_home(patience=float("inf"), late_binding=False)
    assert {world.submit(ask(number, 100)).replica for number in range(10, 60)} == {home}


# Preferences


def test_exploring_prefers_a_replica_that_mostly_decodes_but_not_at_any_price() -> None:
    def world_with(prefill: int) -> tuple[World, int, int]:
        world = World(2, cost=PerToken(0.001, 0.01))
        reading = world.submit(tokens(10_000, 1000), expected_tokens=1).replica
        writing = world.submit(tokens(20_000, 10), expected_tokens=prefill).replica
        assert reading != writing
        return world, reading, writing

    world, _, writing = world_with(108)  # 1.09 s of load against 1.01 s
    assert world.submit(tokens(30_000, 400)).replica == writing, "0.08 s more load, and a preference of 0.1 s"
    world, reading, _ = world_with(130)
    assert world.submit(tokens(30_000, 400)).replica == reading, "0.3 s more load is too much"
    world, reading, writing = world_with(108)
    world.policy.prefill_decode_balance = False
    assert world.submit(tokens(30_000, 400)).replica == reading


def test_a_session_stays_where_it_was_among_equals() -> None:
    for seed in range(8):
        world = World(4, seed=seed)
        home = world.run(tokens(10_000, 100), session="chat").replica
        for number in range(1, 4):
            world.run(tokens(20_000 * number, 100))
        assert len({world.load(replica) for replica in range(4)}) == 1
        assert world.submit(tokens(90_000, 100), session="chat").replica == home
        assert world.submit(tokens(95_000, 100), session="other", namespace="n").replica != home


def test_expected_output_is_learned_per_prefix() -> None:
    world = World(1, cost=PerToken(0.001, 0.5))
    for number in range(4):
        placement = world.submit(ask(number), expected_tokens=None)
        world.start(placement)
        world.scheduler.apply(Progressed(0, placement.request_id, 1108, tuple(range(8))), now=0.0)
        world.scheduler.apply(Finished(0, placement.request_id), now=0.0)
    before = world.books(0).window_decode_seconds
    world.submit(ask(10), expected_tokens=None)
    assert world.books(0).window_decode_seconds - before == pytest.approx(9 * 0.5)


# Late binding


def test_when_every_replica_is_saturated_requests_wait_in_order() -> None:
    world = World(2)
    placed = [world.submit(tokens(10_000 * number, 3000)) for number in range(1, 5)]
    assert Counter(one.replica for one in placed) == {0: 2, 1: 2}
    late = [world.try_to(tokens(10_000 * number, 100), priority=number % 2) for number in range(10, 14)]
    assert [one.reason for one in late if isinstance(one, Waiting)] == [
        "every replica is busy",
        *["others wait before it"] * 3,
    ]
    released = world.finish(placed[0])
    assert {one.replica for one in released} == {placed[0].replica}
    assert [one.request_id for one in released] == ["r6", "r8", "r5", "r7"], "priority, then age"
    world.scheduler.check()


def test_without_late_binding_nothing_waits() -> None:
    world = World(2, late_binding=False)
    assert all(isinstance(world.try_to(tokens(10_000 * n, 5000)), Placement) for n in range(1, 20))


def test_a_saturated_holder_is_left_for_a_free_replica() -> None:
    world = World(2, patience=float("inf"), rebalancing=False)
    home = world.run(DOCUMENT).replica
    big = [world.submit(ask(number, 900)) for number in range(5)]
    assert {one.replica for one in big} == {home}
    other = world.submit(ask(10))
    assert (other.replica, other.reason) == (1 - home, "relieve")


def test_a_replica_without_room_for_more_pages_gets_nothing_while_requests_queue_there() -> None:
    world = World(1, capacity_tokens=1000, cost=PerToken(0.0))
    first = [world.submit(tokens(10_000 * number, 400)) for number in range(1, 4)]
    waiting = world.try_to(tokens(90_000, 400))
    assert isinstance(waiting, Waiting)
    assert world.start(first[0]) == [], "nothing has left"
    assert [one.request_id for one in world.finish(first[0])] == [waiting.request_id]


# Explaining


def test_an_explanation_has_the_terms_of_every_replica() -> None:
    world = World(2)
    home = world.run(DOCUMENT).replica
    explanation = world.scheduler.explain(ask(1), now=0.0)
    assert (explanation.replica, explanation.reason) == (home, "exploit")
    terms = {"load_seconds", "prefill_seconds", "queued_seconds", "eviction_seconds", "preference_seconds"}
    assert all(set(one.costs) == terms for one in explanation.candidates)
    assert "prefill_seconds" in str(explanation)
    placement = world.submit(ask(1))
    assert set(placement.costs) <= terms
    assert placement.costs["prefill_seconds"] == pytest.approx(0.1)
