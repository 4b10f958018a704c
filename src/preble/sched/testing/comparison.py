"""The scheduler beside a model of everything: how it is called, and what must hold after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine, invariant

from preble.sched.events import Event
from preble.sched.explanation import Explanation
from preble.sched.invariants import require
from preble.sched.placement import Placement, Waiting
from preble.sched.policies import E2, Policy, ReplicaView
from preble.sched.scheduler import GlobalScheduler
from preble.sched.testing.arrivals import Arrival
from preble.sched.testing.model import ModelReplica, ModelRequest, ModelTree, Page, name_of, on, pages_of, run_length

WINDOW = 20.0
"""H of the schedulers under test, in seconds."""


class Comparison(RuleBasedStateMachine):
    """What `SchedulerMachine` does its rules with."""

    scheduler: GlobalScheduler
    """The one under test."""
    policy: Policy
    """The one that it decides by."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        """Seconds."""
        self.page_size = 1
        self.replicas: dict[int, ModelReplica] = {}
        self.requests: dict[str, ModelRequest] = {}
        """Those that have not ended, in order of submission."""
        self.tree = ModelTree(WINDOW)
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self._options: dict[str, Any] = {}

    def make_scheduler(self, **options: Any) -> None:
        """Set `scheduler` and `policy`; the options are used again in the replay."""
        self._options = options
        self.policy = self.new_policy()
        self.scheduler = GlobalScheduler(0, policy=self.policy, **options)

    def new_policy(self) -> Policy:
        """A fresh one of the policy to be checked."""
        return E2()

    # Where everything is

    @property
    def eligible(self) -> list[int]:
        """The replicas that may be given requests."""
        return [number for number, one in self.replicas.items() if one.up and not one.draining]

    @property
    def running(self) -> list[ModelRequest]:
        """The requests on replicas."""
        return [one for one in self.requests.values() if one.replica is not None]

    @property
    def waiting(self) -> list[str]:
        """The requests that wait in the cluster, most urgent first."""
        waiting = [one for one in self.requests.values() if one.replica is None]
        return [one.name for one in sorted(waiting, key=lambda one: one.urgency)]

    def books(self, replica: int) -> ReplicaView:
        """What the scheduler keeps of a replica."""
        return next(one for one in self.scheduler.replicas if one.replica == replica)

    def visible(self, replica: int) -> set[Page]:
        """The pages that the scheduler must know to be in a replica's cache."""
        model = self.replicas[replica]
        if not model.doubtful:
            return model.stated
        resident = self.scheduler.resident_pages(replica)
        return {
            page for page in model.stated if page not in model.doubtful or name_of(page, self.page_size) in resident
        }

    # Calling the scheduler

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the scheduler, and again in the replay. What the model knows of the matter is done before,
        what the answer says after."""
        self.tree.forget(self.now, self.running, map(self.visible, self.replicas), self.page_size)
        answer = getattr(self.scheduler, method)(*args, **options)
        self._calls.append((method, args, options, answer))
        return answer

    def apply(self, event: Event) -> None:
        """An event arrives."""
        self.note(self.call("apply", event, now=self.now))

    def note(self, placements: Sequence[Placement]) -> None:
        """A call placed these."""
        order = [self.requests[one.request_id].urgency for one in placements]
        if not self.policy.overtakes:
            require(order == sorted(order), f"served in a wrong order: {placements}")
        for one in placements:
            request = self.requests[one.request_id]
            require(request.replica is None, f"placed twice: {one}")
            require(one.replica in self.eligible, f"this replica may not be given anything: {one}")
            request.place(one.replica, one.cached_tokens)
            self.replicas[one.replica].last_placed = self.now
            self.tree.use(request.prompt_pages, self.now)
        if self.waiting and self.eligible:
            more = self.call("poll", self.now)
            if (
                more and self.policy.overtakes
            ):  # an event that alone is no reason to ask them all again made it possible
                self.note(more)
                return
            require(not more, f"these could have been served before: {more}")
            self.must_wait(self.requests[self.waiting[0]])

    def submit_one(self, request: ModelRequest) -> None:
        """Submit a request, and see that it is treated as was explained just before."""
        self.requests[request.name] = request
        arrival = request.arrival
        before = self.explain(arrival)
        answer = self.call("submit", request.name, arrival.token_ids, now=self.now, **arrival.options)
        said = f"explain said replica {before.replica} ({before.reason}), submit did {answer}"
        replica = None if isinstance(answer, Waiting) else answer.replica
        require((before.replica, before.reason) == (replica, answer.reason), said)
        require(answer.request_id == request.name, f"asked for {request.name!r}, got {answer}")
        if isinstance(answer, Placement):
            (cached,) = (one.cached_tokens for one in before.candidates if one.replica == replica)
            require(cached == answer.cached_tokens, f"explain saw {cached} cached tokens; {answer}")
        self.decided(before, answer)
        self.note([answer] if isinstance(answer, Placement) else [])

    def explain(self, arrival: Arrival) -> Explanation:
        """Ask for an explanation, and compare what is known of each replica with the model."""
        explanation = self.scheduler.explain(arrival.token_ids, now=self.now, **arrival.options)
        require([one.replica for one in explanation.candidates] == list(self.replicas), "a replica was left out")
        pages = pages_of(arrival.namespace, arrival.token_ids, self.page_size)
        for one in explanation.candidates:
            where = f"replica {one.replica}, prompt {arrival.token_ids} in {arrival.namespace!r}"
            visible = self.visible(one.replica)
            promised = {page for other in on(self.requests, one.replica) for page in other.prompt_pages}
            confirmed = run_length(pages, visible) * self.page_size
            require(one.confirmed_tokens == confirmed, f"{where}: {one.confirmed_tokens} confirmed, not {confirmed}")
            cached = run_length(pages, visible | promised) * self.page_size
            require(one.cached_tokens == cached, f"{where}: {one.cached_tokens} cached, not {cached}")
        return explanation

    # Hooks

    def decided(self, before: Explanation, answer: Placement | Waiting) -> None:
        """A request was submitted; `before` is what was explained just before. A hook for subclasses."""

    def must_wait(self, request: ModelRequest) -> None:
        """The most urgent of the waiting requests waits though some replica is up. A hook for subclasses; by itself it
        asks that the policy waits for something."""
        require(bool(self.running), f"{request.name} waits, and nothing is in flight that could release it")

    # What must hold

    @invariant()
    def holds(self) -> None:
        """Everything that must hold after every step."""
        self.scheduler.check()
        self.check_requests()
        self.check_residency()
        self.check_books()
        self.check_tree()
        self.check_explanations()

    def check_requests(self) -> None:
        """Every request is where it was placed, or waits in its turn."""
        for replica in self.replicas:
            here = self.scheduler.in_flight(replica)
            require(sorted(here) == sorted(one.name for one in on(self.requests, replica)), f"{replica} has {here}")
        require(self.scheduler.waiting == self.waiting, f"waiting: {self.scheduler.waiting}, not {self.waiting}")

    def check_residency(self) -> None:
        """Every replica has what its cache events say."""
        for replica, model in self.replicas.items():
            resident = self.scheduler.resident_pages(replica)
            stated = {name_of(page, self.page_size) for page in model.stated}
            if model.doubtful:
                doubtful = {name_of(page, self.page_size) for page in model.doubtful}
                require(stated - doubtful <= resident <= stated, f"replica {replica} has other pages than it said")
                continue
            require(resident == stated, f"replica {replica} has other pages than it said")
            if model.up and not model.held_back:
                require(model.stated == model.cache.keys(), "the model itself is wrong")

    def check_books(self) -> None:
        """The sums of every ledger are those of the model."""
        for books in self.scheduler.replicas:
            requests = on(self.requests, books.replica)
            decoding = [one for one in requests if one.decoding]
            pinned = {page for one in requests for page in one.prompt_pages}
            private = [[end - len(one.prompt_pages) for end in one.pages_at_the_end] for one in requests]
            fewest, most = (sum(ends[side] for ends in private) for side in (0, 1))
            total = sum(len(one.prompt_pages) for one in requests)
            where = f"replica {books.replica}"
            for what, kept, expected in (
                ("requests", books.in_flight, len(requests)),
                ("queued requests", books.queued, sum(one.queued for one in requests)),
                ("tokens to prefill", books.queued_prefill_tokens, sum(one.to_prefill for one in requests)),
                ("decoding requests", books.decoding, len(decoding)),
                ("tokens of these", books.decode_context_tokens, sum(len(one.history) for one in decoding)),
                ("resident tokens", books.resident_tokens, len(self.visible(books.replica)) * self.page_size),
            ):
                require(kept == expected, f"{where} counts {kept} {what}, not {expected}")
            for what, kept, least in (
                ("unique", books.unique_pages, len(pinned)),
                ("total", books.total_pages, total),
            ):
                fits = least + fewest <= kept <= least + most
                require(fits, f"{where} counts {kept} {what} pages, not {least + fewest} to {least + most}")
            load = books.window_prefill_seconds, books.window_decode_seconds
            require(min(*load, books.queued_prefill_seconds) > -1e-6, f"{where} has less than no load: {load}")
            if self.replicas[books.replica].last_placed < self.now - 1.01 * WINDOW:
                require(max(load) == 0.0, f"{where} got nothing within the window, and its load is {load}")

    def check_tree(self) -> None:
        """The tree remembers what it must, and no more."""
        pages = self.scheduler.tree_pages
        require(pages == len(self.tree.uses), f"the tree has {pages} pages, not {len(self.tree.uses)}")

    def check_explanations(self) -> None:
        """What is explained of a prompt is right, and the same when asked again."""
        recent = [Arrival(self.now, (0, 1, 2) * self.page_size), *(one.arrival for one in self.running[-1:])]
        for arrival in recent:
            first, second = self.explain(arrival), self.explain(arrival)
            require(first == second, f"explain said\n{first}\nand then\n{second}")
            later = self.scheduler.explain(arrival.token_ids, now=self.now + 2 * WINDOW, **arrival.options)
            loads = [one.costs.get("load_seconds", 0.0) for one in later.candidates]
            require(not any(loads), f"load outlives the window: {later}")

    def teardown(self) -> None:
        again = GlobalScheduler(0, policy=self.new_policy(), **self._options) if self._calls else None
        for method, args, options, answer in self._calls:
            replayed = getattr(again, method)(*args, **options)
            require(replayed == answer, f"{method}{args} gave {answer}, and in the replay {replayed}")
