"""Requests, replicas and the global scheduler on a virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from time import perf_counter
from typing import Any, TypeAlias

from preble.sched.cost import CostModel
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import make_cost
from preble.sched.events import Event, ReplicaDown, ReplicaUp
from preble.sched.hot_prefixes import HotPrefix
from preble.sched.local import LocalScheduler
from preble.sched.placement import Placement
from preble.sched.policies.base import Policy
from preble.sched.scheduler import GlobalScheduler
from preble.sim.flight import Flight
from preble.sim.replica import SimulatedReplica
from preble.sim.router import Router
from preble.sim.samples import Samples
from preble.sim.settings import Failure, Settings
from preble.sim.slow_cost import SlowCost
from preble.sim.trace import Trace

SAMPLES = 200
"""Times at which a run looks at its replicas, over the trace's duration."""

Action: TypeAlias = Callable[[Any], None]


class Simulation:
    """One trace under one policy.

    The global scheduler, the local schedulers, their page pools and prefix caches are the production code. What is pretended:
    time, the tokens themselves, and what a step takes. The schedulers are told neither how long answers are nor, if
    `Settings.believed_cost` says so, what steps really take.

    Everything that happens is a function of trace, settings and policy; only `decide_seconds` is not.

    Args:
        trace: the requests. Those that no replica can hold (`Settings.kv_tokens`) are left out, see `refused`.
        settings: the fleet.
        policy: name of a policy, or a policy; a `Router` takes the place of the whole global scheduler.
        advance: called whenever a request has ended.

    Raises:
        InvalidRequest: there is no such policy or order.
    """

    def __init__(
        self,
        trace: Trace,
        settings: Settings,
        policy: str | Policy | Router = "e2",
        *,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.trace = trace
        self.settings = settings
        self.now = 0.0
        self.decide_seconds = 0.0
        """Real seconds that the global scheduler took, for decisions and for events."""
        self.flights: list[Flight] = []
        """All requests, in order of the trace."""
        self.refused: list[int] = []
        """Positions in the trace of requests that are longer than a replica's pages hold."""
        self.hottest: list[HotPrefix] = []
        """Of the prefix tree at the last arrival; none where others than a `GlobalScheduler` decide."""
        cost, capacity = settings.cost_model, settings.kv_tokens
        believed = cost if settings.believed_cost is None else make_cost(settings.believed_cost)
        self.router: Router = (
            policy if not isinstance(policy, str | Policy) else _make_scheduler(settings, policy, believed)
        )
        self.replicas = [
            SimulatedReplica(
                LocalScheduler(
                    pages=capacity // settings.page_size,
                    page_size=settings.page_size,
                    max_batched_tokens=settings.max_batched_tokens,
                    max_running=settings.max_running,
                    replica=number,
                    order=settings.order,
                    cost=FittedCost(believed) if settings.believed_cost is not None else true_cost,
                ),
                true_cost,
                leap_seconds=settings.leap_seconds,
            )
            for number, true_cost in enumerate(_costs(cost, settings))
        ]
        self.samples = Samples(len(self.replicas))
        self._advance = advance
        self._agenda: list[tuple[float, int, Action, Any]] = []
        self._serials = count()
        self._up = [True] * len(self.replicas)
        self._lives = [0] * len(self.replicas)
        """How often each replica failed: a step of an earlier life never ends."""
        self._due: list[float] = [0.0] * len(self.replicas)
        """When the present step of each replica ends."""
        self._followers: dict[int, int] = {}
        """In a closed loop: position of a request -> that of the session's next one."""
        self._unended = self._to_come = 0
        self._schedule_arrivals(capacity)

    def run(self) -> None:
        """Until every request has ended."""
        agenda = self._agenda
        while self._unended and agenda:
            self.now, _, action, subject = heapq.heappop(agenda)
            action(subject)
        if self._unended and any(self._up):  # the very thing that must not happen
            raise AssertionError(f"{self._unended} requests never ended")

    # Arrivals

    def _schedule_arrivals(self, capacity: int) -> None:
        last_of_session: dict[str, int] = {}
        usable = capacity // self.settings.page_size * self.settings.page_size
        start = self.trace.requests[0].arrival if self.trace.requests else 0.0
        for number, traced in enumerate(self.trace.requests):
            limit = usable - traced.prompt_tokens
            flight = Flight(
                number, traced, max(min(limit, self.settings.max_tokens), traced.output_tokens), traced.arrival - start
            )
            self.flights.append(flight)
            if traced.output_tokens > limit:
                self.refused.append(number)
                continue
            self._unended += 1
            self._to_come += 1
            before = (
                last_of_session.get(traced.session)
                if self.settings.closed_loop and traced.session is not None
                else None
            )
            if before is None:
                self._at(flight.arrived, self._arrive, flight)
            else:
                self._followers[before] = number
            if traced.session is not None:
                last_of_session[traced.session] = number
        for failure in self.settings.failures:
            self._at(failure.at, self._fail, failure)
        duration = self.trace.duration
        if duration > 0:
            for number in range(1, SAMPLES + 1):
                self._at(duration * number / SAMPLES, self._sample, None)

    def _arrive(self, flight: Flight) -> None:
        flight.arrived = self.now
        tokens = self.trace.tokens(flight.traced)
        began = perf_counter()
        answer = self.router.submit(
            flight.request_id, tokens, now=self.now, max_tokens=flight.max_tokens, session=flight.traced.session
        )
        self.decide_seconds += perf_counter() - began
        if isinstance(answer, Placement):
            self._place(answer)
        self._to_come -= 1
        if not self._to_come and isinstance(self.router, GlobalScheduler):
            self.hottest = self.router.hottest_prefixes()

    def _place(self, placement: Placement) -> None:
        flight = self.flights[int(placement.request_id)]
        if flight.placed != flight.placed:
            flight.placed = self.now
        flight.replica = placement.replica
        flight.reason = placement.reason
        replica = self.replicas[placement.replica]
        replica.receive(flight, self.trace.tokens(flight.traced))
        if not replica.working:
            self._begin(replica)
        else:
            earlier = replica.interrupt(self.now)
            if earlier is not None:
                self._end_at(replica, earlier)

    # Steps

    def _begin(self, replica: SimulatedReplica) -> None:
        end = replica.begin(self.now)
        if end is not None:
            self._end_at(replica, end)

    def _end_at(self, replica: SimulatedReplica, end: float) -> None:
        self._due[replica.number] = end
        self._at(end, self._end, (replica, self._lives[replica.number], end))

    def _end(self, subject: tuple[SimulatedReplica, int, float]) -> None:
        replica, life, end = subject
        if life != self._lives[replica.number] or end != self._due[replica.number]:
            return  # the replica failed, or the leap was cut short
        self._due[replica.number] = -1.0
        events, ended = replica.finish(self.now)
        for flight in ended:
            self._ended(flight)
        if self.settings.event_delay:
            self._at(self.now + self.settings.event_delay, self._report, events)
        else:
            self._report(events)
        if not replica.working:
            self._begin(replica)

    def _ended(self, flight: Flight) -> None:
        self._unended -= 1
        self._advance()
        follower = self._followers.get(flight.number)
        if follower is not None:
            after = self.flights[follower]
            self._at(self.now + after.traced.think, self._arrive, after)

    def _report(self, events: Iterable[Event]) -> None:
        apply, now = self.router.apply, self.now
        placements: list[Placement] = []
        began = perf_counter()
        for event in events:
            placements += apply(event, now=now)
        self.decide_seconds += perf_counter() - began
        for placement in placements:
            self._place(placement)

    # Failures

    def _fail(self, failure: Failure) -> None:
        replica = self.replicas[failure.replica]
        if not self._up[failure.replica]:
            return
        self._up[failure.replica] = False
        self._lives[failure.replica] += 1
        for flight in replica.lose():
            flight.moves += 1
        self._report([ReplicaDown(failure.replica)])
        if failure.seconds < float("inf"):
            self._at(self.now + failure.seconds, self._recover, failure.replica)

    def _recover(self, number: int) -> None:
        self._up[number] = True
        self._report([ReplicaUp(number, self.replicas[number].cache_events)])

    # Time

    def _sample(self, _: None) -> None:
        self.samples.take(self.now, self.replicas)

    def _at(self, time: float, action: Action, subject: Any) -> None:
        heapq.heappush(self._agenda, (time, next(self._serials), action, subject))


def _make_scheduler(settings: Settings, policy: str | Policy, believed: CostModel) -> GlobalScheduler:
    return GlobalScheduler(
        settings.replicas,
        capacity_tokens=settings.kv_tokens,
        page_size=settings.page_size,
        max_batched_tokens=settings.max_batched_tokens,
        policy=policy,
        cost=believed,
        seed=settings.seed,
    )


def _costs(cost: CostModel, settings: Settings) -> list[CostModel]:
    factors = [*settings.slowness, *[1.0] * (settings.replicas - len(settings.slowness))]
    return [cost if factor == 1.0 else SlowCost(cost, factor) for factor in factors]
