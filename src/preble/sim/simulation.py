"""Requests, replicas and the global scheduler on a virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from time import perf_counter
from typing import Any, TypeAlias

from preble.errors import PrebleError
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

LOOKS = 200
"""Into how many parts a run's looks at its replicas divide the time of its arrivals."""
SHORTEST_LOOK = 0.05
"""Seconds between two of them at least."""

Action: TypeAlias = Callable[[Any], None]


class Simulation:
    """One trace under one policy.

    The global scheduler, the local schedulers, their page pools and prefix caches are the production code. What is
    pretended: time, the tokens themselves, and what a step takes. The schedulers are told neither how long answers are
    nor, if `Settings.believed_cost` says so, what steps really take.

    A replica that fails loses its pages and its requests at once, those that are sent to it while it is down too. The
    global scheduler hears of it as late as of everything else (`Settings.event_delay`), and so of its return, from
    which on the replica takes requests again. A failure of a replica that is down does nothing.

    Everything that happens is a function of trace, settings and policy; only `decide_seconds` is not.

    Args:
        trace: the requests. Those that no replica can hold (`Settings.kv_tokens`) are left out, see `refused`.
        settings: the fleet.
        policy: name of a policy, or a fresh policy; a `Router` takes the place of the whole global scheduler.
        advance: called whenever a request has ended.

    Raises:
        InvalidRequest: there is no such policy, order or cost model.
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
        """What arrives."""
        self.settings = settings
        """The fleet."""
        self.now = 0.0
        """Seconds since the first arrival."""
        self.decide_seconds = 0.0
        """Real seconds that the global scheduler took, for decisions and for events."""
        self.flights: list[Flight] = []
        """All requests, in order of the trace."""
        self.refused: list[int] = []
        """Positions in the trace of requests that are longer than a replica's pages hold."""
        self.hottest: list[HotPrefix] = []
        """Of the prefix tree at the last arrival; none where others than a `GlobalScheduler` decide."""
        self.router: Router = policy if not isinstance(policy, str | Policy) else _make_scheduler(settings, policy)
        """What decides where requests go."""
        self.replicas = [_make_replica(settings, number) for number in range(settings.replicas)]
        """By number: each with its `busy_seconds`, `steps` and `evicted_tokens` so far."""
        self.samples = Samples(len(self.replicas), max(trace.duration / LOOKS, SHORTEST_LOOK))
        """How busy they were over time."""
        self._advance = advance
        self._agenda: list[tuple[float, int, Action, Any]] = []
        self._serials = count()
        self._up = [True] * len(self.replicas)
        self._known_down: set[int] = set()
        """Replicas of which the router has heard that they are down."""
        self._lives = [0] * len(self.replicas)
        """How often each replica failed: a step of an earlier life never ends."""
        self._due = [0.0] * len(self.replicas)
        """When the present step of each replica ends."""
        self._followers: dict[int, int] = {}
        """In a closed loop: position of a request -> that of the session's next one."""
        self._unended = self._to_come = 0
        for failure in settings.failures:
            self._at(failure.at, self._fail, failure)
        self._schedule_arrivals()
        self._at(self.samples.every, self._look, None)

    def run(self) -> None:
        """Until every request has ended, or all replicas are down for good.

        Raises:
            PrebleError: the policy leaves requests waiting for ever, or a router does what none may do.
        """
        agenda = self._agenda
        while self._unended and agenda:
            self.now, _, action, subject = heapq.heappop(agenda)
            action(subject)
        if self._unended and any(self._up):
            raise PrebleError(
                f"policy {self.router.policy_name!r} left {self._unended} of {len(self.flights)} requests waiting, "
                f"although nothing happens any more, at {self.now:.3f} s"
            )

    # Arrivals

    def _schedule_arrivals(self) -> None:
        settings, requests = self.settings, self.trace.requests
        usable = settings.kv_tokens // settings.page_size * settings.page_size
        last_of_session: dict[str, int] = {}
        for number, traced in enumerate(requests):
            room = usable - traced.prompt_tokens
            max_tokens = max(min(room, settings.max_tokens), traced.output_tokens)
            flight = Flight(number, traced, max_tokens, traced.arrival - requests[0].arrival)
            self.flights.append(flight)
            if traced.output_tokens > room:
                self.refused.append(number)
                continue
            self._unended += 1
            self._to_come += 1
            before = None
            if settings.closed_loop and traced.session is not None:
                before = last_of_session.get(traced.session)
                last_of_session[traced.session] = number
            if before is None:
                self._at(flight.arrived, self._arrive, flight)
            else:
                self._followers[before] = number

    def _arrive(self, flight: Flight) -> None:
        flight.arrived = self.now
        tokens = self.trace.tokens(flight.traced)
        began = perf_counter()
        answer = self.router.submit(
            flight.request_id, tokens, now=self.now, max_tokens=flight.max_tokens, session=flight.traced.session
        )
        self.decide_seconds += perf_counter() - began
        if isinstance(answer, Placement):
            self._place([answer])
        self._to_come -= 1
        if not self._to_come and isinstance(self.router, GlobalScheduler):
            self.hottest = self.router.hottest_prefixes()

    def _place(self, placements: Iterable[Placement]) -> None:
        chosen: dict[int, SimulatedReplica] = {}
        for placement in placements:
            number = placement.replica
            if not 0 <= number < len(self.replicas) or number in self._known_down:
                state = "is down" if number in self._known_down else "does not exist"
                raise PrebleError(
                    f"policy {self.router.policy_name!r} placed request {placement.request_id} on replica {number}, "
                    f"which {state}"
                )
            flight = self.flights[int(placement.request_id)]
            if flight.placed != flight.placed:
                flight.placed = self.now
            flight.replica = number
            flight.reason = placement.reason
            if self._up[number]:
                self.replicas[number].receive(flight, self.trace.tokens(flight.traced))
                chosen[number] = self.replicas[number]
            else:
                flight.moves += 1
        for replica in chosen.values():
            if not replica.working:
                self._begin(replica)
            elif (earlier := replica.interrupt(self.now)) is not None:
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
        self._tell(events)
        if not replica.working:
            self._begin(replica)

    def _ended(self, flight: Flight) -> None:
        self._unended -= 1
        self._advance()
        follower = self._followers.get(flight.number)
        if follower is not None:
            after = self.flights[follower]
            self._at(self.now + after.traced.think, self._arrive, after)

    # The global scheduler

    def _tell(self, events: Iterable[Event]) -> None:
        """It will hear of these events, in the order of the calls."""
        if self.settings.event_delay:
            self._at(self.now + self.settings.event_delay, self._apply, events)
        else:
            self._apply(events)

    def _apply(self, events: Iterable[Event]) -> None:
        apply, now = self.router.apply, self.now
        placements: list[Placement] = []
        began = perf_counter()
        for event in events:
            placements += apply(event, now=now)
        self.decide_seconds += perf_counter() - began
        self._place(placements)

    # Failures

    def _fail(self, failure: Failure) -> None:
        number = failure.replica
        if not self._up[number]:
            return
        self._up[number] = False
        self._lives[number] += 1
        events, lost = self.replicas[number].fail(self.now)
        for flight in lost:
            flight.moves += 1
        self._tell(events)
        self._at(self.now + self.settings.event_delay, self._hear_of_failure, number)
        if failure.seconds < float("inf"):
            self._at(self.now + failure.seconds + self.settings.event_delay, self._recover, number)

    def _hear_of_failure(self, number: int) -> None:
        self._known_down.add(number)
        self._apply([ReplicaDown(number)])

    def _recover(self, number: int) -> None:
        self._up[number] = True
        self._known_down.discard(number)
        self._apply([ReplicaUp(number, self.replicas[number].cache_events)])

    # Looking on

    def _look(self, _: None) -> None:
        self.samples.take(self.now, self.replicas)
        if self._agenda:  # or nothing will ever happen again
            self._at(self.now + self.samples.every, self._look, None)

    def _at(self, time: float, action: Action, subject: Any) -> None:
        heapq.heappush(self._agenda, (time, next(self._serials), action, subject))


def _make_scheduler(settings: Settings, policy: str | Policy) -> GlobalScheduler:
    return GlobalScheduler(
        settings.replicas,
        capacity_tokens=settings.kv_tokens,
        page_size=settings.page_size,
        max_batched_tokens=settings.max_batched_tokens,
        policy=policy,
        cost=_believed_cost(settings),
        seed=settings.seed,
    )


def _make_replica(settings: Settings, number: int) -> SimulatedReplica:
    factor = settings.slowness[number] if number < len(settings.slowness) else 1.0
    cost = settings.cost_model if factor == 1.0 else SlowCost(settings.cost_model, factor)
    local = LocalScheduler(
        pages=settings.kv_tokens // settings.page_size,
        page_size=settings.page_size,
        max_batched_tokens=settings.max_batched_tokens,
        max_running=settings.max_running,
        replica=number,
        order=settings.order,
        cost=cost if settings.believed_cost is None else FittedCost(_believed_cost(settings)),
    )
    return SimulatedReplica(local, cost, leap_seconds=settings.leap_seconds)


def _believed_cost(settings: Settings) -> CostModel:
    return settings.cost_model if settings.believed_cost is None else make_cost(settings.believed_cost)
