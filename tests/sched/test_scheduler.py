"""The global scheduler, case by case; `test_scheduler_machine.py` does the rest."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from preble.errors import InvalidRequest
from preble.sched import (
    POLICIES,
    Admitted,
    Evicted,
    Finished,
    GlobalScheduler,
    Moved,
    Placement,
    Preempted,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
    Waiting,
)
from preble.sched.hashing import namespace_salt, page_hashes
from preble.sched.policies import make_policy
from preble.sched.prefix_tree import MOST_SWEPT
from preble.sched.testing import leads_to

PAGE = 4
PROMPT = list(range(10, 30))


def scheduler(replicas: int = 2, policy: str = "prefix-affinity", **options: Any) -> GlobalScheduler:
    return GlobalScheduler(replicas, capacity_tokens=4000, page_size=PAGE, policy=policy, **options)


def placed(answer: Placement | Waiting) -> Placement:
    assert isinstance(answer, Placement)
    return answer


def names(tokens: list[int], namespace: str = "") -> np.ndarray:
    return page_hashes(np.array(tokens, np.int32), PAGE, base=namespace_salt(namespace))


def cached(one: GlobalScheduler, tokens: list[int], **options: Any) -> dict[int, int]:
    explanation = one.explain(tokens, now=0.0, **options)
    return {
        candidate.replica: candidate.cached_tokens for candidate in explanation.candidates if candidate.cached_tokens
    }


# Residency


def test_two_requests_back_to_back_share_a_prefix_that_nobody_has_yet() -> None:
    one = scheduler(8)
    first = placed(one.submit("a", PROMPT, now=0.0))
    second = placed(one.submit("b", [*PROMPT[:16], 1, 2, 3], now=0.0))
    assert (first.reason, first.cached_tokens) == ("explore", 0)
    assert (second.replica, second.reason, second.cached_tokens) == (first.replica, "exploit", 16)
    one.check()


def test_an_exact_repeat_is_a_hit() -> None:
    one = scheduler()
    first = placed(one.submit("a", PROMPT, now=0.0))
    one.apply(Stored(first.replica, 1, "", names(PROMPT)), now=0.0)
    one.apply(Finished(first.replica, "a"), now=0.0)
    again = placed(one.submit("b", PROMPT, now=0.0))
    assert (again.replica, again.cached_tokens) == (first.replica, 20)
    assert one.replicas[again.replica].queued_prefill_tokens == 1, "the last token is computed for its logits"


def test_without_a_request_only_what_the_engine_said_counts() -> None:
    one = scheduler()
    replica = placed(one.submit("a", PROMPT, now=0.0)).replica
    one.apply(Stored(replica, 1, "", names(PROMPT)[:3]), now=0.0)
    assert cached(one, PROMPT) == {replica: 20}
    one.apply(Finished(replica, "a"), now=0.0)
    assert cached(one, PROMPT) == {replica: 12}
    one.apply(Evicted(replica, 2, "", names(PROMPT)[2:3]), now=0.0)
    assert cached(one, PROMPT) == {replica: 8}
    one.check()


def test_the_next_turn_of_a_conversation_matches_prompt_and_answer_once_these_are_stored() -> None:
    """No event tells the answer's tokens: its pages are found by their hashes."""
    one = scheduler(4)
    replica = placed(one.submit("turn 1", PROMPT, now=0.0)).replica
    history = [*PROMPT, 7, 8, 9, 7, 8, 9, 7, 8, 9]
    one.apply(Stored(replica, 1, "", names(PROMPT)), now=0.0)
    assert cached(one, history) == {replica: 20}
    one.apply(Stored(replica, 3, "", names(history)[6:7]), now=1.0)
    assert cached(one, history) == {replica: 20}, "a page is missing before it"
    one.apply(Stored(replica, 2, "", names(history)[5:6]), now=1.0)
    assert cached(one, history) == {replica: 28}, "while it is still generating"
    one.apply(Finished(replica, "turn 1"), now=2.0)
    assert one.explain(history, now=2.0).candidates[replica].confirmed_tokens == 28
    assert one.tree_pages == 5, "output is not in the tree"
    turn = placed(one.submit("turn 2", [*history, 1, 2, 3, 4, 5], now=3.0))
    assert (turn.replica, turn.reason, turn.cached_tokens) == (replica, "exploit", 28)
    one.apply(Evicted(replica, 4, "", names(history)[6:7]), now=4.0)
    assert cached(one, history) == {replica: 28}, "promised again, by the second turn"
    one.apply(Finished(replica, "turn 2"), now=5.0)
    assert cached(one, history) == {replica: 24}
    one.check()


def test_a_prompt_is_promised_until_it_ends_whatever_is_evicted_meanwhile() -> None:
    one = scheduler()
    replica = placed(one.submit("a", PROMPT, now=0.0)).replica
    one.apply(Stored(replica, 1, "", names(PROMPT)), now=0.0)
    one.apply(Evicted(replica, 2, "", names(PROMPT)[1:]), now=0.0)
    assert cached(one, PROMPT) == {replica: 20}
    assert one.explain(PROMPT, now=0.0).candidates[replica].confirmed_tokens == 4
    one.cancel("a", now=0.0)
    assert cached(one, PROMPT) == {replica: 4}
    one.check()


def test_a_replica_that_takes_over_a_request_is_the_one_that_will_have_it() -> None:
    one = scheduler(2)
    replica = placed(one.submit("a", PROMPT, now=0.0)).replica
    one.apply(Stored(replica, 1, "", names(PROMPT)), now=0.0)
    one.apply(Progressed(replica, "a", 22, (1, 2, 3)), now=0.0)
    (again,) = one.apply(ReplicaDown(replica), now=0.0)
    assert cached(one, PROMPT) == {again.replica: 20}
    (books,) = (one for one in one.replicas if one.replica == again.replica)
    assert books.queued_prefill_tokens == 23, "its output is computed again as well"
    one.check()


def test_no_prefix_crosses_a_namespace() -> None:
    one = scheduler()
    replica = placed(one.submit("a", PROMPT, now=0.0, namespace="tenant")).replica
    one.apply(Stored(replica, 1, "tenant", names(PROMPT, "tenant")), now=0.0)
    assert cached(one, PROMPT) == {}
    assert cached(one, PROMPT, namespace="other") == {}
    assert cached(one, PROMPT, namespace="tenant") == {replica: 20}
    other = placed(one.submit("b", PROMPT, now=0.0))
    assert other.cached_tokens == 0
    assert other.replica != replica
    assert cached(one, PROMPT) == {other.replica: 20}
    assert cached(one, PROMPT, namespace="tenant") == {replica: 20}
    one.check()


def test_a_prompt_shorter_than_a_page_is_just_placed() -> None:
    one = scheduler()
    replica = placed(one.submit("a", [1, 2], now=0.0, namespace="short")).replica
    one.apply(Finished(replica, "a"), now=0.0)
    assert one.tree_pages == 0
    one.check()


def test_the_tree_is_bounded_by_what_is_held_shared_or_in_flight() -> None:
    one = scheduler(window=10.0)
    for n in range(300):
        now = float(n)
        replica = placed(one.submit(str(n), [n, *PROMPT], now=now)).replica
        one.apply(Stored(replica, 2 * n + 1, "", names([n, *PROMPT])), now=now)
        assert one.tree_pages <= 5 * 5
        one.apply(Finished(replica, str(n)), now=now)
        if n >= 4:
            gone = names([n - 4, *PROMPT])
            for books in one.replicas:
                one.apply(Evicted(books.replica, 2 * n + 2, "", gone), now=now)
    one.poll(1000.0)
    assert one.tree_pages == 4 * 5, "what is held stays"
    one.check()


def test_a_shared_prefix_is_known_for_the_window_and_no_longer() -> None:
    one = scheduler(window=10.0)
    for name in "ab":
        placed(one.submit(name, [*PROMPT, *PROMPT, ord(name)], now=0.0))
    for name in "ab":
        one.cancel(name, now=1.0)
    assert one.tree_pages == 10
    one.poll(10.0)
    assert one.tree_pages == 10
    one.poll(10.1)
    assert one.tree_pages == 0
    one.check()


# Replicas come and go


def test_the_requests_of_a_lost_replica_move_with_their_ids() -> None:
    one = scheduler(3)
    replica = placed(one.submit("a", PROMPT, now=0.0)).replica
    assert placed(one.submit("b", PROMPT, now=0.0)).replica == replica
    other = placed(one.submit("c", [1, 2, 3], now=0.0)).replica
    moved = one.apply(ReplicaDown(replica), now=1.0)
    assert [move.request_id for move in moved] == ["a", "b"]
    assert moved[0].replica == moved[1].replica not in (replica, other)
    assert one.in_flight(replica) == []
    assert one.apply(ReplicaDown(replica), now=1.0) == []
    one.apply(ReplicaUp(replica), now=2.0)
    assert cached(one, PROMPT) == {moved[0].replica: 20}, "it comes back cold"
    assert placed(one.submit("d", [9], now=2.0)).replica == replica
    one.check()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_requests_wait_while_no_replica_is_up(policy: str) -> None:
    one = scheduler(1, policy)
    one.submit("a", PROMPT, now=0.0)
    assert one.apply(ReplicaDown(0), now=0.0) == []
    assert one.submit("b", PROMPT, now=0.0) == Waiting("b", "no replica is up")
    assert one.waiting == ["a", "b"]
    assert one.cancel("a", now=0.0) == []
    assert [move.request_id for move in one.apply(ReplicaUp(0), now=0.0)] == ["b"]
    one.check()


def test_waiting_requests_are_served_by_priority_deadline_and_age() -> None:
    one = scheduler(0)
    wishes: list[dict[str, Any]] = [
        {},
        {"deadline": 9.0},
        {"deadline": 5.0},
        {},
        {"priority": 1},
        {"priority": -1, "deadline": 1.0},
        {"priority": 1, "deadline": 99.0},
    ]
    for number, wish in enumerate(wishes):
        one.submit(str(number), [1], now=0.0, **wish)
    order = ["6", "4", "2", "1", "0", "3", "5"]
    assert one.waiting == order
    one.add_replica()
    late = one.submit("7", [1], now=0.0)
    assert late == Waiting("7", "others wait before it")
    assert [move.request_id for move in one.poll(1.0)] == [*order[:-1], "7", "5"]


def test_a_request_placed_again_keeps_its_age() -> None:
    one = scheduler(1)
    one.submit("old", [1], now=0.0)
    assert one.drain(0, now=0.0) == Moved((), ())
    assert one.submit("new", [1], now=1.0) == Waiting("new", "every replica that is up drains")
    one.apply(ReplicaDown(0), now=2.0)
    assert one.waiting == ["old", "new"]


def test_a_draining_replica_finishes_what_it_has() -> None:
    one = scheduler(2)
    replica = placed(one.submit("a", PROMPT, now=0.0)).replica
    one.apply(Admitted(replica, "a", 0), now=0.0)
    assert one.drain(replica, now=0.0) == Moved((), ())
    assert placed(one.submit("b", PROMPT, now=0.0)).replica != replica
    assert one.in_flight(replica) == ["a"]
    assert one.replicas[replica].state == "draining"
    one.apply(Finished(replica, "a"), now=0.0)
    assert one.remove_replica(replica, now=0.0) == Moved((), ())
    one.check()


def test_what_waits_on_a_draining_replica_goes_elsewhere() -> None:
    one = scheduler(1)
    for name in ("runs", "queued", "preempted", "urgent"):
        one.submit(name, PROMPT, now=0.0, priority=name == "urgent")
    one.apply(Admitted(0, "runs", 0), now=0.0)
    one.apply(Admitted(0, "preempted", 0), now=0.0)
    one.apply(Progressed(0, "preempted", len(PROMPT), (1,)), now=0.0)
    one.apply(Preempted(0, "preempted"), now=0.0)
    one.add_replica()
    moved = one.drain(0, now=1.0)
    assert moved.request_ids == ("queued", "preempted", "urgent")
    assert [(place.request_id, place.replica) for place in moved.placements] == [
        ("urgent", 1),
        ("queued", 1),
        ("preempted", 1),
    ]
    assert (one.in_flight(0), one.in_flight(1)) == (["runs"], ["urgent", "queued", "preempted"])
    assert one.drain(0, now=2.0) == Moved((), ()), "it works on all that it still has"
    one.check()


def test_what_is_said_late_of_a_moved_request_is_ignored() -> None:
    one = scheduler(1)
    one.submit("a", PROMPT, now=0.0)
    one.add_replica()
    one.drain(0, now=0.0)
    before = one.replicas[1].queued_prefill_tokens
    late = [Admitted(0, "a", 8), Progressed(0, "a", len(PROMPT), (1,)), Preempted(0, "a"), Finished(0, "a")]
    for event in late:
        assert one.apply(event, now=1.0) == []
        assert one.in_flight(1) == ["a"]
        assert (one.replicas[1].queued, one.replicas[1].queued_prefill_tokens) == (1, before)
        one.check()
    one.apply(Finished(1, "a"), now=2.0)
    assert one.in_flight(1) == []


def test_a_replica_that_drains_alone_finishes_all_it_has() -> None:
    one = scheduler(2)
    one.apply(ReplicaDown(1), now=0.0)
    one.submit("a", PROMPT, now=0.0)
    assert one.drain(0, now=0.0) == Moved((), ())
    assert one.in_flight(0) == ["a"]
    one.apply(ReplicaUp(1), now=1.0)
    moved = one.drain(0, now=2.0)
    assert moved.request_ids == ("a",), "asked again, as there is another now"
    assert moved.placements[0].replica == 1
    one.check()


def test_what_a_busy_fleet_cannot_take_off_a_draining_replica_waits_in_its_turn() -> None:
    one = GlobalScheduler(1, capacity_tokens=100, page_size=PAGE, policy="e2-paper")
    one.submit("a", [1] * 40, now=0.0, expected_tokens=1)
    one.submit("b", [2] * 40, now=0.0, expected_tokens=1)
    full = one.add_replica()
    for name in ("c", "d"):
        one.submit(name, [ord(name)] * 60, now=0.0, expected_tokens=1)
    assert one.waiting == []
    moved = one.drain(0, now=1.0)
    assert "b" in moved.request_ids
    assert set(moved.request_ids) == {place.request_id for place in moved.placements} | set(one.waiting)
    assert one.waiting, "nobody has room for all"
    while one.in_flight(full):
        one.apply(Finished(full, one.in_flight(full)[0]), now=2.0)
    assert (one.waiting, one.in_flight(0)) == ([], [])
    one.check()


def test_a_replica_that_is_announced_before_it_is_loaded_gets_nothing_until_it_is_up() -> None:
    one = scheduler(0)
    one.submit("a", PROMPT, now=0.0)
    number = one.add_replica()
    assert one.apply(ReplicaDown(number), now=0.0) == []
    assert one.poll(1.0) == []
    assert one.submit("b", PROMPT, now=1.0) == Waiting("b", "no replica is up")
    assert [place.request_id for place in one.apply(ReplicaUp(number), now=2.0)] == ["a", "b"]


def all_down(one: GlobalScheduler) -> str:
    for books in one.replicas:
        one.apply(ReplicaDown(books.replica), now=1.0)
    return "no replica is up"


def all_gone(one: GlobalScheduler) -> str:
    for books in one.replicas:
        one.remove_replica(books.replica, now=1.0)
    return "no replica is up"


def some_draining(one: GlobalScheduler) -> str:
    one.drain(1, now=1.0)
    one.apply(ReplicaDown(0), now=1.0)
    one.apply(ReplicaDown(2), now=1.0)
    return "every replica that is up drains"


@pytest.mark.parametrize("happens", [all_down, all_gone, some_draining])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_nobody_to_serve_them_requests_wait_in_order_and_none_is_lost(
    policy: str, happens: Callable[[GlobalScheduler], str]
) -> None:
    one = scheduler(3, policy)
    wishes: list[dict[str, Any]] = [{}, {"deadline": 9.0}, {"priority": 1}, {"priority": -1}, {"deadline": 5.0}]
    for number, wish in enumerate(wishes):
        one.submit(f"placed {number}", [1, number], now=0.0, **wish)
    before = [name for replica in range(3) for name in one.in_flight(replica)]
    for name in before[::2]:
        for replica in range(3):
            one.apply(Admitted(replica, name, 0), now=0.0)
    reason = happens(one)
    for number, wish in enumerate(wishes):
        assert one.submit(f"new {number}", [1, number], now=2.0, **wish) == Waiting(f"new {number}", reason)
    stay = [name for books in one.replicas for name in one.in_flight(books.replica)]
    everybody = {f"{kind} {number}" for kind in ("placed", "new") for number in range(5)}
    assert {*one.waiting, *stay} == everybody
    in_order = [f"{kind} {number}" for number in (2, 4, 1, 0, 3) for kind in ("placed", "new")]
    assert one.waiting == [name for name in in_order if name not in stay]
    expected = one.waiting
    replica = one.add_replica() if happens is all_gone else 0
    placements = one.poll(3.0) if happens is all_gone else one.apply(ReplicaUp(0), now=3.0)
    assert {place.replica for place in placements} == {replica}
    if not make_policy(policy).overtakes:
        assert [place.request_id for place in placements] == expected
    assert {*one.in_flight(replica), *stay} == everybody
    one.check()


def test_what_a_removed_replica_had_goes_elsewhere() -> None:
    one = scheduler(1)
    for name in "abc":
        one.submit(name, PROMPT, now=0.0)
    one.apply(Admitted(0, "a", 0), now=0.0)
    one.apply(Finished(0, "b"), now=0.0)
    assert one.remove_replica(0, now=0.0) == Moved(("a", "c"), ()), "there is no other"
    assert one.waiting == ["a", "c"]
    assert one.submit("d", PROMPT, now=0.0) == Waiting("d", "no replica is up")
    assert one.add_replica() == 1
    assert [(place.request_id, place.replica) for place in one.poll(1.0)] == [("a", 1), ("c", 1), ("d", 1)]
    for event in (Stored(0, 1, "", names(PROMPT)), Finished(0, "a"), ReplicaUp(0)):
        assert one.apply(event, now=0.0) == []
    assert one.in_flight(1) == ["a", "c", "d"]
    one.check()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_removed_replica_leaves_no_trace(policy: str) -> None:
    """Nothing that the scheduler still has leads to its books, its cache or what was in flight there."""
    one = scheduler(3, policy, window=50.0)
    for n in range(40):
        prompt, now = [*PROMPT, n % 7, *PROMPT, n], float(n)
        one.submit(str(n), prompt, now=now, session=str(n % 5), expected_tokens=3)
        for books in one.replicas:
            one.apply(Stored(books.replica, n + 1, "", names([*prompt, 1, 1, 1, 1, 1, 1])[: n % 13]), now=now)
            one.apply(Progressed(books.replica, str(n), 42, (1,)), now=now)
            if n % 3 == 0:
                one.apply(Finished(books.replica, str(n)), now=now)
    ledger = one._fleet.ledgers[0]
    everything = [ledger, ledger.cache, *ledger.shares]
    slot, bit = ledger.cache.slot, ledger.cache.bit
    assert ledger.cache.nodes
    assert ledger.cache.unknown
    assert ledger.sessions
    assert leads_to(one, [ledger, ledger.cache])
    lost = one.in_flight(0)
    assert lost
    moved = one.remove_replica(0, now=40.0)
    assert list(moved.request_ids) == lost
    assert not [place for place in moved.placements if place.replica == 0]
    for name in lost:
        one.cancel(name, now=40.0)
    assert leads_to(one, everything) == []
    for node in one._fleet.tree.nodes():
        assert slot not in node.resident
        assert slot not in node.pins
        assert not (node.full | node.cover) & bit
    one.check()
    for books in one.replicas:
        for name in one.remove_replica(books.replica, now=40.0).request_ids:
            one.cancel(name, now=40.0)
    for _ in range(1 + 200 // MOST_SWEPT):
        one.poll(100.0)
    assert (one.tree_pages, one.waiting, one.replicas) == (0, [], ())
    one.check()


def test_cache_events_of_an_earlier_life_are_ignored() -> None:
    one = scheduler(1)
    one.submit("a", PROMPT, now=0.0)
    one.apply(Stored(0, 1, "", names(PROMPT)[:2]), now=0.0)
    one.apply(ReplicaDown(0), now=0.0)
    one.apply(Stored(0, 3, "", names(PROMPT)), now=0.0)
    one.apply(ReplicaUp(0, sequence=3), now=0.0)
    one.apply(Stored(0, 2, "", names(PROMPT)[:3]), now=0.0)
    assert one.resident_pages(0) == set()
    one.apply(Stored(0, 4, "", names(PROMPT)[:1]), now=0.0)
    assert one.resident_pages(0) == set(names(PROMPT)[:1].tolist())


def test_a_restarted_replica_may_count_from_one_again() -> None:
    one = scheduler(1)
    for sequence in (1, 2):
        one.apply(Stored(0, sequence, "", names(PROMPT)), now=0.0)
    one.apply(ReplicaDown(0), now=0.0)
    one.apply(ReplicaUp(0), now=0.0)
    one.apply(Stored(0, 1, "", names(PROMPT)[:1]), now=0.0)
    assert one.resident_pages(0) == set(names(PROMPT)[:1].tolist())


# Decisions


def test_cold_prompts_spread_out() -> None:
    for policy in ("prefix-affinity", "e2", "least-loaded", "round-robin"):
        one = scheduler(8, policy)
        counts = Counter(placed(one.submit(str(n), [n] * 8, now=0.0)).replica for n in range(80))
        assert counts == dict.fromkeys(range(8), 10), policy


def test_a_burst_with_one_common_prefix_does_not_stay_on_one_replica() -> None:
    one = scheduler(4, "e2")
    counts = Counter(placed(one.submit(str(n), [*PROMPT, n], now=0.0)).replica for n in range(200))
    assert min(counts.values()) >= 40


def test_the_seed_decides_ties_and_nothing_else_does() -> None:
    def decisions(seed: int) -> list[int]:
        one = scheduler(8, seed=seed)
        return [placed(one.submit(str(n), [n] * 8, now=0.0)).replica for n in range(40)]

    assert decisions(1) == decisions(1)
    assert len({tuple(decisions(seed)) for seed in range(10)}) == 10


def test_time_never_goes_back() -> None:
    one = scheduler(window=10.0)
    one.submit("a", PROMPT, now=100.0)
    one.submit("b", [1, *PROMPT], now=50.0)
    one.check()


def test_explain_says_what_submit_does_and_changes_nothing() -> None:
    one = scheduler(3)
    for n in range(5):
        one.submit(str(n), [n % 2, *PROMPT], now=0.0)
    one.apply(Stored(0, 1, "", names([1, *PROMPT])[:2]), now=0.0)
    one.drain(2, now=0.0)
    before = one.explain([1, *PROMPT], now=0.0)
    assert before == one.explain([1, *PROMPT], now=99.0)
    after = placed(one.submit("next", [1, *PROMPT], now=0.0))
    assert (before.replica, before.reason) == (after.replica, after.reason)
    assert before.candidates[after.replica].costs == after.costs
    assert one.explain([5, 5, 5, 5], now=0.0, namespace="unseen").candidates[0].cached_tokens == 0
    one.check()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_asking_changes_no_decision(policy: str) -> None:
    """Not even where lots decide."""

    def decisions(questions: int) -> list[Placement | Waiting]:
        one = scheduler(8, policy)
        answers = []
        for n in range(40):
            for _ in range(questions):
                one.explain([n % 9] * 8, now=float(n))
            answers.append(one.submit(str(n), [n % 9] * 8, now=float(n)))
        return answers

    assert decisions(0) == decisions(3)


def test_an_explanation_is_a_table() -> None:
    one = scheduler(2)
    one.submit("a", PROMPT, now=0.0)
    lines = str(one.explain(PROMPT, now=0.0)).splitlines()
    assert lines[0].startswith("prefix-affinity: replica")
    assert "prompt of 20 tokens" in lines[0]
    assert lines[1].split()[:3] == ["replica", "state", "cached"]
    assert "missed_tokens" in lines[1]
    assert [line.split()[0] for line in lines[2:]].count("*") == 1
    one.apply(ReplicaDown(0), now=0.0)
    one.apply(ReplicaDown(1), now=0.0)
    assert str(one.explain(PROMPT, now=0.0)).startswith("prefix-affinity: wait (no replica is up)")


# Bad input


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "not empty; this one has shape"),
        ([[1, 2], [3, 4]], "flat sequence"),
        ([[1, 2], [3]], "flat sequence"),
        ([1.5, 2.0], "must be integers, not float64"),
        (["a"], "must be integers"),
        ([True, False], "must be integers, not bool"),
        (np.array([3, -1], np.int32), "must not be negative, as -1 is"),
        ([2**31], "must be at most 2147483647, which 2147483648 is not"),
        (np.array([2**63], np.uint64), "must be at most"),
        ([2**70], "must be integers"),
        (7, "flat sequence"),
        (None, "flat sequence"),
    ],
)
def test_a_malformed_prompt_is_refused(tokens: Any, message: str) -> None:
    one = scheduler()
    with pytest.raises(InvalidRequest, match=message):
        one.submit("a", tokens, now=0.0)
    with pytest.raises(InvalidRequest, match=message):
        one.explain(tokens, now=0.0)
    assert placed(one.submit("a", [1], now=0.0)), "the id was not taken"


@pytest.mark.parametrize("tokens", [range(8), (1, 2, 3), np.arange(9, dtype=np.uint8), np.arange(20)[::2], [2**31 - 1]])
def test_any_flat_integers_are_a_prompt(tokens: Any) -> None:
    one = scheduler()
    placed(one.submit("a", tokens, now=0.0))
    one.check()


def test_the_prompt_is_copied() -> None:
    one = scheduler(1)
    prompt = np.array(PROMPT, np.int32)
    one.submit("a", prompt, now=0.0)
    prompt[:] = 0
    one.apply(Finished(0, "a"), now=0.0)
    one.check()
    assert one.submit("b", PROMPT, now=0.0) is not None
    assert one.tree_pages == 5


def test_bad_arguments_are_refused() -> None:
    one = scheduler(2)
    one.submit("a", [1], now=0.0)
    for call, message in (
        (lambda: one.submit("a", [1], now=0.0), "request 'a' is already here and has not ended"),
        (lambda: one.submit("b", [1], now=0.0, max_tokens=0), "max_tokens must be at least 1"),
        (lambda: one.remove_replica(2, now=0.0), "there is no replica 2; there are: 0, 1"),
        (lambda: one.drain(-1, now=0.0), "there is no replica -1"),
        (lambda: one.apply(StepTimed(9, 1, 1, 1, 0.1), now=0.0), "there never was a replica 9"),
        (lambda: one.apply("finished", now=0.0), "not an event"),  # type: ignore[arg-type]
        (lambda: one.add_replica(capacity_tokens=3), "less than a page of 4 tokens"),
        (lambda: scheduler(-1), "replicas must be at least 0"),
        (lambda: scheduler(window=float("nan")), "window must be at least 0 seconds"),
        (lambda: GlobalScheduler(1, capacity_tokens=10, page_size=0), "page_size must be at least 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            call()
    one.check()


# What check() notices


def break_ledger(one: GlobalScheduler) -> None:
    one._fleet.ledgers[0].queued_prefill_tokens += 1


def break_requests(one: GlobalScheduler) -> None:
    one._requests.pop("a")


def break_residency(one: GlobalScheduler) -> None:
    node = next(iter(one._fleet.tree.nodes()))
    node.resident[0] = 1


def break_pins(one: GlobalScheduler) -> None:
    node = next(iter(one._fleet.tree.nodes()))
    node.pins[0] += 1


def break_uses(one: GlobalScheduler) -> None:
    one._fleet.tree._uses.clear()


def break_queue(one: GlobalScheduler) -> None:
    one._waiting.push(one._requests["a"])


def break_window(one: GlobalScheduler) -> None:
    one._fleet.ledgers[0].window_prefill_seconds += 1.0


def break_sessions(one: GlobalScheduler) -> None:
    one._fleet.ledgers[0].sessions.clear()


def break_index(one: GlobalScheduler) -> None:
    one._fleet.tree._index.entries.popitem()


def break_state(one: GlobalScheduler) -> None:
    one._fleet.ledgers[0].draining = True


@pytest.mark.parametrize(
    "damage",
    [
        break_ledger,
        break_requests,
        break_residency,
        break_pins,
        break_uses,
        break_queue,
        break_window,
        break_sessions,
        break_index,
        break_state,
    ],
)
def test_check_notices(damage: Callable[[GlobalScheduler], None]) -> None:
    one = scheduler(1)
    one.submit("a", PROMPT, now=0.0, session="talk")
    one.check()
    damage(one)
    with pytest.raises(AssertionError):
        one.check()


def test_check_works_without_assertions() -> None:
    code = (
        "from preble.sched import GlobalScheduler\n"
        "one = GlobalScheduler(1, capacity_tokens=1000)\n"
        "one.submit('a', [1], now=0.0)\n"
        "one._fleet.ledgers[0].in_flight = 7\n"
        "one.check()\n"
    )
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "AssertionError: replica 0 counts 7 requests, has 1" in result.stderr


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, preble.sched.placement\n"
        "assert 'numpy' not in sys.modules\n"
        "import preble.sched\n"
        "for name in preble.sched.__all__: getattr(preble.sched, name)\n"
        "assert 'numpy' in sys.modules and 'torch' not in sys.modules\n"
        "try: preble.sched.Nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'Nothing'" in result.stdout, result.stderr
