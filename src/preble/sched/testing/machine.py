"""The global scheduler and a policy under everything that can happen at once, against a model of every replica.

Cache events are held back, reordered, repeated, and cross the events of requests; replicas of different size and speed
come, go, crash and drain; requests wait, are preempted and cancelled. After every step the scheduler proves its own
invariants and is compared with the model. In the end the whole run is played again on a fresh scheduler, without the
explanations asked for in between, and must give the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from preble.errors import InvalidRequest
from preble.sched.events import (
    Admitted,
    Event,
    Finished,
    Preempted,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
)
from preble.sched.invariants import require
from preble.sched.prefix_tree import MOST_SWEPT
from preble.sched.testing.arrivals import Arrival, arrivals
from preble.sched.testing.comparison import WINDOW, Comparison
from preble.sched.testing.model import ModelReplica, ModelRequest, Page, names_of, on, pages_of, run_length
from preble.sched.testing.prompts import Prompt
from preble.sched.testing.token_cost import TokenCost
from preble.sched.testing.traces import leads_to

HELD_BACK = 8
"""Most cache events of a replica that are on their way at any time."""

MOST_REPLICAS = 4

sizes = st.sampled_from([5, 9, 60])
"""Of a replica, in pages."""

speeds = st.sampled_from([0.02, 0.001, 0.02, 0.5])
"""Of a replica, in seconds per token."""


class SchedulerMachine(Comparison):
    """Checks a policy: `machine_for` and `check_policy` make machines of it, and so does a subclass.

    Rules and invariants of your own go into a subclass. There `scheduler` is the one under test, `policy` its policy;
    call it by `call`, so that the replay does the same, and hand placements to `note`; `now` is the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.histories: list[Prompt] = []
        """Prompts, and prompts with answers, for others to continue."""
        self.submitted = 0
        self.pages = 1
        """Of a replica, unless it is given others."""
        self.reported: list[Admitted | Progressed | Preempted | Finished] = []
        """By replicas of their requests, those included that were moved off them meanwhile."""

    @initialize(
        count=st.sampled_from([2, 3, 1, 0]),
        page_size=st.sampled_from([1, 2, 3]),
        pages=sizes,
        speed=speeds,
        seed=st.integers(0, 9),
    )
    def start(self, count: int, page_size: int, pages: int, speed: float, seed: int) -> None:
        """A scheduler with some replicas, or none yet."""
        self.page_size, self.pages = page_size, pages
        self.make_scheduler(
            capacity_tokens=pages * page_size,
            page_size=page_size,
            max_batched_tokens=8,
            cost=TokenCost(speed),
            seed=seed,
            window=WINDOW,
        )
        for _ in range(count):
            self._add_replica(pages)

    # Requests

    @rule(data=st.data(), repair=st.sampled_from([True, True, True, False]))
    def submit(self, data: st.DataObject, repair: bool) -> None:
        """Some requests, at once or one after the other; mostly there is somebody to serve them."""
        if repair and not self.eligible:
            self._add_replica(self.pages)
        earlier = self.histories[-6:]
        for arrival in data.draw(arrivals(self.page_size, earlier=earlier, start=self.now, max_pages=3)):
            self._until(arrival.time)
            self._submit(arrival)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), count=st.sampled_from([3, 9]), waits=st.sampled_from([(0.0,), (5.0,), (1.0, 6.0)]))
    def rush(self, data: st.DataObject, count: int, waits: tuple[float, ...]) -> None:
        """One prompt, asked for again and again. After a while the replicas get to work on it; perhaps it all comes
        back in the next half of the window, when it waits for longer."""
        tokens = data.draw(st.sampled_from(self.histories[-6:]))[: 4 * self.page_size]
        for wait in waits:
            for number in range(count):
                self._submit(Arrival(self.now, (*tokens, number % 3)))
            self._until(self.now + wait)
            for request in self.running:
                self._admit(request)
            self._submit(Arrival(self.now, (*tokens, 0)))
            if len(waits) > 1:
                for request in self.running:
                    self._finish(request)
                self._until(self.now + WINDOW / 2 - wait)

    def _submit(self, arrival: Arrival) -> None:
        request = ModelRequest(f"r{self.submitted}", arrival, self.submitted, self.page_size)
        self.submitted += 1
        self.histories.append(arrival.token_ids)
        self.submit_one(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), at_once=st.booleans())
    def cancel(self, data: st.DataObject, at_once: bool) -> None:
        """A request is cancelled, wherever it is."""
        name = data.draw(st.sampled_from(list(self.requests)))
        request = self.requests.pop(name)
        placements = self.call("cancel", name, now=self.now, place=at_once)
        if not at_once:
            require(placements == [], f"nothing was to be placed yet: {placements}")
            placements = self.call("place_waiting", now=self.now)
        self.note(placements)
        require(self.call("cancel", name, now=self.now) == [], "cancelled twice")
        if request.replica is not None:
            self.apply(Finished(request.replica, name))

    @precondition(lambda self: self.running)
    @rule(deeds=st.lists(st.sampled_from(["finish", "answer", "part", "token", "admit"]), min_size=2, max_size=6))
    def work(self, deeds: list[str]) -> None:
        """The replicas go on with their requests, with each in its own way."""
        for request, deed in zip(self.running, cycle(deeds), strict=False):
            self._work(request, deed)

    def _work(self, request: ModelRequest, deed: str) -> None:
        self._admit(request)
        if deed == "part":
            self._compute(request, max(len(request.arrival.token_ids) // 2, 1), ())
        elif deed != "admit":
            for _ in range(1 if deed == "token" else 2 * self.page_size):
                self._compute(request, len(request.history), (len(request.history) % 3,))
        if deed == "finish":
            self._finish(request)

    def _admit(self, request: ModelRequest) -> None:
        replica = request.replica
        assert replica is not None
        if request.queued:
            pages = pages_of(request.arrival.namespace, request.history, self.page_size)
            cached = run_length(pages, self.replicas[replica].cache)
            request.computed = pages[:cached]
            request.queued = False
            request.to_prefill = max(len(request.history) - cached * self.page_size, 1)
            self._report(request, Admitted(replica, request.name, cached * self.page_size))

    def _compute(self, request: ModelRequest, computed: int, new: tuple[int, ...]) -> None:
        """A step. The pages that it fills are cached; where there is no room for them the request is preempted."""
        replica = request.replica
        assert replica is not None
        if request.queued:
            return  # preempted by the step before
        pages = pages_of(request.arrival.namespace, request.history[:computed], self.page_size)
        if not self._make_room(replica, pages):
            self._preempt(request)
            return
        self._say(replica, self.replicas[replica].missing(pages), stored=True)
        request.computed = pages
        request.output += new
        left = len(request.history) - computed
        request.decoding = left <= 1 and computed >= len(request.arrival.token_ids)
        request.to_prefill = 0 if request.decoding else left
        self._report(request, Progressed(replica, request.name, computed, new))

    def _make_room(self, replica: int, pages: list[Page]) -> bool:
        model = self.replicas[replica]
        while len(model.cache) + len(model.missing(pages)) > model.capacity_pages:
            victims = self._victims(replica, keeping=pages)
            if not victims:
                return False
            self._say(replica, victims[:1], stored=False)
        return True

    def _victims(self, replica: int, keeping: Sequence[Page] = (), without: Sequence[Page] = ()) -> list[Page]:
        used = [page for one in on(self.requests, replica) for page in one.computed]
        return self.replicas[replica].victims([*used, *keeping], without)

    @precondition(lambda self: any(not one.queued for one in self.running))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """A replica puts a request back into its queue."""
        self._preempt(data.draw(st.sampled_from([one for one in self.running if not one.queued])))

    def _preempt(self, request: ModelRequest) -> None:
        assert request.replica is not None
        request.queue(min(self.page_size, len(request.history)))
        self._report(request, Preempted(request.replica, request.name))

    def _report(self, request: ModelRequest, event: Admitted | Progressed | Preempted) -> None:
        request.last_event = event
        self.reported.append(event)
        self.apply(event)

    def _finish(self, request: ModelRequest) -> None:
        del self.requests[request.name]
        assert request.replica is not None
        self.apply(Finished(request.replica, request.name))
        self.histories.append(request.history)
        self.explain(Arrival(self.now, request.history, request.arrival.namespace))

    # Caches

    def _say(self, replica: int, pages: list[Page], *, stored: bool) -> None:
        if pages:
            self.replicas[replica].say(replica, pages, stored=stored)
        while len(self.replicas[replica].held_back) > HELD_BACK:
            self._deliver(replica, 0)

    @precondition(lambda self: any(one.cache for one in self.replicas.values()))
    @rule(data=st.data(), count=st.integers(1, 4))
    def evict(self, data: st.DataObject, count: int) -> None:
        """A replica drops pages that nobody uses."""
        replica = data.draw(st.sampled_from([number for number, one in self.replicas.items() if one.cache]))
        gone: list[Page] = []
        while len(gone) < count and (victims := self._victims(replica, without=gone)):
            gone.append(data.draw(st.sampled_from(victims)))
        self._say(replica, gone[::-1], stored=False)

    @precondition(lambda self: any(one.cache for one in self.replicas.values()))
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        """A replica forgets its cache, pages in use included. Its requests go on."""
        replica = data.draw(st.sampled_from([number for number, one in self.replicas.items() if one.cache]))
        self._say(replica, list(self.replicas[replica].cache), stored=False)

    @precondition(lambda self: any(one.held_back for one in self.replicas.values()))
    @rule(data=st.data(), everything=st.booleans())
    def deliver(self, data: st.DataObject, everything: bool) -> None:
        """Cache events arrive, out of order."""
        late = [number for number, one in self.replicas.items() if one.held_back]
        for replica in late if everything else [data.draw(st.sampled_from(late))]:
            held_back = self.replicas[replica].held_back
            for _ in range(len(held_back) if everything else 1):
                self._deliver(replica, data.draw(st.integers(0, len(held_back) - 1)))

    def _deliver(self, replica: int, index: int) -> None:
        self.apply(self.replicas[replica].deliver(index))

    # Replicas

    @precondition(lambda self: len(self.replicas) < MOST_REPLICAS)
    @rule(pages=sizes, speed=speeds)
    def add(self, pages: int, speed: float) -> None:
        """One more replica, of any size and speed."""
        self._add_replica(pages, capacity_tokens=pages * self.page_size, cost=TokenCost(speed), max_batched_tokens=4)

    def _add_replica(self, pages: int, **options: Any) -> None:
        number = self.call("add_replica", **options)
        require(number not in self.replicas, f"there is a replica {number} already")
        self.replicas[number] = ModelReplica(pages, self.page_size)
        self.note(self.call("poll", self.now))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), change=st.sampled_from(["crash", "restart", "renew", "drain", "remove"]))
    def change_the_fleet(self, data: st.DataObject, change: str) -> None:
        """A replica crashes, restarts, drains or is removed."""
        getattr(self, f"_{change}")(data.draw(st.sampled_from(list(self.replicas))))

    def _crash(self, replica: int) -> None:
        self.replicas[replica].crash()
        for request in on(self.requests, replica):
            request.lose_replica()
        self.apply(ReplicaDown(replica))

    def _restart(self, replica: int) -> None:
        model = self.replicas[replica]
        if not model.up:
            model.restart()
        self.apply(ReplicaUp(replica, sequence=model.sequence))

    def _renew(self, replica: int) -> None:
        """A new process is up, and whoever carries events has dropped those of the old one."""
        if not self.replicas[replica].up:
            self.replicas[replica].renew()
        self.apply(ReplicaUp(replica))

    def _drain(self, replica: int) -> None:
        self.replicas[replica].draining = True
        here = on(self.requests, replica) if self.eligible else []
        self._move(replica, [one for one in here if one.queued], "drain")

    def _remove(self, replica: int) -> None:
        books = self.books(replica)
        del self.replicas[replica]
        self._move(replica, on(self.requests, replica), "remove_replica")
        traces = leads_to(self.scheduler, [books])
        require(not traces, f"a removed replica is remembered: {traces}")
        page = names_of([("", (0,) * self.page_size)], self.page_size)
        self.apply(Stored(replica, 1, "", page))
        self.apply(Finished(replica, "r0"))
        self.apply(ReplicaUp(replica))

    def _move(self, replica: int, requests: list[ModelRequest], method: str) -> None:
        """What the replica had, or some of it, goes elsewhere. The replica may yet report of it."""
        names = tuple(one.name for one in requests)
        for request in requests:
            request.lose_replica()
        moved = self.call(method, replica, now=self.now)
        require(moved.request_ids == names, f"{method} should move {names} off replica {replica}: {moved}")
        self.note(moved.placements)
        for name in names:
            self.reported += [Admitted(replica, name, 0), Finished(replica, name)]

    # Time

    @rule(seconds=st.sampled_from([0.0, 1.0, WINDOW / 2, 2 * WINDOW]))
    def pass_time(self, seconds: float) -> None:
        """Nothing happens for a while."""
        self._until(self.now + seconds)

    def _until(self, time: float) -> None:
        self.now = max(time, self.now)
        for _ in range(1 + self.submitted // MOST_SWEPT):  # until everything outdated is forgotten
            self.note(self.call("poll", self.now))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), speed=speeds, steps=st.integers(1, 3))
    def time_steps(self, data: st.DataObject, speed: float, steps: int) -> None:
        """A replica reports how long its steps took, which may be far from what was assumed."""
        replica = data.draw(st.sampled_from(list(self.replicas)))
        for size in range(1, steps + 1):
            new = 4 * size + 2
            self.apply(StepTimed(replica, new, 2, 40, speed * new, 4 * size * 20 + 20))

    @rule(data=st.data())
    def pester(self, data: st.DataObject) -> None:
        """What must have no effect: events that come again, perhaps of an earlier life, and known request ids."""
        events: list[Event] = [event for model in self.replicas.values() for event in model.delivered]
        events += [one.last_event for one in self.running if one.last_event is not None]
        for event in self.reported[-9:]:
            request = self.requests.get(event.request_id)
            if event.replica in self.replicas and (request is None or request.replica != event.replica):
                events.append(event)
        if events:
            self.apply(data.draw(st.sampled_from(events)))
        self.note(self.call("poll", self.now - 1.0))
        for name in self.requests:
            try:
                self.scheduler.submit(name, [1], now=self.now)
            except InvalidRequest:
                continue
            raise AssertionError(f"{name!r} was taken twice")
