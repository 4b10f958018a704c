"""What the global scheduler keeps of requests in flight and of those that ended, case by case and worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble.sched import (
    Admitted,
    Choice,
    Finished,
    GlobalScheduler,
    Placement,
    Policy,
    Preempted,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
    View,
)
from preble.sched.hashing import page_hashes
from preble.sched.prefix_stats import RECENT, PrefixStats
from preble.sched.testing import TokenCost
from preble.sched.traffic import ARRIVALS, FIRST_OUTPUT, Traffic

PAGE = 4
PROMPT = list(range(10, 30))
WINDOW = 10.0


class Probe(Policy):
    """The session's replica, else the first one; tells what it saw as costs."""

    name = "probe"

    def choose(self, view: View) -> Choice:
        prefix = view.prefix
        seen = {
            "expected": view.request.expected_tokens,
            "session": -1 if view.session is None else view.replicas[view.session].replica,
            "rate": view.traffic.arrival_rate,
            "ttft": view.traffic.mean_ttft,
            "latency": view.traffic.mean_latency,
            "outputs": -1 if prefix is None else prefix.outputs,
            "waited": -1 if prefix is None else prefix.means(view.now, view.window)[2],
        }
        return Choice(view.session or 0, "probe", seen)


def scheduler(replicas: int = 1, **options: Any) -> GlobalScheduler:
    defaults: dict[str, Any] = {"policy": Probe(), "cost": TokenCost(0.5), "window": WINDOW}
    return GlobalScheduler(replicas, capacity_tokens=4000, page_size=PAGE, **(defaults | options))


def submit(one: GlobalScheduler, name: str, tokens: list[int] = PROMPT, *, now: float = 0.0, **options: Any) -> Any:
    """The costs that the policy told."""
    answer = one.submit(name, tokens, now=now, **options)
    assert isinstance(answer, Placement)
    return answer.costs


def serve(one: GlobalScheduler, name: str, *, output: int, now: float = 0.0, prompt: int = len(PROMPT)) -> None:
    """The replica computes a request at once."""
    (replica,) = (books.replica for books in one.replicas if name in one.in_flight(books.replica))
    one.apply(Admitted(replica, name, 0), now=now)
    for number in range(output):
        one.apply(Progressed(replica, name, prompt + number, (7,)), now=now)
    one.apply(Finished(replica, name), now=now)


# In flight: how much is left to do


def test_the_ledger_follows_a_request() -> None:
    one = scheduler()
    (books,) = one.replicas

    def state() -> tuple[int, int, int, int, int]:
        one.check()
        assert books.queued_prefill_seconds == pytest.approx(0.5 * books.queued_prefill_tokens)
        return (
            books.in_flight,
            books.queued,
            books.queued_prefill_tokens,
            books.decoding,
            books.decode_context_tokens,
        )

    submit(one, "a")
    submit(one, "b")
    assert state() == (2, 2, 20 + 1, 0, 0), "of what is on its way the last token is computed again"
    one.apply(Admitted(0, "a", 8), now=0.0)
    assert state() == (2, 1, 12 + 1, 0, 0)
    one.apply(Progressed(0, "a", 19), now=0.0)
    assert state() == (2, 1, 1 + 1, 0, 0)
    one.apply(Progressed(0, "a", 20, (5,)), now=0.0)
    assert state() == (2, 1, 0 + 1, 1, 21)
    one.apply(Progressed(0, "a", 22, (6, 7)), now=0.0)
    assert state() == (2, 1, 0 + 1, 1, 23)
    one.apply(Progressed(0, "a", 22, (6, 7)), now=0.0)
    assert state() == (2, 1, 0 + 1, 1, 23), "said twice"
    one.apply(Finished(0, "a"), now=0.0)
    assert state() == (1, 1, 1, 0, 0)
    one.cancel("b", now=0.0)
    assert state() == (0, 0, 0, 0, 0)


def test_a_preempted_request_queues_again_and_is_admitted_again() -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "a")
    one.apply(Admitted(0, "a", 0), now=0.0)
    one.apply(Progressed(0, "a", 20, (5,)), now=0.0)
    for _ in range(2):
        one.apply(Preempted(0, "a"), now=0.0)
        assert (books.queued, books.decoding, books.decode_context_tokens) == (1, 0, 0)
        assert books.queued_prefill_tokens == PAGE, "the rest is believed to be in the cache"
        one.check()
    one.apply(Admitted(0, "a", 8), now=0.0)
    assert (books.queued, books.queued_prefill_tokens) == (0, 13), "prompt and output are computed again"
    one.apply(Progressed(0, "a", 21, (6,)), now=0.0)
    assert (books.queued_prefill_tokens, books.decoding, books.decode_context_tokens) == (0, 1, 22)
    one.apply(Progressed(0, "a", 8), now=0.0)
    assert (books.queued_prefill_tokens, books.decoding) == (14, 0), "preempted, and back without a word of it"
    one.check()


def by_cancelling(one: GlobalScheduler) -> None:
    one.cancel("a", now=1.0)


def by_finishing(one: GlobalScheduler) -> None:
    one.apply(Finished(0, "a"), now=1.0)


def by_losing_the_replica(one: GlobalScheduler) -> None:
    one.apply(ReplicaDown(0), now=1.0)


@pytest.mark.parametrize("leave", [by_cancelling, by_finishing, by_losing_the_replica])
@pytest.mark.parametrize("decoding", [False, True])
def test_a_request_that_left_is_off_the_books(leave: Callable[[GlobalScheduler], None], decoding: bool) -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "a")
    if decoding:
        one.apply(Progressed(0, "a", 20, (5,)), now=0.0)
    leave(one)
    assert (books.in_flight, books.queued, books.queued_prefill_tokens, books.queued_prefill_seconds) == (0, 0, 0, 0.0)
    assert (books.decoding, books.decode_context_tokens, books.unique_pages, books.total_pages) == (0, 0, 0, 0)
    assert one.explain(PROMPT, now=1.0).candidates[0].cached_tokens == 0
    for event in (Admitted(0, "a", 4), Progressed(0, "a", 21, (6,)), Preempted(0, "a"), Finished(0, "a")):
        assert one.apply(event, now=1.0) == []
    one.check()
    assert one.cancel("never there", now=1.0) == []


def test_pages_are_those_at_the_end_with_shared_ones_counted_once_or_not() -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "a", expected_tokens=6)
    assert (books.unique_pages, books.total_pages) == (7, 7), "20 + 6 tokens"
    submit(one, "b", [*PROMPT[:16], 1, 2, 3], expected_tokens=2)
    assert books.total_pages == 7 + 6, "19 + 2 tokens"
    assert books.unique_pages == 5 + 2 + 2, "the first four pages are shared"
    one.check()
    one.cancel("a", now=0.0)
    assert (books.unique_pages, books.total_pages) == (6, 6)
    one.check()


def test_seconds_are_those_of_each_replicas_own_cost() -> None:
    one = scheduler(0, policy="round-robin")
    for seconds in (0.5, 0.25):
        one.add_replica(cost=TokenCost(seconds))
    for name in "ab":
        one.submit(name, PROMPT, now=0.0)
    assert [books.queued_prefill_seconds for books in one.replicas] == [10.0, 5.0]
    assert [books.window_prefill_seconds for books in one.replicas] == [10.0, 5.0]
    one.check()


def test_what_steps_took_changes_what_is_expected_of_the_next_ones() -> None:
    one = scheduler()
    (books,) = one.replicas
    before = books.cost.prefill_seconds(100)
    for _ in range(60):
        one.apply(StepTimed(0, 100, 0, 100, 5.0, 10_000), now=0.0)
    assert before == 50.0
    assert books.cost.prefill_seconds(100) == pytest.approx(5.0, rel=0.2)
    submit(one, "a")
    one.check()


# The load of the window


def test_load_is_what_was_placed_within_the_window() -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "a", expected_tokens=4)
    assert books.window_prefill_seconds == 10.0
    assert books.window_decode_seconds == pytest.approx(2.0)
    submit(one, "b", now=5.0, expected_tokens=8)
    assert books.window_prefill_seconds == 10.5, "what is on its way is not computed again"
    assert books.window_decode_seconds == pytest.approx(2.0 + 4.0)
    one.check()
    one.poll(WINDOW + 1)
    assert books.window_prefill_seconds == pytest.approx(0.5)
    assert books.window_decode_seconds == pytest.approx(4.0)
    assert books.queued_prefill_seconds == 10.5, "it is still to be done"
    one.check()
    one.poll(6.0 + WINDOW)
    assert (books.window_prefill_seconds, books.window_decode_seconds) == (0.0, 0.0)
    one.check()


def test_load_is_corrected_by_what_really_happened() -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "a", expected_tokens=4)
    one.apply(Admitted(0, "a", 8), now=0.0)
    assert books.window_prefill_seconds == 6.0, "less was missing than was thought"
    one.apply(Progressed(0, "a", 20, (5,)), now=0.0)
    one.apply(Preempted(0, "a"), now=0.0)
    one.apply(Admitted(0, "a", 0), now=0.0)
    assert books.window_prefill_seconds == 6.0, "the first admission decides"
    one.check()
    one.apply(Finished(0, "a"), now=0.0)
    assert books.window_decode_seconds == pytest.approx(0.5), "one token was generated, not four"
    one.check()


def test_what_left_the_window_is_not_corrected_any_more() -> None:
    one = scheduler()
    (books,) = one.replicas
    submit(one, "early", expected_tokens=4)
    submit(one, "late", [1, 2, 3], now=WINDOW, expected_tokens=4)
    one.poll(WINDOW + 5)
    load = books.window_prefill_seconds, books.window_decode_seconds
    assert load == (1.5, pytest.approx(2.0))
    one.apply(Admitted(0, "early", 8), now=WINDOW + 5)
    one.check()
    one.apply(Progressed(0, "early", 20, (5,)), now=WINDOW + 5)
    one.apply(Finished(0, "early"), now=WINDOW + 5)
    assert (books.window_prefill_seconds, books.window_decode_seconds) == load
    one.check()


def test_a_request_placed_again_is_load_of_its_new_replica_by_what_it_does_there() -> None:
    one = scheduler(2)
    submit(one, "a", expected_tokens=4)
    one.apply(Admitted(0, "a", 0), now=0.0)
    one.apply(Progressed(0, "a", 20, (5,)), now=0.0)
    one.apply(Progressed(0, "a", 22, (5, 5)), now=0.0)
    (moved,) = one.apply(ReplicaDown(0), now=1.0)
    assert moved.replica == 1
    first, second = one.replicas
    assert (first.in_flight, first.window_prefill_seconds, first.window_decode_seconds) == (0, 0.0, 0.0)
    assert (second.in_flight, second.window_prefill_seconds) == (1, 11.5), "three tokens more are to be computed"
    assert second.window_decode_seconds == pytest.approx(0.5), "one of four is left"
    one.apply(Admitted(1, "a", 8), now=1.0)
    assert second.window_prefill_seconds == 7.5, "the first admission there decides"
    one.apply(Progressed(1, "a", 23, (5,)), now=1.0)
    one.apply(Progressed(1, "a", 24, (5,)), now=1.0)
    one.check()
    one.apply(Finished(1, "a"), now=1.0)
    assert second.window_decode_seconds == pytest.approx(1.0), "two tokens here, five in all"
    one.check()


def test_a_request_that_outgrew_its_hint_is_expected_to_go_on() -> None:
    one = scheduler(2)
    submit(one, "a", expected_tokens=2)
    one.apply(Progressed(0, "a", 28, (5,) * 9), now=0.0)
    one.apply(ReplicaDown(0), now=1.0)
    assert one.replicas[1].window_decode_seconds == pytest.approx(0.5)
    one.cancel("a", now=1.0)
    assert one.replicas[1].window_decode_seconds == 0.0


def test_explanations_count_the_load_as_of_the_time_asked_about() -> None:
    one = scheduler(policy="e2-paper")
    submit(one, "early", [1] * 8, expected_tokens=1, session="talk")
    submit(one, "late", [2] * 4, now=6.0, expected_tokens=1)

    def load(now: float) -> float:
        (candidate,) = one.explain([3], now=now, session="talk").candidates
        return candidate.costs["load_seconds"]

    assert [load(now) for now in (6.0, 11.0, 17.0, 6.0)] == [7.0, 2.5, 0.0, 7.0], "and asking changes nothing"
    (books,) = one.replicas
    assert books.window_prefill_seconds == 6.0
    one.check()


def test_a_session_outside_the_window_is_over_whenever_it_is_asked_for() -> None:
    one = scheduler(2)
    submit(one, "0", session="talk")
    one.apply(Finished(0, "0"), now=0.0)
    assert one._fleet.sessions.last(("", "talk"), WINDOW) is one._fleet.ledgers[0]
    assert one._fleet.sessions.last(("", "talk"), 2 * WINDOW) is None


def state_of(books: Any) -> dict[str, Any]:
    """All that is kept of a replica, but for its number and what its steps cost."""
    kept = {name: getattr(books, name) for name in books.__slots__ if name not in ("replica", "cost", "cache")}
    cache = books.cache
    skipped = ("bit", "slot", "order", "_prefill_seconds")
    kept |= {name: getattr(cache, name) for name in cache.__slots__ if name not in skipped}
    return kept | {"order": [getattr(cache.order, name) for name in cache.order.__slots__]}


@pytest.mark.parametrize("policy", ["e2", "e2-paper"])
def test_a_restarted_replica_is_like_a_new_one(policy: str) -> None:
    one = scheduler(policy=policy, window=1000.0)
    for number in range(20):
        one.submit(str(number), [*PROMPT, number], now=float(number), session="talk", expected_tokens=3)
        one.apply(Admitted(0, str(number), 0), now=float(number))
        pages = page_hashes(np.array([*PROMPT, number, 1, 1, 1], np.int32), PAGE)
        one.apply(Stored(0, 2 * number + 1, "", pages), now=float(number))  # every other one is still on its way
        one.apply(StepTimed(0, 100, 0, 100, 50.0, 10_000), now=float(number))
        if number % 2:
            one.apply(Finished(0, str(number)), now=float(number))
    one.apply(ReplicaDown(0), now=30.0)
    one.apply(Stored(0, 99, "", page_hashes(np.array(PROMPT, np.int32), PAGE)), now=30.0)
    for name in one.waiting:
        one.cancel(name, now=30.0)
    one.apply(ReplicaUp(0), now=31.0)
    one.add_replica()
    restarted, new = one.replicas
    assert state_of(restarted) == state_of(new)
    seen, like = one.explain(PROMPT, now=31.0, session="talk").candidates
    assert (seen.cached_tokens, seen.costs) == (like.cached_tokens, like.costs)
    one.apply(Stored(0, 1, "", page_hashes(np.array(PROMPT, np.int32), PAGE)), now=32.0)
    assert len(one.resident_pages(0)) == 5, "its events are numbered from 1 again"
    one.check()


@given(st.lists(st.tuples(st.floats(0, 8), st.integers(1, 9), st.booleans()), max_size=30))
def test_window_sums_are_those_of_the_placements_within(calls: list[tuple[float, int, bool]]) -> None:
    one = scheduler()
    (books,) = one.replicas
    now = 0.0
    placed: list[tuple[float, float, float]] = []
    for number, (pause, size, cancelled) in enumerate(calls):
        now += pause
        submit(one, str(number), [number] * size, now=now, expected_tokens=2)
        placed.append((now, 0.5 * size, 0.0 if cancelled else 1.0))
        if cancelled:
            one.cancel(str(number), now=now)
        one.poll(now)
        recent = [one for one in placed if one[0] >= now - WINDOW * 1.001]
        certain = [one for one in placed if one[0] >= now - WINDOW]
        for at, kept in ((1, books.window_prefill_seconds), (2, books.window_decode_seconds)):
            assert sum(one[at] for one in certain) - 1e-6 <= kept <= sum(one[at] for one in recent) + 1e-6
        one.check()


# What is learned of output lengths, queueing and sessions


def test_output_is_expected_as_hinted_else_as_seen_with_the_prefix_else_as_seen_at_all() -> None:
    one = scheduler()
    assert submit(one, "first", [1, 2, 3], max_tokens=99)["expected"] == FIRST_OUTPUT
    assert submit(one, "short", [1, 2, 3], max_tokens=9)["expected"] == 9
    assert submit(one, "hint", [1, 2, 3], max_tokens=99, expected_tokens=70)["expected"] == 70
    assert submit(one, "large hint", [1, 2, 3], max_tokens=9, expected_tokens=70)["expected"] == 9
    talk, list_ = [50] * 20, [60] * 20
    for number, output in enumerate((30, 30, 10)):
        for prefix, length in ((talk, output), (list_, 2)):
            # Two at a time, so that the prefix is known to be shared.
            for name in (f"{prefix[0]} {number}", f"{prefix[0]} {number}+"):
                submit(one, name, [*prefix, number, 1, 2, 3], max_tokens=99)
            for name in (f"{prefix[0]} {number}", f"{prefix[0]} {number}+"):
                serve(one, name, output=length, prompt=24)
    seen = submit(one, "talk", [*talk, 9, 9], max_tokens=99)
    assert seen["outputs"] == 6
    assert seen["expected"] == pytest.approx((4 * 30 + 2 * 10) / 6)
    assert submit(one, "list", [*list_, 9, 9], max_tokens=99)["expected"] == pytest.approx(2.0)
    overall = (4 * 30 + 2 * 10 + 6 * 2) / 12
    assert submit(one, "unseen", [70] * 20, max_tokens=99)["expected"] == pytest.approx(overall)
    one.check()


def test_nothing_is_learned_of_a_prefix_that_nobody_shares() -> None:
    one = scheduler()
    submit(one, "a")
    serve(one, "a", output=3)
    assert submit(one, "b")["outputs"] == -1
    assert one.tree_pages == 5


def test_queueing_is_learned_per_prefix() -> None:
    one = scheduler()
    for name in "abc":
        submit(one, name, [*PROMPT, ord(name)])
    for name, now in (("a", 1.0), ("b", 3.0)):
        one.apply(Admitted(0, name, 0), now=now)
        one.apply(Admitted(0, name, 0), now=now + 1)
    assert submit(one, "d", now=3.0)["waited"] == 2.0, "the second time is no wait"
    assert submit(one, "e", [99] * 20, now=3.0)["waited"] == -1


def test_waits_are_kept_by_halves_of_the_window() -> None:
    stats = PrefixStats(100.0)
    assert stats.means(100.0, WINDOW) == (0.0, 0, 0.0, 0)
    for seconds in (1.0, 3.0):
        stats.waited(seconds, 101.0, WINDOW)
    assert stats.means(104.0, WINDOW) == (0.0, 0, 2.0, 2)
    assert stats.means(106.0, WINDOW) == (2.0, 2, 0.0, 0)
    stats.waited(8.0, 107.0, WINDOW)
    assert stats.means(109.0, WINDOW) == (2.0, 2, 8.0, 1)
    assert stats.means(111.0, WINDOW) == (8.0, 1, 0.0, 0)
    assert stats.means(116.0, WINDOW) == (0.0, 0, 0.0, 0)
    stats.waited(5.0, 121.0, WINDOW)
    assert stats.means(121.0, WINDOW) == (0.0, 0, 5.0, 1), "what is older than the half before is forgotten"
    assert stats.half_at(99.0, 0.0) == 0, "without a window there are no halves"


def test_output_means_follow_recent_requests() -> None:
    stats = PrefixStats(0.0)
    for tokens in (10, 20):
        stats.ended(tokens)
    assert (stats.outputs, stats.mean_output) == (2, 15.0)
    for _ in range(10 * RECENT):
        stats.ended(100)
    assert stats.mean_output == pytest.approx(100, rel=0.01)


def test_traffic_is_observed_from_submission_to_the_end() -> None:
    one = scheduler()
    assert submit(one, "a", now=0.0)["rate"] == 0.0
    submit(one, "b", now=2.0)
    assert submit(one, "c", now=4.0)["rate"] == 0.5
    one.apply(Progressed(0, "a", 20, (5,)), now=5.0)
    one.apply(Progressed(0, "a", 21, (6,)), now=6.0)
    one.apply(Progressed(0, "b", 20, (5,)), now=9.0)
    one.apply(Finished(0, "a"), now=8.0)
    one.apply(Finished(0, "b"), now=12.0)
    seen = submit(one, "d", now=12.0)
    assert seen["ttft"] == (5.0 + 7.0) / 2
    assert seen["latency"] == (9.0 + 10.0) / 2, "time does not go back, so the first ended at 9"
    one.cancel("c", now=20.0)
    assert submit(one, "e", now=20.0)["latency"] == seen["latency"], "what was cancelled tells nothing"


def test_traffic_means_are_bounded() -> None:
    traffic = Traffic()
    for number in range(2 * ARRIVALS):
        traffic.arrived(number / 10 if number < ARRIVALS else 100 + number)
    assert traffic.arrival_rate == pytest.approx(1.0), "the older ones are forgotten"
    burst = Traffic()
    for _ in range(5):
        burst.arrived(3.0)
    assert burst.arrival_rate == 0.0, "no time passed"
    assert burst.mean_output_tokens == FIRST_OUTPUT


def test_a_session_is_remembered_for_the_window() -> None:
    one = scheduler(2)
    assert submit(one, "0", session="talk")["session"] == -1
    assert submit(one, "1", now=5.0, session="talk")["session"] == 0
    assert submit(one, "2", now=6.0, session="other")["session"] == -1
    assert submit(one, "3", now=6.0, session="talk", namespace="tenant")["session"] == -1
    assert submit(one, "4", now=6.0)["session"] == -1
    one.check()
    assert submit(one, "5", now=14.9, session="talk")["session"] == 0, "each request prolongs it"
    one.check()
    one.poll(14.9 + 2 * WINDOW)
    one.poll(15.0 + 2 * WINDOW)
    assert submit(one, "6", now=15.0 + 2 * WINDOW, session="talk")["session"] == -1
    one.check()


def by_crashing(one: GlobalScheduler) -> None:
    one.apply(ReplicaDown(0), now=0.0)
    one.apply(ReplicaUp(0), now=0.0)


def by_removing(one: GlobalScheduler) -> None:
    one.remove_replica(0, now=0.0)


@pytest.mark.parametrize("lose", [by_crashing, by_removing])
def test_a_session_is_forgotten_with_its_replica(lose: Callable[[GlobalScheduler], Any]) -> None:
    one = scheduler(2)
    submit(one, "0", session="talk")
    one.apply(Finished(0, "0"), now=0.0)
    lose(one)
    one.check()
    assert submit(one, "1", session="talk")["session"] == -1


def test_a_draining_replica_is_no_sessions_choice() -> None:
    one = scheduler(2)
    submit(one, "0", session="talk")
    one.apply(Admitted(0, "0", 0), now=0.0)
    one.drain(0, now=0.0)
    assert submit(one, "1", session="talk")["session"] == -1
    assert submit(one, "2", session="talk")["session"] == 1


# Bounds


@pytest.mark.parametrize("burst", [1, 200])
def test_memory_is_bounded_however_requests_arrive(burst: int) -> None:
    """One after the other, or many at the very same time as a simulator's clock has it."""
    one = scheduler(2, policy="round-robin", window=2.0)
    number = 0
    sizes = []
    for second in range(1600 // burst if burst > 1 else 60):
        for _ in range(burst):
            number += 1
            now = float(second)
            placement = one.submit(str(number), [number] * 4 + [1] * 8, now=now, session=str(number))
            assert isinstance(placement, Placement)
            replica = placement.replica
            names = page_hashes(np.array([number] * 4 + [1] * 8, np.int32), PAGE)
            one.apply(Stored(replica, number, "", names), now=now)
            one.apply(Finished(replica, str(number)), now=now)
        fleet = one._fleet
        shares = sum(len(ledger.shares) for ledger in fleet.ledgers.values())
        sessions = sum(len(ledger.sessions) for ledger in fleet.ledgers.values())
        sizes.append((len(fleet.tree._uses), shares, sessions, len(fleet.sessions._last)))
    one.check()
    half = len(sizes) // 2
    for kind in zip(*sizes, strict=True):
        assert max(kind[half:]) <= max(kind[:half]) <= 4 * burst, sizes
