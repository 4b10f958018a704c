"""Backoff and the circuit breaker."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from preble.replica.lifecycle import FIRST_DELAY, FORGIVEN_AFTER, LONGEST_DELAY, OPENS_AFTER, Lifecycle


def crash(cycle: Lifecycle, now: float) -> float:
    """A failure while serving, and the way back as fast as it is allowed; returns the time of it."""
    cycle.failed(now)
    now = max(now, cycle.retry_at)
    assert cycle.may_restart(now)
    cycle.restarted(now)
    cycle.loaded(now)
    cycle.proved(now)
    return now


def test_only_a_first_life_serves_without_a_probe() -> None:
    cycle = Lifecycle(0.0)
    cycle.loaded(1.0)
    assert cycle.state == "serving"
    cycle.failed(2.0)
    cycle.restarted(2.0)
    cycle.loaded(3.0)
    assert cycle.state == "probing"
    cycle.proved(3.5)
    assert (cycle.state, cycle.since) == ("serving", 3.5)


def test_waits_grow_until_the_breaker_opens() -> None:
    cycle = Lifecycle(0.0)
    cycle.loaded(0.0)
    now, waits = 0.0, []
    for _ in range(OPENS_AFTER + 2):
        before = now
        now = crash(cycle, now)
        waits.append(now - before)
    doubling = [FIRST_DELAY * 2**power for power in range(OPENS_AFTER - 2)]
    assert waits == [0.0, *doubling, LONGEST_DELAY, LONGEST_DELAY, LONGEST_DELAY]


def test_an_open_breaker_lets_one_attempt_through_after_each_wait() -> None:
    cycle = Lifecycle(0.0)
    for failure in range(1, OPENS_AFTER + 3):
        cycle.failed(cycle.retry_at)
        assert cycle.open == (failure >= OPENS_AFTER)
        assert not cycle.open or not cycle.may_restart(cycle.retry_at - 0.001)
        cycle.restarted(cycle.retry_at)
    cycle.loaded(cycle.retry_at)
    assert cycle.open
    cycle.proved(cycle.retry_at)
    assert not cycle.open


def test_half_a_minute_of_service_makes_up_for_the_past() -> None:
    cycle = Lifecycle(0.0)
    cycle.loaded(0.0)
    now = crash(cycle, crash(cycle, 0.0))
    assert cycle.recent_failures(now + FORGIVEN_AFTER - 0.001) == 2
    assert cycle.recent_failures(now + FORGIVEN_AFTER) == 0
    cycle.failed(now + FORGIVEN_AFTER)
    assert cycle.failures == 1
    assert cycle.retry_at == now + FORGIVEN_AFTER


def test_starting_and_probing_for_long_is_no_service() -> None:
    cycle = Lifecycle(0.0)
    cycle.failed(100.0)
    cycle.restarted(200.0)
    cycle.failed(300.0)
    assert cycle.failures == 2


class LifecycleMachine(RuleBasedStateMachine):
    """Any order of events that can happen; waits are bounded, and nothing starts before its time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cycle = Lifecycle(self.now)
        self.served = False

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.cycle.state == "starting")
    @rule()
    def it_loads(self) -> None:
        self.cycle.loaded(self.now)
        assert self.cycle.state == ("probing" if self.cycle.restarts else "serving")

    @precondition(lambda self: self.cycle.state == "probing")
    @rule()
    def it_answers_the_probe(self) -> None:
        self.cycle.proved(self.now)
        assert self.cycle.state == "serving"

    @precondition(lambda self: self.cycle.state != "waiting")
    @rule()
    def it_fails(self) -> None:
        self.cycle.failed(self.now)
        assert self.now <= self.cycle.retry_at <= self.now + LONGEST_DELAY
        assert (self.cycle.retry_at == self.now) == (self.cycle.failures == 1)

    @precondition(lambda self: self.cycle.may_restart(self.now))
    @rule()
    def it_is_started_again(self) -> None:
        self.cycle.restarted(self.now)

    @invariant()
    def only_what_waited_may_restart(self) -> None:
        if self.cycle.may_restart(self.now):
            assert self.cycle.state == "waiting"
            assert self.now >= self.cycle.retry_at
        assert self.cycle.recent_failures(self.now) <= self.cycle.failures


TestLifecycle = LifecycleMachine.TestCase
