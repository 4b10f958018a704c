"""Between the event loop and the replicas: hands requests over, takes reports in, keeps the scheduler informed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import numpy as np

from preble.engine.messages import StepReport, Submit
from preble.errors import InvalidRequest, PrebleError, ReplicaCrashed
from preble.flight import Branch, Flight, request_failed
from preble.outputs import ClusterStats, ReplicaStats
from preble.replica.launch import Loaded, launch
from preble.sched import GlobalScheduler, Placement, ReplicaDown, Waiting

if TYPE_CHECKING:
    from preble.replica.base import Replica


class Dispatcher:
    """Owns the running replicas, the global scheduler and the requests in flight.

    Everything but `reported` and `crashed` belongs to the event loop's thread, and nothing here awaits: a placement and
    what follows from it cannot be torn apart by a cancellation.
    """

    def __init__(self, loaded: Loaded, scheduler: GlobalScheduler) -> None:
        native: Any = anyio.lowlevel.current_token().native_token
        # asyncio's loop and trio's token each have a thread-safe way in, under different names.
        self._post: Callable[..., object] = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        self._scheduler = scheduler
        self._flights: dict[str, Flight] = {}
        self._branches: dict[str, Branch] = {}
        self._placements: dict[str, int] = {}
        self._closed = False
        self._longest = min(loaded.config.context_length, loaded.capacity_tokens)
        self._stats: dict[int, ReplicaStats] = {engine.stats().replica: engine.stats() for engine in loaded.engines}
        self._replicas: dict[int, Replica] = {replica.number: replica for replica in launch(loaded, self)}

    def start(self, flight: Flight) -> None:
        """Submit a request to the scheduler, and to a replica as soon as there is one for it.

        Raises:
            InvalidRequest: a request of this id is in flight.
        """
        ids = [branch.request_id for branch in flight.branches]
        if flight.request_id in self._flights or any(request_id in self._branches for request_id in ids):
            raise InvalidRequest(f"request_id {flight.request_id!r} is in flight already")
        if not self._replicas:
            raise ReplicaCrashed(f"request {flight.request_id!r}: no replica is left")
        self._flights[flight.request_id] = flight
        self._branches.update(zip(ids, flight.branches, strict=True))
        now = time.monotonic()
        for request_id in ids:
            self._place(
                self._scheduler.submit(
                    request_id,
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
                released = self._scheduler.cancel(branch.request_id, now=now)
                if branch.replica in self._replicas:
                    self._replicas[branch.replica].abort(branch.request_id)
                for placement in released:
                    self._place(placement)
        if error is not None:
            flight.fail(error, now)
        else:
            flight.took(now)
        self._forget(flight)

    def end_soon(self, flight: Flight) -> None:
        """`end` from any thread."""
        self._call_soon(self.end, flight)

    def stats(self) -> ClusterStats:
        """A snapshot of every replica as of its last step, and of what waits in front of them."""
        return ClusterStats(
            replicas=tuple(self._stats[number] for number in sorted(self._stats)),
            pending=len(self._flights),
            policy=self._scheduler.policy_name,
            placements=dict(self._placements),
        )

    def close(self, why: Callable[[str], PrebleError]) -> list[Replica]:
        """End every request with an error and ask the replicas to stop; returns them, to be joined."""
        self._closed = True
        for flight in list(self._flights.values()):
            self.end(flight, why(flight.request_id))
        for replica in self._replicas.values():
            replica.stop()
        return list(self._replicas.values())

    # Called from the replicas' threads

    def reported(self, report: StepReport) -> None:
        """A replica finished a step."""
        self._call_soon(self._took_report, report)

    def crashed(self, replica: int, cause: BaseException) -> None:
        """A replica stopped on an error."""
        self._call_soon(self._lost_replica, replica, cause)

    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function` in the event loop's thread."""
        try:
            self._post(function, *args)
        except RuntimeError:
            # The loop ended without leaving the cluster: nobody is there to be told.
            for replica in self._replicas.values():
                replica.stop()

    # In the event loop's thread

    def _place(self, decision: Placement | Waiting) -> None:
        """Hand a request to the replica chosen for it. One that waits is placed by a later event."""
        if isinstance(decision, Waiting):
            return
        branch = self._branches[decision.request_id]
        flight = branch.flight
        branch.placement = branch.placement or decision
        branch.replica = decision.replica
        self._placements[decision.reason] = self._placements.get(decision.reason, 0) + 1
        tokens = flight.prompt
        if branch.token_ids:  # it comes from a replica that was lost
            tokens = np.concatenate([tokens, np.array(branch.token_ids, np.int32)])
        self._replicas[decision.replica].submit(
            Submit(
                request_id=branch.request_id,
                token_ids=tokens,
                prompt_length=len(flight.prompt),
                max_length=min(len(flight.prompt) + flight.sampling.max_tokens, self._longest),
                sampling=flight.sampling,
                seed=branch.seed,
                namespace=flight.terms.namespace,
                priority=flight.terms.priority,
                deadline=flight.deadline,
                expected_tokens=flight.terms.expected_tokens,
            )
        )

    def _took_report(self, report: StepReport) -> None:
        if report.replica not in self._replicas:
            return
        now = time.monotonic()
        self._stats[report.replica] = report.stats
        for event in report.events:
            for placement in self._scheduler.apply(event, now=now):
                self._place(placement)
        for delta in report.deltas:
            branch = self._branches.get(delta.request_id)
            if branch is None or branch.replica != report.replica:
                continue  # it ended, or went elsewhere, while the step ran
            flight = branch.flight
            if delta.error is not None:
                self.end(flight, request_failed(flight.request_id, delta.error))
                continue
            branch.take(delta, now)
            flight.took(now)
            if flight.done:
                self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        del self._flights[flight.request_id]
        for branch in flight.branches:
            del self._branches[branch.request_id]

    def _lost_replica(self, number: int, cause: BaseException) -> None:
        """Take a crashed replica out; its requests go on elsewhere, unless they were on a crashed one before."""
        del self._replicas[number]
        if self._closed:
            return
        for branch in list(self._branches.values()):
            if branch.replica != number or branch.flight.done:
                continue
            branch.crashes += 1
            branch.replica = None
            if branch.crashes > 1 or not self._replicas:
                error = ReplicaCrashed(f"request {branch.flight.request_id!r}: replica {number} crashed: {cause!r}")
                error.__cause__ = cause
                self.end(branch.flight, error)
        for placement in self._scheduler.apply(ReplicaDown(number), now=time.monotonic()):
            self._place(placement)
