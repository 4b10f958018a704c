"""What each policy does with a given view, and how policies are named and made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_views import Books, view

from preble.errors import InvalidRequest
from preble.sched import POLICIES, Choice, GlobalScheduler, Placement, Policy, View
from preble.sched.lots import Lots
from preble.sched.policies import make_policy


def chosen(policy: str, replicas: Iterable[Books], matched: Iterable[int] | None = None) -> tuple[int, str]:
    choice = POLICIES[policy]().choose(view(replicas, matched))
    assert choice is not None
    return choice.chosen, choice.reason


def test_least_loaded_counts_requests_then_tokens() -> None:
    replicas = [Books(0, 2, 10), Books(1, 1, 500), Books(2, 1, 400)]
    assert chosen("least-loaded", replicas, [100, 0, 0]) == (2, "least-loaded")


def test_prefix_affinity_follows_the_longest_prefix_whatever_the_load() -> None:
    replicas = [Books(0), Books(1, 90, 9000), Books(2, 91, 0)]
    assert chosen("prefix-affinity", replicas, [16, 32, 32]) == (1, "exploit")
    assert chosen("prefix-affinity", replicas, [16, 32, 48]) == (2, "exploit")
    assert chosen("prefix-affinity", replicas) == (0, "explore")


def test_round_robin_takes_turns_among_those_that_are_there() -> None:
    assert chosen("round-robin", [Books(0, last_placed=7), Books(4, last_placed=5), Books(9, last_placed=6)])[0] == 1
    scheduler = GlobalScheduler(4, capacity_tokens=1000, policy="round-robin")
    turns = [scheduler.submit(str(n), [1], now=0.0) for n in range(12)]
    order = [one.replica for one in turns if isinstance(one, Placement)]
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert order == order[:4] * 3


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"sglang"}))
def test_ties_are_broken_by_lot(policy: str) -> None:
    """The first of many equals must not get more than its share, whatever the seed."""
    counts: Counter[int] = Counter()
    for seed in range(400):
        choice = POLICIES[policy]().choose(view([Books(n) for n in range(4)], seed=seed))
        assert choice is not None
        counts[choice.chosen] += 1
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 150


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(data=st.data())
def test_choosing_leaves_the_policy_as_it_was(policy: str, data: st.DataObject) -> None:
    """`explain` asks too."""
    one = POLICIES[policy]()
    count = data.draw(st.integers(1, 5))
    numbers = st.integers(0, 20)
    books = [Books(n, data.draw(numbers), data.draw(numbers), data.draw(numbers)) for n in range(count)]
    matched = data.draw(st.lists(numbers, min_size=count, max_size=count))
    answers = [one.choose(view(books, matched, seed=3)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] is not None
    assert answers[0].costs.items() <= one.costs(view(books, matched), answers[0].chosen).items()


@given(st.integers(), st.integers(1, 100))
def test_lots_are_drawn_from_all_and_can_be_copied(seed: int, count: int) -> None:
    lots = Lots(seed)
    copy = lots.copy()
    drawn = [lots.draw(count) for _ in range(20)]
    assert drawn == [copy.draw(count) for _ in range(20)]
    assert all(0 <= one < count for one in drawn)


def test_an_unknown_policy_is_refused_with_the_names() -> None:
    with pytest.raises(
        InvalidRequest, match=r"e2, e2-paper, least-loaded, .*, not 'round_robin'; did you mean 'round-robin'"
    ):
        make_policy("round_robin")
    with pytest.raises(InvalidRequest, match="policy must be one of"):
        GlobalScheduler(1, capacity_tokens=1000, policy=7)  # type: ignore[arg-type]


class Last(Policy):
    """A policy of one's own: the last replica, and nobody while it has two requests."""

    name = "last"

    def choose(self, view: View) -> Choice | None:
        last = len(view.replicas) - 1
        return Choice(last, "because", {"weight": 1.0}) if view.replicas[last].in_flight < 2 else None


def test_a_policy_of_ones_own_may_let_requests_wait() -> None:
    scheduler = GlobalScheduler(3, capacity_tokens=1000, policy=Last())
    answers = [scheduler.submit(name, [1, 2], now=0.0) for name in "abc"]
    assert [getattr(one, "replica", None) for one in answers] == [2, 2, None]
    assert (answers[0].reason, answers[2].reason) == ("because", "every replica is busy")
    assert scheduler.policy_name == "last"
    assert scheduler.explain([1], now=0.0).replica is None
    assert [one.request_id for one in scheduler.cancel("a", now=1.0)] == ["c"]
    scheduler.check()


class Wild(Policy):
    name = "wild"

    def choose(self, view: View) -> Choice:
        return Choice(-1, "out of range")


def test_a_policy_that_chooses_nobody_there_changes_nothing() -> None:
    scheduler = GlobalScheduler(2, capacity_tokens=1000, policy=Wild())
    with pytest.raises(IndexError, match="policy 'wild' chose -1 of 2 replicas"):
        scheduler.submit("a", [1], now=0.0)
    scheduler.check()
    assert not scheduler.waiting
