"""The global scheduler: which replica gets a request, decided and booked in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from preble.errors import InvalidRequest
from preble.sched.cost import CostModel
from preble.sched.cost_fit import FittedCost
from preble.sched.cost_presets import make_cost
from preble.sched.events import (
    Admitted,
    Event,
    Evicted,
    Finished,
    Preempted,
    Progressed,
    ReplicaDown,
    ReplicaUp,
    StepTimed,
    Stored,
)
from preble.sched.explanation import Explanation
from preble.sched.fleet import Fleet
from preble.sched.hot_prefixes import HotPrefix, hottest_prefixes
from preble.sched.invariants import require
from preble.sched.ledger import Ledger
from preble.sched.lots import Lots
from preble.sched.placement import Moved, Placement, Waiting
from preble.sched.policies import Choice, Policy, ReplicaView, View, make_policy
from preble.sched.replica_cost import ReplicaCost
from preble.sched.request import Request
from preble.sched.token_ids import TokenIds, as_tokens
from preble.sched.waiting import WaitingQueue

WINDOW = 180.0
"""Seconds for which load counts, and for which a prefix is remembered that no replica holds: H in the paper."""


class GlobalScheduler:
    """Places requests on replicas: a state machine without I/O, clock or threads.

    Time comes in as `now`, in seconds on any clock that does not go back; results go out as values. The same seed and
    the same calls give the same decisions. A placement is entered in the replica's books before `submit` returns, so
    a burst of requests cannot herd.

    A request that no replica can take waits here. Waiting requests are served by priority (higher first), then
    deadline (earlier first), then age, or, where the policy lets them overtake each other, as `Policy.overtakes` says.
    `apply`, `poll`, `cancel`, `place_waiting`, `drain` and `remove_replica` return the placements they made possible;
    after `add_replica` call `poll`.

    Args:
        replicas: how many there are at the start, numbered from 0.
        capacity_tokens: tokens that the KV pages of one replica hold.
        page_size: tokens in a page, the same on all replicas.
        max_batched_tokens: tokens that one step of a replica computes at most.
        policy: name of a policy, or an object of your own (`preble.sched.Policy`), which then serves this scheduler
            only.
        cost: what steps cost at first: name of a preset (`preble.sched.PRESETS`), or a model. `StepTimed` events
            correct it, for all replicas that began with it together, and each by a factor of its own.
        seed: of the lots drawn between equal replicas.
        window: H in the paper: seconds for which load counts, and for which a prefix is remembered that no replica
            holds.

    Raises:
        InvalidRequest: an argument is out of its range, or no policy has that name.
    """

    def __init__(
        self,
        replicas: int = 1,
        *,
        capacity_tokens: int,
        page_size: int = 64,
        max_batched_tokens: int = 1024,
        policy: str | Policy = "e2",
        cost: str | CostModel = "generic",
        seed: int = 0,
        window: float = WINDOW,
    ) -> None:
        if replicas < 0:
            raise InvalidRequest(f"replicas must be at least 0, not {replicas}")
        if page_size < 1:
            raise InvalidRequest(f"page_size must be at least 1, not {page_size}")
        if max_batched_tokens < 1:
            raise InvalidRequest(f"max_batched_tokens must be at least 1, not {max_batched_tokens}")
        if not 0 <= window < float("inf"):
            raise InvalidRequest(f"window must be at least 0 seconds and finite, not {window}")
        self._policy = make_policy(policy)
        self._cost = cost
        self._own_kind = FittedCost(make_cost(cost))
        self._kinds: dict[str, FittedCost] = {cost: self._own_kind} if isinstance(cost, str) else {}
        self._capacity_tokens = capacity_tokens
        self._max_batched_tokens = max_batched_tokens
        self._lots = Lots(seed)
        self._fleet = Fleet(page_size, window)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._news = False
        """Whether something happened since waiting requests were offered the replicas that may matter to them."""
        self._now = float("-inf")
        self._reviewed = float("-inf")
        self._submitted = 0
        self._handlers: dict[type[Event], Callable[[Ledger, Any], None]] = {
            Admitted: self._admitted,
            Progressed: self._progressed,
            Preempted: self._preempted,
            Finished: self._finished,
            Stored: self._stored,
            Evicted: self._evicted,
            StepTimed: self._step_timed,
            ReplicaDown: self._down,
            ReplicaUp: self._up,
        }
        for _ in range(replicas):
            self.add_replica()

    # Requests

    def submit(
        self,
        request_id: str,
        token_ids: TokenIds,
        *,
        now: float,
        max_tokens: int = 256,
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
    ) -> Placement | Waiting:
        """Place a request, or let it wait; in that case a later call that returns placements returns its own.

        Args:
            request_id: unique among the requests that have not ended.
            token_ids: the prompt, integers [n] that fit in int32, none negative; copied.
            now: seconds; a time before the latest one counts as that.
            max_tokens: the most tokens it may generate.
            namespace: prefixes are shared only within one.
            priority: higher is served first.
            deadline: seconds on the same clock; among equals of priority the earliest is served first.
            session: a name for the conversation or agent it belongs to, unique within the namespace. Among equally
                good replicas its last one is preferred.
            expected_tokens: how many it will probably generate, at least 1; learned per prefix where it is not given.

        Raises:
            InvalidRequest: the prompt or another argument is malformed, or the request is already here.
        """
        if request_id in self._requests:
            raise InvalidRequest(f"request {request_id!r} is already here and has not ended")
        request = self._request(
            request_id, token_ids, now, max_tokens, namespace, priority, deadline, session, expected_tokens
        )
        self._advance(now)
        placement = self._place(request) if self._waiting.empty or self._policy.overtakes else None
        self._fleet.traffic.arrived(self._now)
        self._submitted += 1
        self._requests[request_id] = request
        if placement is not None:
            return placement
        answer = Waiting(request_id, self._obstacle())
        self._waiting.push(request)
        return answer

    def apply(self, event: Event, *, now: float, place: bool = True) -> list[Placement]:
        """Take in what a replica reports; returns the placements that this made possible, none where `place` is false:
        then call `place_waiting` after the last of many events.

        What a request or a replica no longer here sends is ignored. After `ReplicaDown` the requests that were in
        flight there are placed again, under their ids, on other replicas; those among them that are not in the
        returned list wait.

        Raises:
            InvalidRequest: this is no event, or it names a replica that never was.
        """
        handler = self._handlers.get(type(event))
        if handler is None:
            raise InvalidRequest(f"not an event of preble.sched.events: {event!r}")
        ledger = self._fleet.ledgers.get(event.replica)
        if ledger is None and not 0 <= event.replica < self._fleet.numbers_used:
            raise InvalidRequest(f"{event!r}: there never was a replica {event.replica}")
        if now > self._now:
            self._advance(now)
        if ledger is not None:
            handler(ledger, event)
        return self.place_waiting(now=self._now) if place else []

    def poll(self, now: float) -> list[Placement]:
        """Let time pass; returns the placements that are possible now."""
        self._advance(now)
        return self._place_waiting()

    def cancel(self, request_id: str, *, now: float, place: bool = True) -> list[Placement]:
        """Forget a request, whether it waits or is on a replica; its `Finished` may still come. An id that is not here
        is ignored. Returns the placements that this made possible.

        Where many are cancelled at once, cancel them without `place`, and call `place_waiting` in the end: looking at
        those who wait takes the longer the more there are.

        Args:
            request_id: which request.
            now: seconds; a time before the latest one counts as that.
            place: whether to place at once what can be placed now.
        """
        self._advance(now)
        request = self._requests.pop(request_id, None)
        if request is not None:
            if request.ledger is None:
                self._waiting.remove(request)
            else:
                self._fleet.leave(request)
                self._news = True
        return self.place_waiting(now=now) if place else []

    def place_waiting(self, *, now: float) -> list[Placement]:
        """The placements that events and cancellations without `place` made possible; where nothing has happened since
        the last look at those who wait, they are not looked at again."""
        if now > self._now:
            self._advance(now)
        if self._waiting.empty or not (self._news or not self._policy.overtakes):
            return []
        return self._place_waiting()

    def explain(
        self,
        token_ids: TokenIds,
        *,
        now: float,
        max_tokens: int = 256,
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
    ) -> Explanation:
        """What `submit` would do with this prompt at this time, and why. The arguments are as in `submit`. Changes
        nothing.

        Raises:
            InvalidRequest: the prompt or another argument is malformed.
        """
        request = self._request("", token_ids, now, max_tokens, namespace, priority, deadline, session, expected_tokens)
        fleet, now = self._fleet, max(now, self._now)
        match = fleet.tree.find(namespace, request.tokens)
        replica, reason = None, self._obstacle()
        costs: dict[int, Mapping[str, float]] = {}
        if fleet.eligible:
            with fleet.as_of(now):
                view = fleet.view(request, match, now, self._lots.copy())
                costs = {one.replica: self._policy.costs(view, index) for index, one in enumerate(view.replicas)}
                choice = self._choose(view) if self._waiting.empty or self._policy.overtakes else None
            if choice is not None:
                replica, reason = view.replicas[choice.chosen].replica, choice.reason
        candidates = fleet.candidates(match, costs)
        return Explanation(self._policy.name, request.prompt_tokens, replica, reason, candidates)

    # Replicas

    def add_replica(
        self,
        *,
        capacity_tokens: int | None = None,
        max_batched_tokens: int | None = None,
        cost: str | CostModel | None = None,
    ) -> int:
        """One more replica, with an empty cache; returns its number, which was never used before. It may be given
        requests from now on; to one that is still to be loaded apply `ReplicaDown` at once, and `ReplicaUp` later.

        Args:
            capacity_tokens: tokens that its KV pages hold; by default as many as those of the first ones.
            max_batched_tokens: tokens that one of its steps computes at most; by default as the first ones.
            cost: what its steps cost at first; by default as on the first ones.

        Raises:
            InvalidRequest: it cannot hold a page, or there is no such preset.
        """
        number = self._fleet.add(
            capacity_tokens=self._capacity_tokens if capacity_tokens is None else capacity_tokens,
            max_batched_tokens=self._max_batched_tokens if max_batched_tokens is None else max_batched_tokens,
            cost=ReplicaCost(self._kind(self._cost if cost is None else cost)),
        )
        self._review()
        return number

    def drain(self, replica: int, *, now: float) -> Moved:
        """Place nothing more on a replica, not even after a restart. What it works on it finishes; what waits there, a
        preempted request included, is taken off it and placed again, as after `ReplicaDown`. Where no other replica
        may be given requests it all stays, and ends there.

        The caller aborts what was moved on the replica. Called once more it moves what waits there by then.

        Raises:
            InvalidRequest: there is no such replica.
        """
        ledger = self._fleet.ledger(replica)
        self._advance(now)
        return self._move(self._fleet.drain(ledger))

    def remove_replica(self, replica: int, *, now: float) -> Moved:
        """Forget a replica. What was in flight there is placed again, as after `ReplicaDown`.

        Raises:
            InvalidRequest: there is no such replica.
        """
        ledger = self._fleet.ledger(replica)
        self._advance(now)
        return self._move(self._fleet.remove(ledger))

    # What is where

    @property
    def policy_name(self) -> str:
        """The policy in use."""
        return self._policy.name

    @property
    def replicas(self) -> tuple[ReplicaView, ...]:
        """The books of all replicas, by number. Read them, never change them."""
        return tuple(self._fleet.ledgers.values())

    @property
    def waiting(self) -> list[str]:
        """The requests that wait here, by priority, deadline and age."""
        return [request.request_id for request in self._waiting]

    @property
    def tree_pages(self) -> int:
        """Pages in the prefix tree, over all namespaces."""
        return self._fleet.tree.pages

    def in_flight(self, replica: int) -> list[str]:
        """The requests placed on a replica that have not ended, in order of placement.

        Raises:
            InvalidRequest: there is no such replica.
        """
        return list(self._fleet.ledger(replica).requests)

    def resident_pages(self, replica: int) -> frozenset[int]:
        """The hashes of the pages in a replica's prefix cache (`preble.sched.hashing`), as its events tell.

        Raises:
            InvalidRequest: there is no such replica.
        """
        return self._fleet.tree.resident(self._fleet.ledger(replica).cache)

    def hottest_prefixes(self, count: int = 10) -> list[HotPrefix]:
        """The stretches of prompts whose sharing within the window saves most, the hottest first, and which replicas
        have them. Walks the whole prefix tree and changes nothing."""
        fleet = self._fleet
        replicas = {ledger.cache.slot: number for number, ledger in fleet.ledgers.items()}
        return hottest_prefixes(fleet.tree, replicas, count)

    def check(self) -> None:
        """Prove every invariant from scratch.

        Raises:
            AssertionError: one does not hold; the message names it.
        """
        self._fleet.check()
        waiting = list(self._waiting)
        require([one.urgency for one in waiting] == sorted(one.urgency for one in waiting), "the queue is out of order")
        require(all(one.ledger is None and one.node is None for one in waiting), "a waiting request is booked")
        placed = [one for ledger in self._fleet.ledgers.values() for one in ledger.requests.values()]
        here = {one.request_id: one for one in waiting + placed}
        require(len(here) == len(waiting) + len(placed), "a request is in two places")
        require(here == self._requests, "a request is lost, or was never submitted")

    # Deciding

    def _request(
        self,
        request_id: str,
        token_ids: TokenIds,
        now: float,
        max_tokens: int,
        namespace: str,
        priority: int,
        deadline: float | None,
        session: str | None,
        expected_tokens: int | None,
    ) -> Request:
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}")
        if expected_tokens is not None and expected_tokens < 1:
            raise InvalidRequest(f"expected_tokens must be at least 1, not {expected_tokens}")
        return Request(
            request_id,
            as_tokens(token_ids),
            max_tokens=max_tokens,
            namespace=namespace,
            priority=priority,
            deadline=deadline,
            session=session,
            hint=expected_tokens,
            number=self._submitted,
            submitted=max(now, self._now),
        )

    def _kind(self, cost: str | CostModel) -> FittedCost:
        """What replicas that begin with this cost model learn together: all of a name, or of the scheduler's own."""
        if cost is self._cost:
            return self._own_kind
        if not isinstance(cost, str):
            return FittedCost(make_cost(cost))
        kind = self._kinds.get(cost)
        if kind is None:
            kind = self._kinds[cost] = FittedCost(make_cost(cost))
        return kind

    def _advance(self, now: float) -> None:
        later = now > self._now
        if later:
            self._now = now
        # Also when no time passed: a burst must be forgotten as fast as it came in.
        self._fleet.sweep(self._now)
        if later and now - self._reviewed >= self._policy.review_every:
            self._review()

    def _review(self) -> None:
        self._news = True
        self._reviewed = self._now
        self._policy.review(self._fleet.eligible, self._now)

    def _place(self, request: Request) -> Placement | None:
        """Choose and book in one go; `None`, with nothing changed, if the request must wait."""
        fleet = self._fleet
        if not fleet.eligible:
            return None
        match = fleet.tree.find(request.namespace, request.tokens)
        view = fleet.view(request, match, self._now, self._lots)
        choice = self._choose(view)
        if choice is None:
            if self._policy.overtakes:
                request.service_seconds = self._policy.service_seconds(view)
            return None
        ledger = fleet.eligible[choice.chosen]
        cached = view.matched[choice.chosen]
        fleet.place(request, ledger, cached, match, self._now)
        self._policy.placed(view, choice)
        return Placement(request.request_id, ledger.replica, cached, choice.reason, choice.costs)

    def _choose(self, view: View) -> Choice | None:
        choice = self._policy.choose(view)
        if choice is not None and not 0 <= choice.chosen < len(view.replicas):
            raise IndexError(f"policy {self._policy.name!r} chose {choice.chosen} of {len(view.replicas)} replicas")
        return choice

    def _place_waiting(self) -> list[Placement]:
        placements: list[Placement] = []
        eligible = self._fleet.eligible
        waiting, accepts = self._waiting, self._policy.accepts
        self._news = False
        if not eligible or waiting.empty or not accepts(eligible):
            return placements
        offers = waiting.offers(self._now) if self._policy.overtakes else waiting.in_turn()
        for request in offers:
            placement = self._place(request)
            if placement is not None:
                waiting.serve(request)
                placements.append(placement)
                if not accepts(eligible):
                    break
            elif not self._policy.overtakes:
                break
        return placements

    def _obstacle(self) -> str:
        """Why a request would wait."""
        if self._fleet.eligible:
            return "every replica is busy" if self._waiting.empty else "others wait before it"
        states = {ledger.state for ledger in self._fleet.ledgers.values()}
        return "every replica that is up drains" if "draining" in states else "no replica is up"

    def _move(self, requests: list[Request]) -> Moved:
        """Requests were taken off a replica, oldest first; the replicas are not what they were."""
        self._take_back(requests)
        return Moved(tuple([one.request_id for one in requests]), tuple(self._place_waiting()))

    def _take_back(self, requests: list[Request]) -> None:
        for request in requests:
            self._waiting.push(request)
        self._review()

    # Replicas report

    def _admitted(self, ledger: Ledger, event: Admitted) -> None:
        request = ledger.requests.get(event.request_id)
        if request is not None:
            self._news = True
            self._fleet.admitted(request, event.cached_tokens, self._now)

    def _progressed(self, ledger: Ledger, event: Progressed) -> None:
        request = ledger.requests.get(event.request_id)
        if request is not None:
            generated = 0
            if event.new_tokens:
                generated = event.computed_tokens + 1 - len(request.tokens)
                if request.decoding and generated > request.output_tokens:  # by far the most frequent event
                    ledger.generate(request, generated)
                    return
                if not request.output_tokens:
                    self._fleet.traffic.started(self._now - request.submitted)
            self._news = True
            ledger.progress(request, event.computed_tokens, generated)

    def _preempted(self, ledger: Ledger, event: Preempted) -> None:
        request = ledger.requests.get(event.request_id)
        if request is not None:
            self._news = True
            ledger.preempt(request)

    def _finished(self, ledger: Ledger, event: Finished) -> None:
        request = ledger.requests.get(event.request_id)
        if request is not None:
            self._news = True
            self._fleet.finished(request, self._now)
            del self._requests[event.request_id]

    def _stored(self, ledger: Ledger, event: Stored) -> None:
        if ledger.up and (news := ledger.cache.order.news(event.sequence, event.hashes)) is not None:
            self._fleet.tree.store(ledger.cache, news)

    def _evicted(self, ledger: Ledger, event: Evicted) -> None:
        if ledger.up and (news := ledger.cache.order.news(event.sequence, event.hashes)) is not None:
            self._fleet.tree.evict(ledger.cache, news)

    def _step_timed(self, ledger: Ledger, event: StepTimed) -> None:
        ledger.cost.observe(event)

    def _down(self, ledger: Ledger, event: ReplicaDown) -> None:
        if ledger.up:
            self._take_back(self._fleet.down(ledger))

    def _up(self, ledger: Ledger, event: ReplicaUp) -> None:
        if not ledger.up:
            self._fleet.up(ledger, event.sequence)
            self._review()
