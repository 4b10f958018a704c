"""E2's choice and its load cost, rule by rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from e2_paper_world import DOCUMENT, PerToken, World, ask, tokens

from preble.sched import Admitted, Finished, Progressed

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
    for _ in range(3):
        world.start(world.submit(tokens(10_000, 600)))
    world.run(tokens(20_000, 300))
    (candidate,) = world.scheduler.explain(tokens(1, 200), now=0.0, expected_tokens=1).candidates
    # 60 pages and three outputs are in use, 30 are idle: 14 must go for 20 and an output, all of them of one use.
    assert candidate.costs["eviction_seconds"] == pytest.approx(0.14)


def test_the_price_moves_on_with_every_eviction() -> None:
    world = World(1, capacity_tokens=10_000)
    prompts = [tokens(10_000 * number, 100) for number in range(1, 101)]
    for number, prompt in enumerate(prompts):
        for _ in range(number % 5 + 1):
            world.run(prompt)
    for number, prompt in enumerate(prompts[:10]):
        costs = world.scheduler.explain(tokens(1, 99), now=0.0, expected_tokens=1).candidates[0].costs
        assert costs["eviction_seconds"] == pytest.approx(0.1 * (number % 5 + 1))
        world.evict(0, prompt)
        world.run(tokens(5_000_000 + 10_000 * number, 100))


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
    for number in range(30):
        world.run(tokens(500_000 + 10_000 * number, 100))
    for number in range(4):
        placement = world.submit(ask(number), expected_tokens=None)
        world.start(placement)
        world.scheduler.apply(Progressed(0, placement.request_id, 1108, tuple(range(8))), now=0.0)
        world.scheduler.apply(Finished(0, placement.request_id), now=0.0)
    before = world.books(0).window_decode_seconds
    world.submit(ask(10), expected_tokens=None)
    assert world.books(0).window_decode_seconds - before == pytest.approx(9 * 0.5)


# Explaining


def test_an_explanation_has_the_terms_of_every_replica() -> None:
    world = World(2)
    home = world.run(DOCUMENT).replica
    explanation = world.scheduler.explain(ask(1), now=0.0)
    assert (explanation.replica, explanation.reason) == (home, "exploit")
    terms = {"load_seconds", "prefill_seconds", "wait_seconds", "eviction_seconds", "preference_seconds"}
    assert all(set(one.costs) == terms for one in explanation.candidates)
    assert "prefill_seconds" in str(explanation)
    placement = world.submit(ask(1))
    assert set(placement.costs) <= terms
    assert placement.costs["prefill_seconds"] == pytest.approx(0.1)
