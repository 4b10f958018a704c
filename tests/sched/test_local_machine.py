"""The local scheduler under everything that can happen to it, with every invariant checked after every step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pretend_engine import PretendEngine

from preble.sched.events import Admitted, Event, Finished, Preempted
from preble.sched.local import LOOKS, LocalScheduler
from preble.sched.orders import ORDERS
from preble.sched.orders.queue import urgent_from
from preble.sched.sequence import Sequence

STEMS = [[0] * 40, [0, 1] * 20, [0] * 10 + [1] * 30, [2, 1, 0, 0] * 10]


class WatchedEngine(PretendEngine):
    """Counts the admissions that every waiting request has to see, and what its bound is made of."""

    def __init__(self, scheduler: LocalScheduler, rng: random.Random, ending: float, ahead: int) -> None:
        super().__init__(scheduler, rng, ending, ahead)
        self.requests: dict[str, Sequence] = {}
        self.before: dict[str, int] = {}
        """Waiting request -> older ones of its class that waited when it began to wait, or came back since."""
        self.seen: dict[str, int] = {}
        """Waiting request -> admissions of its class since then, urgent ones not counted."""

    def waits(self, one: Sequence) -> None:
        peers = [self.requests[name] for name in self.before if self.requests[name].priority == one.priority]
        self.requests[one.request_id] = one
        self.before[one.request_id] = sum(peer.serial < one.serial for peer in peers)
        self.seen[one.request_id] = 0
        for peer in peers:
            self.before[peer.request_id] += one.serial < peer.serial

    def left(self, name: str) -> None:
        self.before.pop(name, None)
        self.seen.pop(name, None)

    def apply(self, event: Event) -> None:
        super().apply(event)
        if isinstance(event, Preempted):
            if self.scheduler.get(event.request_id) is not None:
                self.waits(self.requests[event.request_id])
        elif isinstance(event, Finished):  # preempted, and then ended by a step that was in flight
            self.left(event.request_id)
        elif isinstance(event, Admitted):
            admitted = self.requests[event.request_id]
            self.left(event.request_id)
            for name in self.seen:
                same_class = self.requests[name].priority == admitted.priority
                self.seen[name] += same_class and urgent_from(admitted) > self.now

    def check_bounds(self) -> None:
        waiting = {one.request_id: one for one in self.scheduler.waiting}
        assert waiting.keys() == self.before.keys()
        every = self.scheduler.waiting.order.oldest_every
        for name, one in waiting.items():
            assert self.seen[name] < every * (self.before[name] + one.passed + 1), f"{name} waits beyond its bound"


class LocalMachine(RuleBasedStateMachine):
    order: str

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 8]),
        capacity=st.integers(12, 90),
        budget=st.integers(1, 40),
        max_running=st.sampled_from([1, 2, 5, 64]),
        ending=st.sampled_from([0.02, 0.2, 0.6]),
        ahead=st.sampled_from([0, 1, 1, 2]),
        seed=st.integers(0, 2**16),
    )
    def begin(
        self, page_size: int, capacity: int, budget: int, max_running: int, ending: float, ahead: int, seed: int
    ) -> None:
        self.scheduler = LocalScheduler(
            pages=-(-capacity // page_size),
            page_size=page_size,
            max_batched_tokens=budget,
            max_running=max_running,
            order=self.order,
        )
        self.engine = WatchedEngine(self.scheduler, random.Random(seed), ending, ahead)
        self.names: list[str] = []
        self.aborted: set[str] = set()
        self.added_prompt_tokens: dict[str, int] = {}

    @rule(
        stem=st.sampled_from(STEMS),
        stem_length=st.integers(0, 40),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        generated=st.sampled_from([0, 0, 0, 3]),
        output=st.integers(1, 40),
        namespace=st.sampled_from(["", "", "tenant"]),
        priority=st.sampled_from([0, 0, 0, 1, -7]),
        deadline=st.sampled_from([None, None, None, -1.0, 2.0, 30.0]),
        hint=st.sampled_from([None, None, 1.0, 10.0, 500.0]),
        burst=st.sampled_from([1, 1, 1, LOOKS + 4]),
        lockstep=st.sampled_from([False, False, True]),
    )
    def add(
        self,
        stem: list[int],
        stem_length: int,
        tail: list[int],
        generated: int,
        output: int,
        namespace: str,
        priority: int,
        deadline: float | None,
        hint: float | None,
        burst: int,
        lockstep: bool,
    ) -> None:
        """A request, or a burst of them; some come from another replica, with output."""
        capacity = self.scheduler.capacity_tokens
        tokens = ([*stem[:stem_length], *tail])[: capacity - 1]
        for _ in range(burst):
            one = Sequence(
                str(len(self.names)),
                np.array(tokens, np.int32),
                prompt_length=max(len(tokens) - generated, 1),
                max_length=min(len(tokens) + output, capacity),
                namespace=namespace,
                priority=priority,
                deadline=None if deadline is None else self.engine.now + deadline,
                expected_tokens=hint,
                lockstep=lockstep,
            )
            self.scheduler.add(one, now=self.engine.now)
            self.engine.waits(one)
            self.names.append(one.request_id)
            self.added_prompt_tokens[one.request_id] = one.prompt_length

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.everything_holds()

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        if self.scheduler.abort(name) is not None:
            self.aborted.add(name)
            self.engine.left(name)
        self.engine.take_events()

    @rule(seconds=st.sampled_from([0.0, 0.0, 2.0, 30.0]))
    def expire(self, seconds: float) -> None:
        """Who waits too long leaves, perhaps preempted and with a step in flight; who runs stays."""
        self.engine.now += seconds
        scheduler, now = self.scheduler, self.engine.now
        late = {one.request_id for one in scheduler.waiting if one.deadline <= now}
        running = list(scheduler.running)
        assert {one.request_id for one in scheduler.expire(now)} == late
        assert scheduler.running == running
        for name in late:
            assert scheduler.get(name) is None
            self.aborted.add(name)
            self.engine.left(name)
        self.engine.take_events()

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.scheduler.running))
        assert self.scheduler.preempt(one.request_id)
        self.engine.take_events()

    @rule()
    def forget_prefixes(self) -> None:
        self.scheduler.cache.clear()
        self.engine.take_events()

    @rule()
    def reset_prefix_cache(self) -> None:
        """Perhaps with steps in flight. What is computed from older KV must not be read by anyone else from now on."""
        self.engine.reset_prefix_cache()

    @rule(seconds=st.sampled_from([0.0, 5.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.engine.now += seconds

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check()
        self.engine.check_bounds()
        held = sum(map(len, self.engine.resident.values()))
        assert held == sum(len(run.pages) for run in scheduler.cache._tree.nodes())
        ever = {name for name in self.names if name in self.engine.admitted}
        assert scheduler.prompt_tokens == sum(self.added_prompt_tokens[name] for name in ever), "counted once each"
        assert scheduler.cached_tokens <= scheduler.prompt_tokens

    def teardown(self) -> None:
        """Everybody is served in the end, and nothing is left behind."""
        if not hasattr(self, "scheduler"):
            return
        scheduler, engine = self.scheduler, self.engine
        engine.ending = 0.5
        steps = 0
        while scheduler.running or scheduler.waiting or engine.flying:
            assert engine.step(), "requests are left and nothing is planned"
            self.everything_holds()
            steps += 1
            assert steps < 20_000, "no progress"
        engine.step()
        assert set(engine.finished) == set(self.names) - self.aborted
        assert sorted(engine.told_finished) == sorted(self.names)
        assert scheduler.cache.in_use == 0
        scheduler.cache.clear()
        assert scheduler.cache.pool.free == scheduler.cache.pool.total


def run(order: str, examples: int) -> None:
    machine: Any = type(f"LocalMachine_{order}", (LocalMachine,), {"order": order})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("order", ORDERS)
def test_the_local_scheduler_holds_under_everything(order: str) -> None:
    run(order, examples=40)


@pytest.mark.long
@pytest.mark.parametrize("order", ORDERS)
def test_the_local_scheduler_holds_under_everything_for_long(order: str) -> None:
    run(order, examples=2000)
