"""E2 on views made by hand: its score term by term, who has room, who waits, and why who is chosen."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_views import Asked, Books, Linear, Seen, Traffic, view
from test_policy_pmc import run, views
from test_policy_pmc import score as pmc_score

from preble.sched import E2, Choice, View
from preble.sched.policies.e2 import has_room
from preble.sched.policies.pmc import PMC

COST = Linear(step=1.0, per_token=0.01)
"""A step of 100 tokens takes 2 s."""
OMEGA = math.sqrt(0.5)


def costs(seen: View, index: int = 0, **switches: bool) -> dict[str, float]:
    return dict(E2(**switches).costs(seen, index))


def chosen(seen: View, **switches: bool) -> Choice:
    choice = E2(**switches).choose(seen)
    assert choice is not None
    return choice


def losing(seen: View, *recomputing: float) -> View:
    """The same, where the replicas must evict what takes so long to compute again."""
    assert isinstance(seen, Seen)
    seen.recomputing = recomputing
    return seen


def full(number: int = 0, **options: Any) -> Books:
    """A replica without room: three steps of 100 tokens, which take 6 s, are still to be computed."""
    return Books(number, 1, 300, cost=COST, **options)


# The score


def test_an_idle_replica_costs_the_requests_own_time() -> None:
    """150 tokens: steps of 100 and 50, 2 + 1.5 s; 10 tokens at 1.01 s."""
    found = costs(view([Books(cost=COST)], asked=Asked(150)))
    assert found == {
        "wait_seconds": pytest.approx(3.5),
        "pages_seconds": 0,
        "arrivals_seconds": 0,
        "stall_seconds": 0,
        "decode_seconds": pytest.approx(OMEGA * 10.1),
        "slowdown_seconds": 0,
        "copy_discount": 1,
        "score_seconds": pytest.approx(3.5 + OMEGA * 10.1),
        "eviction_seconds": 0,
        "shared_seconds": 0,
    }


def test_a_busy_replica_term_by_term() -> None:
    """20 of 25 requests decode, so steps compute 80 of the 100 tokens beside them and take 2 s.

    x = 190: steps of 80, 80 and 30, 2 + 2 + 1.5 = 5.5 s. 60 of 160 prompt tokens are cached; the 100 missed ones fill
    the last step up to 80 and another of 50: 2 + 2 + 2 + 1.7 = 7.7 s, so Δp = 2.2 s in one more step. A step of the
    decodes alone takes 1.2 s: Δs = 1.0 s. The 25 hold 1,000 tokens, and with 150 more 50 are lacking. What must be
    evicted takes 6 s to compute again.
    """
    busy = Books(cost=COST, in_flight=25, decoding=20, queued_prefill_tokens=190, unique_pages=100)
    busy.capacity_tokens = 1100
    asked, traffic = Asked(160, expected_tokens=50), Traffic(arrival_rate=3, mean_ttft=2, mean_latency=16)
    seen = losing(view([busy, Books(cost=COST)], [60, 0], asked=asked, traffic=traffic), 6.0, 0.0)
    omega = math.sqrt(2 / 18)
    decode = 50 * (1 + 26 * 0.01)
    expected = {
        "wait_seconds": 7.7,
        "pages_seconds": 50 * (5.5 + decode) / 1000,
        "arrivals_seconds": 2 * 3 / 2 * 7.7 * 2.2,
        "stall_seconds": omega * 25 * decode / (decode + 5.5) * 1.0,
        "decode_seconds": omega * decode,
        "slowdown_seconds": omega * 25 * 50 * 0.01,
        "eviction_seconds": 3.0,
    }
    expected["score_seconds"] = sum(expected.values())
    assert costs(seen) == pytest.approx({**expected, "copy_discount": 1, "shared_seconds": 0})
    assert costs(seen, 1)["eviction_seconds"] == 0


def hot(*recomputing: float) -> View:
    """5 requests share all of the prompt, which one busy replica holds: f = 1/5. The other one has 2 in flight, the
    holder 8, which leaves 3/4: φ = 1 / (1 + 4 · 3/4)."""
    replicas = [Books(cost=COST, in_flight=8), Books(cost=COST, in_flight=2)]
    return losing(view(replicas, [100, 0], traffic=Traffic(2, 1, 3), stretches=[(0, 100, 5, 1)]), *recomputing)


def test_a_copy_of_a_hot_prefix_is_an_investment() -> None:
    """It takes 2 s, of which the others take over three quarters."""
    plain, found = PMC().costs(hot(), 1), costs(hot(), 1)
    assert found["copy_discount"] == pytest.approx(1 / 4)
    assert found["arrivals_seconds"] == pytest.approx(2 * 1 * 2 * 2 / 4)
    assert found["shared_seconds"] == pytest.approx(2 * 3 / 4)
    assert found["score_seconds"] == pytest.approx(plain["score_seconds"] + 1 * 2 * 2 / 4 - 2 * 3 / 4)
    assert costs(hot(), 0)["shared_seconds"] == 0, "the holder makes no copy"


def test_a_copy_that_displaces_what_is_used_is_none() -> None:
    plain, found = PMC().costs(hot(0.0, 0.5), 1), costs(hot(0.0, 0.5), 1)
    assert (found["eviction_seconds"], found["shared_seconds"]) == (0.25, 0)
    assert found["score_seconds"] == pytest.approx(plain["score_seconds"] + 1 * 2 * 2 / 4 + 0.25)
    assert costs(hot(0.0, 0.5), 1, eviction_cost=False) == costs(hot(), 1)


def test_an_investment_decides() -> None:
    """The holder's backlog makes it a little cheaper to wait there, but for what others will share."""
    seen = hot()
    holder = seen.replicas[0]
    assert isinstance(holder, Books)
    holder.queued_prefill_tokens = 130
    plain = [PMC().costs(seen, index)["score_seconds"] for index in (0, 1)]
    assert plain[0] + costs(seen, 0)["arrivals_seconds"] / 2 < plain[1] + costs(seen, 1)["arrivals_seconds"] / 2
    assert chosen(seen).chosen == 1
    assert chosen(losing(seen, 0.0, 0.01)).chosen == 0


def test_an_investment_is_not_dismissed_for_its_own_prefill() -> None:
    """At the holder it is the 4 s of the backlog and 1.01 s; a copy takes 6 s, of which others take over 4.5."""
    replicas = [Books(cost=COST, in_flight=8, queued_prefill_tokens=200), Books(cost=COST, in_flight=2)]
    asked = Asked(300, expected_tokens=0.01)
    seen = view(replicas, [300, 0], asked=asked, traffic=Traffic(0, 1, 1e6), stretches=[(0, 300, 5, 1)])
    assert [costs(seen, index)["wait_seconds"] for index in (0, 1)] == [pytest.approx(5.01), pytest.approx(6)]
    assert costs(seen, 1)["shared_seconds"] == pytest.approx(4.5)
    assert chosen(seen).chosen == 1


@given(views(), st.lists(st.sampled_from([0.0, 0.5, 40.0]), min_size=4, max_size=4), st.booleans(), st.booleans())
def test_the_score_is_pmcs_with_arrivals_twice_and_what_is_lost_or_shared(
    seen: View, lost: list[float], eviction_cost: bool, late_binding: bool
) -> None:
    losing(seen, *lost)
    policy = E2(eviction_cost=eviction_cost, late_binding=late_binding)
    scores = []
    for index, replica in enumerate(seen.replicas):
        plain, found = PMC().costs(seen, index), policy.costs(seen, index)
        eviction = 0.5 * lost[index] if eviction_cost else 0.0
        new = max(seen.request.prompt_tokens - seen.matched[index], 1)
        cached = seen.request.prompt_tokens - new
        budget, backlog = max(replica.max_batched_tokens - replica.decoding, 1), replica.queued_prefill_tokens
        assert isinstance(replica.cost, Linear)
        before, after = (run(replica.cost, budget, replica.decoding, backlog, n, cached)[0] for n in (0, new))
        shared = 0.0 if eviction else (1 - plain["copy_discount"]) * (after - before)
        assert found["eviction_seconds"] == eviction
        assert found["shared_seconds"] == pytest.approx(shared, rel=5e-3)
        assert found["arrivals_seconds"] == pytest.approx(2 * plain["arrivals_seconds"])
        scores.append(pmc_score(seen, index) + plain["arrivals_seconds"] + eviction - shared)
        assert found["score_seconds"] == pytest.approx(scores[-1], rel=1e-2)
        others = plain.keys() - {"arrivals_seconds", "score_seconds"}
        assert {name: found[name] for name in others} == {name: plain[name] for name in others}
    choice = policy.choose(seen)
    if choice is None:
        assert late_binding
        near = [one for one, score in zip(seen.replicas, scores, strict=True) if score <= min(scores) * 1.02]
        assert not all(map(has_room, near))
        return
    assert scores[choice.chosen] <= min(scores) * 1.02
    assert choice.costs == policy.costs(seen, choice.chosen)
    assert has_room(seen.replicas[choice.chosen]) or not late_binding


# What it chooses


def test_what_must_be_evicted_decides_between_equals_unless_switched_off() -> None:
    """1 s more of what is lost is half a second more."""
    others = [Books(cost=COST, in_flight=1), Books(cost=COST)]
    slower = costs(view(others))["score_seconds"] - costs(view(others), 1)["score_seconds"]
    for lost, index in ((2 * slower + 0.1, 0), (2 * slower - 0.1, 1)):
        assert chosen(losing(view(others), 0.0, lost)).chosen == index
        assert chosen(losing(view(others), 0.0, lost), eviction_cost=False).chosen == 1


def test_a_replica_that_lost_on_eviction_is_not_remembered_as_best() -> None:
    replicas = [Books(cost=COST), Books(cost=COST), Books(cost=COST)]
    for lost in ((9.0, 0.0, 9.0), (9.0, 4.0, 0.0), (0.0, 9.0, 4.0)):
        assert chosen(losing(view(replicas), *lost)).chosen == lost.index(0.0)


def test_followers_decide_where_the_request_alone_would_not() -> None:
    """A backlog of 100 tokens on a fast replica beside an idle slow one: W = 4 and 3.9 s, Δp = 2 and 3.9 s. With 0.1
    arrivals per second there it is 0.8 s of others beside 1.52 s, twice; decoding takes less than one of them."""
    slow = Linear(step=1.9, per_token=0.02)
    replicas = [Books(0, 1, 100, cost=COST), Books(1, cost=slow)]
    for rate, expected in ((0.0, 1), (0.2, 0)):
        seen = view(replicas, asked=Asked(expected_tokens=0.01), traffic=Traffic(rate, 1, 1e6))
        assert costs(seen, 0)["arrivals_seconds"] == pytest.approx(2 * rate / 2 * 4 * 2)
        assert costs(seen, 1)["arrivals_seconds"] == pytest.approx(2 * rate / 2 * 3.9 * 3.9)
        assert chosen(seen).chosen == expected


def test_stays_with_the_prefix_until_waiting_there_costs_more() -> None:
    """1,000 of 1,010 tokens are cached on 0. Elsewhere they take 20 s and more."""
    for backlog, expected in ((100, 0), (500, 0), (2500, 1)):
        holder = Books(cost=COST, in_flight=1, queued_prefill_tokens=backlog)
        seen = view([holder, Books(cost=COST)], [1000, 0], asked=Asked(1010))
        assert chosen(seen, late_binding=False).chosen == expected, backlog


def test_equals_are_drawn_by_lot() -> None:
    replicas = [Books(cost=COST, in_flight=k) for k in (3, 1, 1, 1)]
    counts = Counter(chosen(view(replicas, seed=seed)).chosen for seed in range(300))
    assert set(counts) == {1, 2, 3}
    assert max(counts.values()) < 150


@pytest.mark.parametrize("last", [1, 2, 3])
def test_of_equals_the_sessions_last_replica_is_preferred(last: int) -> None:
    for seed in range(20):
        seen = view([Books(cost=COST, in_flight=k) for k in (3, 1, 1, 1)], seed=seed)
        assert isinstance(seen, Seen)
        seen.session = last
        assert chosen(seen).chosen == last


def test_a_session_moves_where_its_last_replica_costs_more() -> None:
    seen = view([Books(cost=COST, in_flight=1), Books(cost=COST)])
    assert isinstance(seen, Seen)
    seen.session = 0
    assert chosen(seen).chosen == 1


def test_the_lot_decides_before_room_is_asked_for() -> None:
    """Requests wait for the one that they drew, not for the first of several equals."""
    replicas = [full(), full(1), Books(2, 9, 900, cost=COST)]
    assert {E2().choose(view(replicas, seed=seed)) for seed in range(20)} == {None}


# Many replicas


def fleet(count: int, quiet: Counter[int], matched: dict[int, int] | None = None, **asked: Any) -> View:
    """So many replicas with 10 requests each, or fewer where it says so."""
    replicas = [Books(number, quiet.get(number, 10), cost=COST) for number in range(count)]
    return view(replicas, [(matched or {}).get(number, 0) for number in range(count)], asked=Asked(**asked))


def test_of_a_large_fleet_sixteen_are_weighed() -> None:
    """(100 tokens + 1) times 11 requests, in order of number; whoever has less of either comes first. The cheapest is
    the only one that need not evict anything."""
    for cheapest, weighed in ((15, True), (16, False), (19, False)):
        lost = [9.0] * cheapest + [0.0] + [9.0] * (19 - cheapest)
        choice = chosen(losing(fleet(20, Counter()), *lost))
        assert (choice.chosen == cheapest) is weighed
    lost = [9.0] * 19 + [0.0]
    assert chosen(losing(fleet(20, Counter({19: 9})), *lost)).chosen == 19, "one request less"
    assert chosen(losing(fleet(20, Counter(), {19: 10}), *lost)).chosen == 19, "ten tokens less"
    assert chosen(losing(fleet(16, Counter()), *lost[4:])).chosen == 15


def test_a_backlog_counts_among_many() -> None:
    seen = fleet(17, Counter())
    for one in seen.replicas[:16]:
        assert isinstance(one, Books)
        one.queued_prefill_tokens = 1
    assert chosen(losing(seen, *[9.0] * 16, 0.0)).chosen == 16


def test_of_equals_among_many_those_are_weighed_that_got_nothing_for_longest() -> None:
    seen = fleet(20, Counter())
    for number, one in enumerate(seen.replicas[:19]):
        assert isinstance(one, Books)
        one.last_placed = number
    assert chosen(losing(seen, *[9.0] * 19, 0.0)).chosen == 19


def test_one_that_insists_may_go_to_any_of_many() -> None:
    lost = [9.0] * 19 + [0.0]
    assert chosen(losing(fleet(20, Counter(), insists=True), *lost)).chosen == 19
    replicas = [full(number) for number in range(39)] + [Books(39, 99, 200, cost=COST)]
    assert chosen(view(replicas, asked=Asked(insists=True))).chosen == 39


# Why


@pytest.mark.parametrize(
    ("matched", "winner", "reason"),
    [
        ([0, 0], 0, "explore"),
        ([60, 60], 0, "explore"),  # everybody has the same, and much of it
        ([10, 0], 0, "exploit"),
        ([60, 60, 0], 0, "exploit"),
        ([0, 50], 0, "explore"),  # exactly half
        ([0, 60], 0, "replicate"),
        ([50, 60], 0, "replicate"),
        ([10, 20], 0, "explore"),
        ([100], 0, "explore"),  # one that has all, and nobody to compare it with
    ],
)
def test_reasons(matched: list[int], winner: int, reason: str) -> None:
    """The winner is the one that is idle."""
    replicas = [full(number) if number != winner else Books(number, cost=COST) for number in range(len(matched))]
    for one in replicas[1:]:
        one.queued_prefill_tokens = 5000
    choice = chosen(view(replicas, matched))
    assert (choice.chosen, choice.reason) == (winner, reason)


# Who has room


def test_a_replica_with_nothing_to_compute_has_room_whatever_its_steps_take() -> None:
    slow = Linear(step=100.0)
    assert has_room(Books(cost=slow, in_flight=9, decoding=9, unique_pages=10, capacity_tokens=50, queued=1))


@pytest.mark.parametrize(("tokens", "room"), [(1, True), (200, True), (201, False)])
def test_two_full_steps_fit_whatever_they_take(tokens: int, room: bool) -> None:
    assert has_room(Books(cost=COST, queued_prefill_tokens=tokens)) is room
    assert has_room(Books(cost=Linear(step=1000.0), queued_prefill_tokens=tokens)) is room


@pytest.mark.parametrize(("tokens", "room"), [(201, True), (400, True), (401, False)])
def test_so_do_more_steps_of_half_a_second_together(tokens: int, room: bool) -> None:
    """A step of 100 tokens takes 1/8 s, so 400 take exactly half a second."""
    assert has_room(Books(cost=Linear(step=0.125, per_token=0.0), queued_prefill_tokens=tokens)) is room


def test_decodes_and_contexts_make_steps_longer() -> None:
    """100 tokens that attend to as many, beside 20 decodes: (100 + 20) / 1024 + 100 / 1024 s; two of them and more."""
    slow = Linear(step=0.0, per_token=1 / 1024, per_context=1 / 1024)
    assert has_room(Books(cost=slow, queued_prefill_tokens=256, decoding=0))
    assert not has_room(Books(cost=slow, queued_prefill_tokens=257, decoding=0))
    assert has_room(Books(cost=slow, queued_prefill_tokens=232, decoding=20))
    assert not has_room(Books(cost=slow, queued_prefill_tokens=233, decoding=20))


@pytest.mark.parametrize(
    ("queued", "pages", "room"), [(1, 100, True), (1, 101, False), (0, 101, True), (3, 1000, False)]
)
def test_who_waits_for_pages_has_no_room(queued: int, pages: int, room: bool) -> None:
    """100 pages of 10 tokens."""
    books = Books(cost=COST, queued_prefill_tokens=10, queued=queued, unique_pages=pages, capacity_tokens=1000)
    assert has_room(books) is room


def test_any_replica_with_room_makes_it_worth_asking() -> None:
    assert E2().accepts([full(), full(1), Books(2, cost=COST)])
    assert not E2().accepts([full(), full(1)])
    assert E2(late_binding=False).accepts([full(), full(1)])


# Who waits


def holder_is_full(**asked: Any) -> View:
    """All of the prompt is on a replica without room; 20 s of work elsewhere, where there is room."""
    return view([full(), Books(1, cost=COST)], [1000, 0], asked=Asked(1010, **asked))


def test_a_request_waits_for_the_cheapest_though_others_have_room() -> None:
    assert E2().choose(holder_is_full()) is None
    assert chosen(holder_is_full(), late_binding=False).chosen == 0


def test_one_that_insists_takes_the_cheapest_with_room() -> None:
    choice = chosen(holder_is_full(insists=True))
    assert (choice.chosen, choice.reason) == (1, "replicate")
    assert choice.costs == costs(holder_is_full(), 1)
    seen = view([full(), Books(1, 5, cost=COST), Books(2, cost=COST)], [1000, 0, 0], asked=Asked(1010, insists=True))
    assert chosen(seen).chosen == 2


def test_one_that_insists_waits_where_nobody_has_room() -> None:
    assert E2().choose(view([full(), full(1)], asked=Asked(insists=True))) is None


def test_only_late_binding_lets_requests_overtake_each_other() -> None:
    assert E2().overtakes
    assert not E2(late_binding=False).overtakes


# How long it takes by itself


@pytest.mark.parametrize(
    ("matched", "seconds"),
    [
        ([0, 0], 1 + 1.0),  # at the first of those that have as much
        ([0, 40], 2 + 60 * 0.02 + 100 * 0.001),
        ([40, 40], 1 + 60 * 0.01),
        ([100, 0], 1 + 0.01),  # the last token is computed for its logits
    ],
)
def test_service_is_the_prefill_of_what_is_missed_at_best(matched: list[int], seconds: float) -> None:
    replicas = [Books(cost=COST), Books(1, cost=Linear(step=2.0, per_token=0.02, per_context=0.001))]
    assert E2().service_seconds(view(replicas, matched)) == pytest.approx(seconds)


def test_service_takes_some_time_even_where_it_costs_nothing() -> None:
    assert E2().service_seconds(view([Books(cost=Linear(0.0, 0.0))])) > 0
