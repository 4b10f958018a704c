"""The global scheduler under everything that can happen at once, against a model of every replica's cache.

Cache events are held back, reordered, repeated, and cross the events of requests; replicas come, go, crash and drain;
requests are cancelled. After every step the scheduler proves its own invariants and is compared with the model: where
each request is, what each replica holds, what is predicted, and in what order requests wait. In the end the whole run
is played again on a fresh scheduler and must give the same answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from preble.errors import InvalidRequest
from preble.sched import (
    POLICIES,
    Admitted,
    Event,
    Evicted,
    Finished,
    GlobalScheduler,
    Placement,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
    Waiting,
)
from preble.sched.hashing import namespace_salt, page_hashes

PAGE = 2
WINDOW = 20.0
REORDERED = 4
"""How far a cache event may fall behind."""

Page = tuple[str, tuple[int, ...]]
"""A namespace and the prefix that ends with the page."""

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
namespaces = st.sampled_from(["", "", "tenant"])
outputs = st.lists(st.integers(0, 1), max_size=4)
arrivals = st.tuples(prompts, namespaces, st.integers(0, 1), st.none() | st.integers(1, 3), st.none() | outputs)


def pages_of(namespace: str, tokens: list[int]) -> list[Page]:
    return [(namespace, tuple(tokens[:stop])) for stop in range(PAGE, len(tokens) + 1, PAGE)]


def names_of(pages: list[Page]) -> np.ndarray:
    return np.array(
        [page_hashes(np.array(t, np.int32), PAGE, base=namespace_salt(ns))[-1] for ns, t in pages], np.uint64
    )


@dataclass
class ModelRequest:
    namespace: str
    prompt: list[int]
    urgency: tuple[int, float, int]
    replica: int | None = None
    predicted: bool = False
    placed_at: float = 0.0
    admitted: bool = False
    output: list[int] = field(default_factory=list)
    last_event: Event | None = None

    @property
    def prompt_pages(self) -> list[Page]:
        return pages_of(self.namespace, self.prompt)


@dataclass
class ModelReplica:
    up: bool = True
    draining: bool = False
    cache: set[Page] = field(default_factory=set)
    """What the replica really holds."""
    sequence: int = 0
    held_back: list[tuple[Stored | Evicted, list[Page]]] = field(default_factory=list)
    delivered: list[Stored | Evicted] = field(default_factory=list)
    newest: dict[Page, tuple[int, bool]] = field(default_factory=dict)
    """The newest statement delivered about each page."""

    @property
    def stated(self) -> set[Page]:
        return {page for page, (_, stored) in self.newest.items() if stored}


class SchedulerMachine(RuleBasedStateMachine):
    policy = "e2"

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self.scheduler = self.fresh()
        self.replicas = {number: ModelReplica() for number in range(2)}
        self.requests: dict[str, ModelRequest] = {}
        self.submitted = 0

    def fresh(self) -> GlobalScheduler:
        return GlobalScheduler(2, capacity_tokens=400, page_size=PAGE, policy=self.policy, seed=5, window=WINDOW)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self.scheduler, method)(*args, **options)
        self.calls.append((method, args, options, answer))
        return answer

    def apply(self, event: Event) -> None:
        self.note(self.call("apply", event, now=self.now))

    def note(self, placements: list[Placement], *, complete: bool = True) -> None:
        order = [self.requests[one.request_id].urgency for one in placements]
        assert order == sorted(order)
        for one in placements:
            self.placed(one)
        if complete and self.eligible:
            assert not self.waiting, "nothing need wait while a replica is free"

    def placed(self, placement: Placement) -> None:
        request = self.requests[placement.request_id]
        assert request.replica is None
        assert placement.replica in self.eligible
        request.replica = placement.replica
        request.placed_at = self.now
        request.admitted = False
        request.predicted = not set(request.prompt_pages) <= self.replicas[placement.replica].stated

    @property
    def eligible(self) -> list[int]:
        return [number for number, one in self.replicas.items() if one.up and not one.draining]

    @property
    def waiting(self) -> list[str]:
        return [name for name, one in self.requests.items() if one.replica is None]

    @property
    def running(self) -> list[str]:
        return [name for name, one in self.requests.items() if one.replica is not None]

    def on(self, replica: int) -> dict[str, ModelRequest]:
        return {name: one for name, one in self.requests.items() if one.replica == replica}

    def pick(self, data: st.DataObject, names: list[Any]) -> Any:
        return data.draw(st.sampled_from(sorted(names)))

    # Requests

    @rule(requests=st.lists(arrivals, min_size=1, max_size=4))
    def submit(self, requests: list[tuple[list[int], str, int, int | None, list[int] | None]]) -> None:
        """Some requests at once, some of which get to work right away."""
        for prompt, namespace, priority, deadline, tokens in requests:
            name = f"r{self.submitted}"
            before = self.scheduler.explain(prompt, now=self.now, namespace=namespace)
            urgency = (-priority, math.inf if deadline is None else deadline, self.submitted)
            self.requests[name] = request = ModelRequest(namespace, prompt, urgency)
            self.submitted += 1
            options = {"namespace": namespace, "priority": priority, "deadline": deadline}
            answer = self.call("submit", name, prompt, now=self.now, **options)
            assert answer.request_id == name
            if isinstance(answer, Waiting):
                assert (before.replica, before.reason) == (None, answer.reason)
                continue
            assert (before.replica, before.reason) == (answer.replica, answer.reason)
            assert {one.replica: one.cached_tokens for one in before.candidates}[answer.replica] == answer.cached_tokens
            self.placed(answer)
            self.compare_knowledge(request)
            if tokens is not None:
                self.work_on(name, tokens)

    def compare_knowledge(self, request: ModelRequest) -> None:
        """For a while after a prompt was used its tokens are known, so all that was said about them must show."""
        after = self.scheduler.explain(request.prompt, now=self.now, namespace=request.namespace)
        for one in after.candidates:
            stated = self.replicas[one.replica].stated
            promised = {
                page for other in self.on(one.replica).values() if other.predicted for page in other.prompt_pages
            }
            assert one.confirmed_tokens == run_length(request.prompt_pages, stated)
            assert one.cached_tokens == run_length(request.prompt_pages, stated | promised)
            assert one.in_flight == len(self.on(one.replica))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = self.pick(data, list(self.requests))
        request = self.requests.pop(name)
        self.note(self.call("cancel", name, now=self.now), complete=False)
        assert self.scheduler.cancel(name, now=self.now) == []
        if request.replica is not None:
            self.apply(Finished(request.replica, name))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=outputs)
    def work(self, data: st.DataObject, tokens: list[int]) -> None:
        self.work_on(self.pick(data, self.running), tokens)

    def work_on(self, name: str, tokens: list[int]) -> None:
        """Steps on a request: admission, a part of its prompt, or all of it and some tokens. The replica caches the
        pages that it computes, those too that it had before and evicted."""
        request = self.requests[name]
        replica = request.replica
        assert replica is not None
        if not request.admitted:
            request.admitted = True
            cached = run_length(request.prompt_pages, self.replicas[replica].cache)
            self.report(request, Admitted(replica, name, cached))
        if not tokens:
            half = max(len(request.prompt) // 2, 1)
            self.compute(request, half)
            self.report(request, Progressed(replica, name, half))
        for token in tokens:
            computed = len(request.prompt) + len(request.output)
            self.compute(request, computed)
            request.output.append(token)
            self.report(request, Progressed(replica, name, computed, (token,)))

    def report(self, request: ModelRequest, event: Event) -> None:
        request.last_event = event
        self.apply(event)

    def compute(self, request: ModelRequest, computed: int) -> None:
        assert request.replica is not None
        history = (request.prompt + request.output)[:computed]
        self.say(request.replica, True, pages_of(request.namespace, history))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), repeats=st.integers(1, 2))
    def finish(self, data: st.DataObject, repeats: int) -> None:
        name = self.pick(data, self.running)
        request = self.requests.pop(name)
        assert request.replica is not None
        for _ in range(repeats):
            self.apply(Finished(request.replica, name))
        history = ModelRequest(request.namespace, request.prompt + request.output, request.urgency)
        self.compare_knowledge(history)

    # Caches

    def say(self, replica: int, stored: bool, pages: list[Page]) -> None:
        model = self.replicas[replica]
        about = [page for page in pages if (page in model.cache) is not stored]
        if not about:
            return
        model.cache = model.cache | set(about) if stored else model.cache - set(about)
        for namespace in sorted({page[0] for page in about}):
            mine = [page for page in about if page[0] == namespace]
            model.sequence += 1
            kind = Stored if stored else Evicted
            model.held_back.append((kind(replica, model.sequence, namespace, names_of(mine)), mine))
        while len(model.held_back) > REORDERED:
            self.deliver_to(replica, 0)

    @precondition(lambda self: any(one.cache for one in self.replicas.values()))
    @rule(data=st.data(), count=st.integers(1, 4))
    def evict(self, data: st.DataObject, count: int) -> None:
        replica = self.pick(data, [number for number, one in self.replicas.items() if one.cache])
        cache = set(self.replicas[replica].cache)
        gone: list[Page] = []
        for _ in range(min(count, len(cache))):
            leaves = [p for p in cache if not any(q[0] == p[0] and q[1][:-PAGE] == p[1] for q in cache)]
            page = data.draw(st.sampled_from(sorted(leaves)))
            cache.remove(page)
            gone.append(page)
        self.say(replica, False, data.draw(st.permutations(gone)))

    def deliver_to(self, replica: int, index: int) -> None:
        model = self.replicas[replica]
        event, pages = model.held_back.pop(index)
        model.delivered.append(event)
        if model.up:
            for page in pages:
                if event.sequence > model.newest.get(page, (0, False))[0]:
                    model.newest[page] = (event.sequence, isinstance(event, Stored))
            for request in self.on(replica).values():
                if set(request.prompt_pages) <= model.stated:
                    request.predicted = False
        self.apply(event)

    @precondition(lambda self: any(one.held_back for one in self.replicas.values()))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        replica = self.pick(data, [number for number, one in self.replicas.items() if one.held_back])
        self.deliver_to(replica, data.draw(st.integers(0, len(self.replicas[replica].held_back) - 1)))

    @rule(data=st.data())
    def deliver_all(self, data: st.DataObject) -> None:
        for replica, model in self.replicas.items():
            while model.held_back:
                self.deliver_to(replica, data.draw(st.integers(0, len(model.held_back) - 1)))

    # Replicas

    @rule(data=st.data())
    def change_the_fleet(self, data: st.DataObject) -> None:
        change = data.draw(st.sampled_from(["restart", "add", "drain", "remove", "lose", "restart"]))
        if change == "add":
            if len(self.replicas) < 4:
                number = self.call("add_replica")
                assert number not in self.replicas
                self.replicas[number] = ModelReplica()
        elif self.replicas:
            getattr(self, change)(self.pick(data, list(self.replicas)))

    def lose(self, replica: int) -> None:
        model = self.replicas[replica]
        model.up = False
        model.cache = set()
        model.newest = {}
        for request in self.on(replica).values():
            request.replica = None
        self.apply(ReplicaDown(replica))

    def restart(self, replica: int) -> None:
        model = self.replicas[replica]
        if not model.up:
            model.up = True
            # What is still held back belongs to the earlier life, and may come at any time.
            model.delivered += [event for event, _ in model.held_back]
            model.held_back = []
        self.apply(ReplicaUp(replica, sequence=model.sequence))

    def remove(self, replica: int) -> None:
        lost = self.on(replica)
        assert self.call("remove_replica", replica, now=self.now) == list(lost)
        for name in lost:
            del self.requests[name]
        del self.replicas[replica]
        for event in (Finished(replica, "r0"), Stored(replica, 1, "", names_of([("", (0, 0))])), ReplicaUp(replica)):
            self.apply(event)

    def drain(self, replica: int) -> None:
        self.call("drain", replica)
        self.replicas[replica].draining = True

    @rule(seconds=st.sampled_from([0.0, 1.0, WINDOW / 2, 2 * WINDOW]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.note(self.call("poll", self.now))

    @rule(data=st.data())
    def pester(self, data: st.DataObject) -> None:
        """What must have no effect: events that come again, perhaps of an earlier life, and known request ids."""
        events: list[Event] = [StepTimed(replica, 5, 1, 9, 0.01) for replica in self.replicas]
        events += [event for model in self.replicas.values() for event in model.delivered]
        last = [request.last_event for request in self.requests.values()]
        events += [event for event in last if event is not None and event.replica in self.replicas]
        if events:
            self.apply(data.draw(st.sampled_from(events)))
        for name in self.requests:
            with pytest.raises(InvalidRequest, match="already here"):
                self.scheduler.submit(name, [1], now=self.now)

    # What must hold

    @invariant()
    def proves_itself(self) -> None:
        self.scheduler.check()

    @invariant()
    def requests_are_where_the_model_has_them(self) -> None:
        for replica in self.replicas:
            assert set(self.scheduler.in_flight(replica)) == set(self.on(replica))
        assert self.scheduler.waiting == sorted(self.waiting, key=lambda name: self.requests[name].urgency)

    @invariant()
    def residency_is_what_was_stated(self) -> None:
        for replica, model in self.replicas.items():
            resident = self.scheduler.resident_pages(replica)
            assert resident == set(names_of(sorted(model.stated)).tolist())
            if model.up and not model.held_back:
                assert resident == set(names_of(sorted(model.cache)).tolist())

    @invariant()
    def what_is_known_of_a_running_request_is_right(self) -> None:
        recent = [
            one for one in self.requests.values() if one.replica is not None and one.placed_at >= self.now - WINDOW
        ]
        for request in recent[-3:]:
            self.compare_knowledge(request)

    @invariant()
    def explaining_changes_nothing(self) -> None:
        first, second = (str(self.scheduler.explain([0, 1, 2, 0], now=self.now)) for _ in range(2))
        assert first == second

    def teardown(self) -> None:
        again = self.fresh()
        for method, args, options, answer in self.calls:
            assert getattr(again, method)(*args, **options) == answer


def run_length(pages: list[Page], held: set[Page]) -> int:
    """Tokens of the leading pages that are held."""
    count = 0
    while count < len(pages) and pages[count] in held:
        count += 1
    return count * PAGE


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_policy_survives_anything(policy: str) -> None:
    machine = type("Machine", (SchedulerMachine,), {"policy": policy})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
