"""Between the event loop and the replicas: hands requests over, takes reports in, keeps the scheduler informed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import numpy as np

from preble.engine.messages import Abort, Pause, Ready, ResetCache, StepReport, Submit
from preble.errors import InvalidRequest, PrebleError, ReplicaCrashed
from preble.flight import Branch, Flight, request_failed
from preble.health import ClusterHealth
from preble.outputs import ClusterStats
from preble.roster import Roster
from preble.sched import GlobalScheduler, Moved, Placement, ReplicaDown, ReplicaUp, Waiting

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from preble.replica.launch import Launcher

CRASHES = 2
"""A request that was on so many replicas when they failed is suspected to be the cause, and fails itself."""
LOSSES = 8
"""… and so is one that was on so many, or on the way to them: a replica that fails together with another, and is not
known to have, is given what the other one leaves, and never takes it in."""

RECOVERIES = 1_000
"""How many of the latest recoveries `stats` tells of."""


class Dispatcher:
    """Owns the global scheduler, the requests in flight and, through the roster, the replicas.

    Everything belongs to the event loop's thread, and what decides never awaits: a placement and what follows from it
    cannot be torn apart by a cancellation.

    Args:
        launcher: starts replicas.
        scheduler: without replicas; they are added as they come up.
        hang_timeout: seconds without a step, with work to do, after which a replica counts as failed.
        restart_timeout: seconds that requests wait for a replica where none is up.
    """

    def __init__(
        self, launcher: Launcher, scheduler: GlobalScheduler, *, hang_timeout: float, restart_timeout: float
    ) -> None:
        native: Any = anyio.lowlevel.current_token().native_token
        # asyncio's loop and trio's token each have a thread-safe way in, under different names.
        self._post: Callable[..., object] = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        self._scheduler = scheduler
        self._page_size = launcher.options.page_size
        self._context_length = launcher.config.context_length
        self._flights: dict[str, Flight] = {}
        self._branches: dict[str, Branch] = {}
        """By the names that schedulers and replicas know."""
        self._serials = count(1)
        self._placements: dict[str, int] = {}
        self._draining: set[int] = set()
        self._recoveries: deque[float] = deque(maxlen=RECOVERIES)
        self._pages: int | None = None
        """KV pages of each replica: all have as many, so that a request which fits one fits any."""
        self._refilling = False
        """Whether `_refill` is about to be called."""
        self._restart_timeout = restart_timeout
        self._nobody_since = float("-inf")
        """When the last replica that took requests went down or began to drain."""
        self._idle = anyio.Event()
        """Set when a request ends, or one of its continuations, for those who wait until some are over."""
        self.roster = Roster(launcher, self, self._call_soon, hang_timeout=hang_timeout, start_timeout=restart_timeout)

    @property
    def longest(self) -> int:
        """Tokens, prompt and output together, that a request may have on any replica."""
        return min(self._context_length, (self._pages or 0) * self._page_size)

    # Requests

    def start(self, flight: Flight) -> None:
        """Submit a request to the scheduler, and to a replica as soon as there is one for it.

        Raises:
            InvalidRequest: a request of this id is in flight.
        """
        if flight.request_id in self._flights:
            raise InvalidRequest(f"request_id {flight.request_id!r} is in flight already")
        self._flights[flight.request_id] = flight
        now = time.monotonic()
        for branch in flight.branches:
            branch.request_id = f"{flight.request_id}#{next(self._serials)}"
            self._branches[branch.request_id] = branch
        for branch in flight.branches:
            self._place(
                self._scheduler.submit(
                    branch.request_id,
                    flight.prompt,
                    now=now,
                    max_tokens=flight.sampling.max_tokens,
                    namespace=flight.terms.namespace,
                    priority=flight.terms.priority,
                    deadline=flight.deadline,
                    session=flight.terms.session,
                    expected_tokens=flight.terms.expected_tokens,
                )
            )

    def abort(self, request_id: str) -> bool:
        """End a request as aborted; whether there was one of this id."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        placed = any(branch.placement is not None for branch in flight.branches)
        self.end(flight, None if placed else request_failed(request_id, "aborted before a replica took it"))
        return True

    def end(self, flight: Flight, error: PrebleError | None = None) -> None:
        """End a flight early: with an error, or as aborted with what it has. Harmless when it is over."""
        if flight.done:
            return
        now = time.monotonic()
        for branch in flight.branches:
            if branch.finish_reason is None:
                branch.finish_reason = "abort"
                self._scheduler.cancel(branch.request_id, now=now, place=False)
                if branch.replica is not None:
                    self.roster.send(branch.replica, Abort(branch.request_id))
        self._refill_soon()
        if error is not None:
            flight.fail(error, now)
        else:
            flight.took(now)
        self._forget(flight)

    def end_soon(self, flight: Flight) -> None:
        """`end` from any thread."""
        self._call_soon(self.end, flight)

    # The cluster as a whole

    def stats(self) -> ClusterStats:
        """A snapshot of every replica as of its last step, and of what waits in front of them."""
        return ClusterStats(
            replicas=tuple(self.roster.stats()),
            pending=len(self._flights),
            policy=self._scheduler.policy_name,
            placements=dict(self._placements),
            recoveries=tuple(self._recoveries),
        )

    def health(self) -> ClusterHealth:
        """How the replicas are."""
        replicas = tuple(
            self.roster.health(lambda number: len(self._scheduler.in_flight(number)), self._draining.__contains__)
        )
        up = sum(one.state in ("serving", "draining") for one in replicas)
        return ClusterHealth(
            status="ok" if up == len(replicas) > 0 else "degraded" if up else "down",
            paused=self.roster.paused,
            pending=len(self._flights),
            waiting=len(self._scheduler.waiting),
            replicas=replicas,
        )

    async def add(self, devices: Sequence[torch.device]) -> list[int]:
        """Start replicas and wait until they serve; returns their numbers.

        Raises:
            PrebleError: one could not be started; then none is.
        """
        numbers = await self.roster.enlist(devices, self._pages, self._admit)
        self._place_all(self._scheduler.poll(time.monotonic()))
        return numbers

    async def drain(self, number: int) -> None:
        """Give a replica nothing more, move what waits there, and wait until it is done with what it works on."""
        self._known(number)
        taking = self._anybody_takes_requests
        self._draining.add(number)
        if taking and not self._anybody_takes_requests:
            self._nobody_since = time.monotonic()
        self._move(number, self._scheduler.drain(number, now=time.monotonic()))
        while number in self._draining and self._scheduler.in_flight(number):
            await self._something_ends()

    async def remove(self, number: int, timeout: float | None) -> None:
        """Drain a replica and end it. What it still has after `timeout` seconds goes on elsewhere."""
        self._known(number)
        if not set(self.roster.numbers) - self._draining - {number}:
            raise InvalidRequest(
                f"replica {number} is the last one that takes requests; leave the cluster instead, or add another first"
            )
        with anyio.move_on_after(timeout):
            await self.drain(number)
        if number not in self.roster.numbers:
            return  # somebody else removed it meanwhile
        life = self.roster.dismiss(number)
        self._draining.discard(number)
        self._move(number, self._scheduler.remove_replica(number, now=time.monotonic()))
        self._idle.set()
        if life is not None:
            await self.roster.bury(life)

    async def reset_prefix_cache(self) -> None:
        """Make every replica forget the prefixes that no running request uses, and wait until it has."""
        await self.roster.tell(self.roster.numbers, ResetCache())

    async def pause(self, paused: bool) -> None:
        """Stop the replicas between two steps, or let them go on, and wait until they do."""
        self.roster.paused = paused
        await self.roster.tell(self.roster.numbers, Pause(paused))

    async def finish(self) -> None:
        """Wait until no request is in flight."""
        while self._flights:
            await self._something_ends()

    def close(self, why: Callable[[str], PrebleError]) -> None:
        """End every request with an error and ask the replicas to end; `roster.join` waits for that."""
        for flight in list(self._flights.values()):
            self.end(flight, why(flight.request_id))
        self.roster.stop()

    # What the roster tells

    def step_reported(self, report: StepReport) -> None:
        """A replica finished a step."""
        now = time.monotonic()
        for event in report.events:
            self._scheduler.apply(event, now=now, place=False)
        self._refill_soon()
        for delta in report.deltas:
            branch = self._branches.get(delta.request_id)
            if branch is None or branch.replica != report.replica:
                continue  # it ended, or went elsewhere, while the step ran
            flight = branch.flight
            if delta.error is not None:
                self.end(flight, request_failed(flight.request_id, delta.error))
                continue
            if branch.lost is not None and delta.token_ids:
                self._recoveries.append(now - branch.lost)
                branch.lost = None
            branch.take(delta, now)
            flight.took(now)
            if branch.finish_reason is not None:
                self._idle.set()
            if flight.done:
                self._forget(flight)

    def replica_down(self, number: int, cause: BaseException) -> None:
        """A replica is gone. Its requests go on elsewhere, from the tokens delivered, unless they are suspected."""
        now = time.monotonic()
        if not self._anybody_takes_requests:
            self._nobody_since = now
        placements = self._scheduler.apply(ReplicaDown(number), now=now)
        suspects = []
        for branch in self._branches.values():
            if branch.replica == number and branch.finish_reason is None:
                branch.replica = None
                branch.crashes += branch.command <= self.roster.taken(number)
                branch.losses += 1
                branch.lost = now if branch.lost is None else branch.lost
                if branch.crashes >= CRASHES or branch.losses >= LOSSES:
                    suspects.append(branch)
        for branch in suspects:
            flight = branch.flight
            error = ReplicaCrashed(
                f"request {flight.request_id!r} was on {branch.losses} replicas when they failed and may be the cause; "
                f"the last was replica {number}: {type(cause).__name__}: {cause}"
            )
            error.__cause__ = cause
            self.end(flight, error)
        self._place_all(one for one in placements if one.request_id in self._branches)
        self._idle.set()

    def replica_up(self, number: int) -> None:
        """A replica serves again."""
        self._place_all(self._scheduler.apply(ReplicaUp(number), now=time.monotonic()))

    def is_busy(self, number: int) -> bool:
        """Whether a replica has requests to work on."""
        return bool(self._scheduler.in_flight(number))

    def time_passed(self, now: float) -> None:
        """Requests do not wait for ever for a replica that takes them."""
        if self._anybody_takes_requests:
            return
        others = "those that are up drain, and no other" if self.roster.serving else "no replica"
        for flight in list(self._flights.values()):
            waits = any(branch.replica is None and branch.finish_reason is None for branch in flight.branches)
            if waits and now - max(flight.submitted, self._nobody_since) >= self._restart_timeout:
                self.end(
                    flight,
                    ReplicaCrashed(
                        f"request {flight.request_id!r}: {others} came up within {self._restart_timeout:g} s; "
                        f"the last failure was {self.roster.last_error()}"
                    ),
                )

    # Within

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function` in the event loop's thread."""
        try:
            self._post(function, *args)
        except RuntimeError:
            # The loop ended without leaving the cluster: nobody is there to be told.
            self.roster.abandon()

    @property
    def _anybody_takes_requests(self) -> bool:
        return not self._draining.issuperset(self.roster.serving)

    def _known(self, number: int) -> None:
        if type(number) is not int or number not in self.roster.numbers:
            here = ", ".join(map(str, self.roster.numbers))
            raise InvalidRequest(f"there is no replica {number!r}; there are: {here}")

    def _admit(self, newcomers: dict[int, Ready]) -> None:
        """New replicas are there."""
        if self._pages is None:
            self._pages = min(ready.pages for ready in newcomers.values())
        for number, ready in newcomers.items():
            given = self._scheduler.add_replica(
                capacity_tokens=self._pages * self._page_size, max_batched_tokens=ready.max_batched_tokens
            )
            assert given == number

    async def _something_ends(self) -> None:
        if self._idle.is_set():
            self._idle = anyio.Event()
        await self._idle.wait()

    def _move(self, number: int, moved: Moved) -> None:
        """The scheduler took requests off a replica."""
        for request_id in moved.request_ids:
            self._branches[request_id].replica = None
            self.roster.send(number, Abort(request_id))
        self._place_all(moved.placements)

    def _refill_soon(self) -> None:
        """Let those who wait have what has come free: once for all that happens in this turn of the event loop."""
        if not self._refilling:
            self._refilling = True
            self._call_soon(self._refill)

    def _refill(self) -> None:
        self._refilling = False
        self._place_all(self._scheduler.place_waiting(now=time.monotonic()))

    def _place_all(self, placements: Iterable[Placement]) -> None:
        for placement in placements:
            self._place(placement)

    def _place(self, decision: Placement | Waiting) -> None:
        """Hand a request to the replica chosen for it. One that waits is placed by a later event."""
        if isinstance(decision, Waiting):
            return
        branch = self._branches[decision.request_id]
        flight = branch.flight
        branch.placement = branch.placement or replace(decision, request_id=flight.request_id)
        branch.replica = decision.replica
        self._placements[decision.reason] = self._placements.get(decision.reason, 0) + 1
        tokens = flight.prompt
        if branch.token_ids:  # it comes from another replica
            tokens = np.concatenate([tokens, np.array(branch.token_ids, np.int32)])
        arrived, branch.arrived = branch.arrived, branch.arrived or time.monotonic()
        branch.command = self.roster.send(
            decision.replica,
            Submit(
                request_id=branch.request_id,
                token_ids=tokens,
                prompt_length=len(flight.prompt),
                max_length=min(len(flight.prompt) + flight.sampling.max_tokens, self.longest),
                sampling=flight.sampling,
                seed=branch.seed,
                namespace=flight.terms.namespace,
                priority=flight.terms.priority,
                deadline=flight.deadline,
                expected_tokens=flight.terms.expected_tokens,
                arrived=arrived,
            ),
        )

    def _forget(self, flight: Flight) -> None:
        del self._flights[flight.request_id]
        for branch in flight.branches:
            del self._branches[branch.request_id]
        self._idle.set()
