"""The tests' own tools: strategies give what they promise, and the machine notices what has gone wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from preble.errors import InvalidRequest
from preble.sched import E2, POLICIES, Choice, E2Paper, GlobalScheduler, Placement, Policy, ReplicaView, View
from preble.sched.policies import RoundRobin
from preble.sched.testing import (
    Arrival,
    E2Machine,
    E2PaperMachine,
    SchedulerMachine,
    TokenCost,
    arrivals,
    bursty_times,
    check_policy,
    continuations,
    deliveries,
    leads_to,
    machine_for,
    namespaces,
    prompt_families,
    prompts,
    steady_times,
)
from preble.sched.testing.model import ModelReplica

QUICK = settings(database=None, derandomize=True)


# Strategies


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


@given(prompts(4, max_pages=2, vocabulary=2))
def test_prompts_end_anywhere_up_to_their_longest(tokens: tuple[int, ...]) -> None:
    assert 1 <= len(tokens) <= 11
    assert set(tokens) <= {0, 1}


@given(st.data())
def test_continuations_keep_to_their_bounds(data: st.DataObject) -> None:
    earlier = data.draw(st.lists(prompts(2, max_pages=9), min_size=1, max_size=3))
    tokens = data.draw(continuations(earlier, 2, max_pages=2))
    assert 1 <= len(tokens) <= 5


LONG = (1, 2, 1, 1, 2)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda tokens: tokens == LONG,
        lambda tokens: len(tokens) > len(LONG) and tokens[: len(LONG)] == LONG,
        lambda tokens: in_common(tokens, LONG) == 4 < len(tokens),
        lambda tokens: in_common(tokens, LONG) == 3 < len(tokens),
        lambda tokens: tokens == LONG[:2],
        lambda tokens: in_common(tokens, LONG) == 0,
    ],
    ids=["repeated", "continued", "cut at a page", "cut inside a page", "the beginning alone", "nothing shared"],
)
def test_continuations_come_in_every_kind(wanted: Callable[[tuple[int, ...]], bool]) -> None:
    find(continuations([LONG], 2), wanted, settings=QUICK)


@given(prompt_families(3, max_prompts=5, max_pages=2))
def test_families_keep_to_their_bounds(family: list[tuple[int, ...]]) -> None:
    assert 1 <= len(family) <= 5
    assert all(1 <= len(tokens) <= 8 for tokens in family)


def test_families_branch() -> None:
    def branches(family: list[tuple[int, ...]]) -> bool:
        one, other = family[0], family[-1]
        return 3 <= in_common(one, other) < min(len(one), len(other))

    find(prompt_families(3), branches, settings=QUICK)


@given(st.integers(1, 6).flatmap(steady_times))
def test_steady_times_have_one_gap(times: list[float]) -> None:
    gaps = {later - time for time, later in pairwise(times)}
    assert times[0] == 0.0
    assert len(gaps) <= 1
    assert all(0 < gap <= 1 for gap in gaps)


@given(st.integers(1, 6).flatmap(bursty_times))
def test_bursty_times_do_not_go_back(times: list[float]) -> None:
    assert times[0] == 0.0
    assert times == sorted(times)


def test_bursts_are_followed_by_pauses() -> None:
    find(bursty_times(6), lambda times: len(set(times)) == 2 and times.count(0.0) == 3, settings=QUICK)


@given(arrivals(2, start=7.0, max_arrivals=3))
def test_arrivals_are_taken_by_a_scheduler_as_they_are(requests: list[Arrival]) -> None:
    assert 1 <= len(requests) <= 3
    times = [one.time for one in requests]
    assert times[0] == 7.0
    assert times == sorted(times)
    scheduler = GlobalScheduler(1, capacity_tokens=400, page_size=2)
    for number, one in enumerate(requests):
        explained = scheduler.explain(one.token_ids, now=one.time, **one.options)
        answer = scheduler.submit(str(number), one.token_ids, now=one.time, **one.options)
        assert explained.reason == answer.reason
        assert one.deadline is None or one.deadline > one.time
    scheduler.check()


def test_arrivals_share_prefixes_with_earlier_prompts() -> None:
    earlier = [(2, 1, 2, 2, 1, 2)]
    find(arrivals(2, earlier=earlier), lambda found: found[0].token_ids == earlier[0], settings=QUICK)


def test_most_requests_come_without_a_namespace() -> None:
    assert find(namespaces(), bool, settings=QUICK) == "tenant"
    assert find(namespaces(), lambda _: True, settings=QUICK) == ""


@given(st.integers(0, 6), st.integers(0, 3), st.data())
def test_deliveries_bring_every_event_in_time(count: int, held_back: int, data: st.DataObject) -> None:
    arrived = data.draw(deliveries(range(count), held_back=held_back, repeats=2))
    assert set(arrived) == set(range(count))
    assert count <= len(arrived) <= count + 2
    firsts = list(dict.fromkeys(arrived))
    for place, event in enumerate(firsts):
        assert sum(later > event for later in firsts[:place]) <= held_back


def test_deliveries_reorder_and_repeat() -> None:
    assert find(deliveries("abc"), lambda found: found[0] == "c", settings=QUICK)[0] == "c"
    find(deliveries("abc"), lambda found: found[-1] == "a" and found.count("a") == 2, settings=QUICK)
    assert find(deliveries(""), lambda _: True, settings=QUICK) == []


def test_token_costs_are_told_in_advance() -> None:
    cost = TokenCost(0.5)
    assert cost.step_seconds([(3, 100), (1, 9)], 2, 99) == 3.0
    assert cost.prefill_seconds(4, 1000) == 2.0
    assert cost.decode_seconds(3, 5000) == 1.5
    assert repr(cost) == "TokenCost(0.5)"
    assert cost.name == "0.5 s per token"


def test_leads_to_finds_what_is_remembered_and_how() -> None:
    class Book:
        pass

    kept, lost = Book(), Book()
    shelf = {"list": [(kept,)]}
    ways = leads_to(shelf, [kept, lost])
    assert ways == ["dict > list > tuple > Book"]
    assert leads_to(shelf, [lost]) == []
    assert leads_to(lambda: kept, [kept]) != [], "what a function closes over is its own"
    assert leads_to(Book, [pytest]) == [], "but not the modules that all classes and functions know"


# The machine


class Turns(Policy):
    """Changes where it is only asked."""

    name = "turns"

    def __init__(self) -> None:
        self.turn = 0

    def choose(self, view: View) -> Choice | None:
        self.turn += 1
        return Choice(self.turn % len(view.replicas), "turn")


class Collector(RoundRobin):
    """Keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[ReplicaView] = []

    def review(self, replicas: Sequence[ReplicaView], now: float) -> None:
        self.seen.extend(replicas)


class Sibling(Policy):
    """Decides by what is no part of the history: which of its kind it is."""

    name = "sibling"
    born = 0

    def __init__(self) -> None:
        Sibling.born += 1
        self.number = Sibling.born

    def choose(self, view: View) -> Choice | None:
        return Choice(self.number % len(view.replicas), "by birth")


class Beyond(Policy):
    """Takes the second of one."""

    name = "beyond"

    def choose(self, view: View) -> Choice | None:
        return Choice(1, "second")


class Refuser(Policy):
    """Takes nothing."""

    name = "refuser"

    def choose(self, view: View) -> Choice | None:
        return None


class Fickle(RoundRobin):
    """Accepts what it refused just before, without being told anything in between."""

    def __init__(self) -> None:
        self.asked = 0

    def accepts(self, replicas: Sequence[ReplicaView]) -> bool:
        self.asked += 1
        return self.asked % 2 == 0


class NoExploitation(E2Paper):
    """The part of E2 that explores."""

    def choose(self, view: View) -> Choice | None:
        free = self._free(view.replicas)
        return self._explore(view, free) if free else None


class TooLateBinding(E2Paper):
    """Waits for replicas that have nothing to do at all."""

    def _free(self, replicas: Sequence[ReplicaView]) -> list[int]:
        return [index for index, replica in enumerate(replicas) if not replica.in_flight]


def run(policy: str | Callable[[], Policy]) -> None:
    """Until something fails, without looking for the shortest history that does."""
    quick = settings(
        QUICK,
        max_examples=200,
        stateful_step_count=20,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine_for(policy), settings=quick)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Turns, "explain said"),
        (Collector, "a removed replica is remembered: .*Collector > list > Ledger"),
        (Sibling, "in the replay"),
        (Beyond, "chose 1 of 1 replicas"),
        (Refuser, "nothing is in flight that could release it"),
        (Fickle, "could have been served before"),
        (NoExploitation, "explore.* though these tokens are cached"),
        (TooLateBinding, "waits, and replica . is free"),
    ],
)
def test_a_wrong_policy_is_noticed(policy: Callable[[], Policy], message: str) -> None:
    with pytest.raises((AssertionError, IndexError), match=message):
        run(policy)


def test_a_wrong_scheduler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: GlobalScheduler, request_id: str, *, now: float, place: bool = True) -> list[Placement]:
        self._advance(now)
        self._requests.pop(request_id, None)
        return []

    monkeypatch.setattr(GlobalScheduler, "cancel", forgetful)
    with pytest.raises((AssertionError, KeyError)):
        run("round-robin")


def test_the_default_machine_is_that_of_a_name_or_of_what_makes_a_policy() -> None:
    assert issubclass(machine_for("e2"), E2Machine)
    assert issubclass(machine_for(lambda: E2(late_binding=False)), E2Machine)
    assert issubclass(machine_for("e2-paper"), E2PaperMachine)
    for name in set(POLICIES) - {"e2", "e2-paper"}:
        machine = machine_for(name)
        assert issubclass(machine, SchedulerMachine)
        assert not issubclass(machine, E2Machine | E2PaperMachine)
    machine = machine_for(Turns)
    assert machine.__name__ == "TurnsMachine"
    assert machine.TestCase.__name__ == "TurnsMachine.TestCase"
    first, second = (machine().new_policy() for _ in range(2))
    assert first is not second
    assert isinstance(SchedulerMachine().new_policy(), E2)


@pytest.mark.parametrize("check", [machine_for, check_policy])
def test_a_policy_itself_is_refused_as_the_machine_needs_fresh_ones(check: Callable[[object], object]) -> None:
    with pytest.raises(InvalidRequest, match="give the class or a function that makes the policy"):
        check(Turns())
    with pytest.raises(InvalidRequest, match="did you mean 'round-robin'"):
        check("round-robbin")


def test_check_policy_gives_the_shortest_history() -> None:
    """In the notes of the error, as hypothesis prints it."""
    with pytest.raises(AssertionError) as caught:
        check_policy(Turns, max_examples=50, steps=5)
    notes = "\n".join(caught.value.__notes__)
    assert "state = TurnsMachine()" in notes
    assert "state.start(count=2" in notes
    check_policy(RoundRobin, max_examples=5, steps=5)


# The model


def test_the_model_evicts_no_page_before_those_behind_it() -> None:
    replica = ModelReplica(8, 1)
    first, second, branch = ("", (1,)), ("", (1, 2)), ("", (1, 3))
    replica.say(0, [first, second, branch], stored=True)
    assert replica.victims([]) == [second, branch]
    assert replica.victims([second]) == [branch]
    assert replica.victims([], without=[second, branch]) == [first]
    replica.say(0, [branch], stored=False)
    assert [event.sequence for event, _ in replica.held_back] == [1, 2]
    replica.deliver(1)
    replica.deliver(0)
    assert replica.stated == {first, second} == set(replica.cache)


# Imports and documentation


def test_every_public_name_is_described() -> None:
    import preble.sched.testing

    for name in preble.sched.testing.__all__:
        assert getattr(preble.sched.testing, name).__doc__, name


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_scheduler_does_without_hypothesis() -> None:
    code = (
        "import sys, preble.sched\n"
        "for name in preble.sched.__all__: getattr(preble.sched, name)\n"
        "assert 'hypothesis' not in sys.modules\n"
        "assert not any(name.startswith('preble.sched.testing') for name in sys.modules)\n"
    )
    assert python(code).stderr == ""


def test_who_lacks_hypothesis_is_told_so() -> None:
    result = python("import sys; sys.modules['hypothesis'] = None; import preble.sched.testing")
    assert "ImportError: preble.sched.testing needs hypothesis; install it, or preble[test]" in result.stderr
