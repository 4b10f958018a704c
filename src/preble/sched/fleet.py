"""The replicas: what each has in its cache, and what each has to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from preble.errors import InvalidRequest
from preble.sched.event_order import EventOrder
from preble.sched.explanation import Candidate
from preble.sched.invariants import require
from preble.sched.ledger import Ledger
from preble.sched.lots import Lots
from preble.sched.policies.base import NO_COSTS
from preble.sched.prefix_stats import PrefixStats
from preble.sched.prefix_tree import Match, PrefixTree
from preble.sched.replica_cost import ReplicaCost
from preble.sched.request import Request
from preble.sched.sessions import Sessions
from preble.sched.traffic import Traffic
from preble.sched.view import Situation

EXPIRY_GRAIN = 0.001
"""Load leaves the window in portions of this share of it."""


class Fleet:
    """All replicas, numbered in order of arrival, over one prefix tree.

    Args:
        page_size: tokens in a page, the same on all replicas.
        window: H, seconds for which load counts and prefixes are remembered that no replica holds.
    """

    def __init__(self, page_size: int, window: float) -> None:
        self.page_size = page_size
        self.window = window
        self.tree = PrefixTree(page_size, window)
        self.sessions = Sessions(window)
        self.traffic = Traffic()
        self.ledgers: dict[int, Ledger] = {}
        """By number, in ascending order."""
        self.numbers_used = 0
        """Replica numbers from 0 up to this were given out, and never will be again."""
        self.eligible: tuple[Ledger, ...] = ()
        """Those that may be given requests."""
        self._eligible_slots: tuple[int, ...] = ()
        self._eligible_mask = 0
        self._placements = 0
        self._expired = float("-inf")
        """Load from before this time no longer counts."""

    def ledger(self, replica: int) -> Ledger:
        """The books of a replica that must be here."""
        ledger = self.ledgers.get(replica)
        if ledger is None:
            here = ", ".join(map(str, self.ledgers)) or "none"
            raise InvalidRequest(f"there is no replica {replica!r}; there are: {here}")
        return ledger

    # Replicas come and go

    def add(self, *, capacity_tokens: int, max_batched_tokens: int, cost: ReplicaCost) -> int:
        """One more replica, with an empty cache; returns its number."""
        if capacity_tokens < self.page_size:
            raise InvalidRequest(f"capacity_tokens={capacity_tokens} is less than a page of {self.page_size} tokens")
        number = self.numbers_used
        self.numbers_used += 1
        self.ledgers[number] = Ledger(
            number,
            capacity_tokens=capacity_tokens,
            page_size=self.page_size,
            max_batched_tokens=max_batched_tokens,
            cost=cost,
            cache=self.tree.open_cache(capacity_tokens // self.page_size, cost.prefill_seconds),
        )
        self._find_eligible()
        return number

    def remove(self, ledger: Ledger) -> list[Request]:
        """Forget a replica; returns what was in flight there, oldest first."""
        lost = self._lose(ledger)
        self.tree.close_cache(ledger.cache)
        del self.ledgers[ledger.replica]
        self._find_eligible()
        return lost

    def drain(self, ledger: Ledger) -> list[Request]:
        """Give a replica nothing more. Takes off it what it is not working on, if there is another that may be given
        requests; returns that, oldest first."""
        ledger.draining = True
        self._find_eligible()
        waiting = [request for request in ledger.requests.values() if request.queued] if self.eligible else []
        return self._take_off(waiting)

    def down(self, ledger: Ledger) -> list[Request]:
        """A replica lost its cache and its requests; returns these, oldest first. Should it come back it is like a new
        one, but for how fast it seemed: a restart changes nothing about the machine."""
        lost = self._lose(ledger)
        ledger.forget_load()
        ledger.up = False
        self._find_eligible()
        return lost

    def up(self, ledger: Ledger, sequence: int) -> None:
        """A replica that was down serves again; its cache events up to `sequence` belong to its earlier life."""
        ledger.up = True
        ledger.cache.order = EventOrder(sequence)
        self._find_eligible()

    # Time passes

    def sweep(self, now: float) -> None:
        """Forget what lies before the window."""
        self.tree.sweep(now)
        self.sessions.sweep(now)
        horizon = self._horizon(now)
        if horizon > self._expired:
            self._expired = horizon
            for ledger in self.ledgers.values():
                ledger.expire(horizon)

    @contextmanager
    def as_of(self, now: float) -> Iterator[None]:
        """The load of the window as it will be at a later time if nothing happens until then, while this lasts."""
        horizon = self._horizon(now)
        kept = [(one, one.window_prefill_seconds, one.window_decode_seconds) for one in self.ledgers.values()]
        for ledger, _, _ in kept:
            ledger.window_prefill_seconds, ledger.window_decode_seconds = ledger.load_since(horizon)
        try:
            yield
        finally:
            for ledger, prefill, decode in kept:
                ledger.window_prefill_seconds, ledger.window_decode_seconds = prefill, decode

    def _horizon(self, now: float) -> float:
        """The time from before which load does not count."""
        horizon = now - self.window
        return horizon if horizon >= self._expired + self.window * EXPIRY_GRAIN else self._expired

    # Requests come and go

    def view(self, request: Request, match: Match, now: float, lots: Lots) -> Situation:
        """What a policy sees of a request, whose expected output is worked out here. Some replica must be eligible."""
        cached = self.tree.cached(match, self._eligible_mask)
        prefix = None
        if match.node is not None:
            key = self.tree.key_portion(match.node, match.matched)
            prefix = None if key is None else key.stats
        expected: float
        if request.hint is not None:
            expected = request.hint
        elif prefix is not None and prefix.outputs:
            expected = prefix.mean_output
        else:
            expected = self.traffic.mean_output_tokens
        request.expected_tokens = max(min(expected, request.max_tokens), 1.0)
        session = None
        if request.session is not None:
            last = self.sessions.last((request.namespace, request.session), now)
            session = self.eligible.index(last) if last in self.eligible else None
        return Situation(
            request,
            self.eligible,
            tuple([cached[slot] for slot in self._eligible_slots]),
            now,
            lots,
            self.traffic,
            session,
            prefix,
            match,
            self.tree,
        )

    def place(self, request: Request, ledger: Ledger, cached_tokens: int, match: Match, now: float) -> None:
        """Book a request on a replica that has `cached_tokens` of it."""
        request.node = self.tree.enter(request.namespace, request.tokens, match, ledger.cache, now)
        ledger.place(request, cached_tokens, self._placements, now)
        if request.session is not None:
            self.sessions.placed((request.namespace, request.session), ledger, now)
        self._placements += 1

    def admitted(self, request: Request, cached_tokens: int, now: float) -> None:
        """A replica started on a request."""
        assert request.ledger is not None
        request.ledger.admit(request, cached_tokens)
        if not request.admitted:
            request.admitted = True
            request.stats = stats = self._key_stats(request, now)
            if stats is not None:
                stats.waited(now - request.submitted, now, self.window)

    def finished(self, request: Request, now: float) -> None:
        """A request ended on its replica, having done what it came for."""
        self.traffic.ended(now - request.submitted, request.output_tokens)
        stats = request.stats or self._key_stats(request, now)
        if stats is not None:
            stats.ended(request.output_tokens)
        self.leave(request)

    def leave(self, request: Request) -> None:
        """A request leaves its replica."""
        ledger = request.ledger
        assert ledger is not None
        ledger.release(request)
        if request.node is not None:
            self.tree.leave(ledger.cache, request.node)
            request.node = None

    def _key_stats(self, request: Request, now: float) -> PrefixStats | None:
        """The books of the key portion of what a request's prompt shares with others within the window."""
        node = request.node
        while node is not None and node.uses < 2:
            node = node.parent  # type: ignore[assignment]  # a tree's nodes are all of one type
        if node is None or node.parent is None:
            return None
        key = self.tree.key_portion(node, node.end)
        assert key is not None  # at the latest the one that starts at 0
        if key.stats is None:
            key.stats = PrefixStats(now)
        return key.stats

    def candidates(self, match: Match, costs: Mapping[int, Mapping[str, float]]) -> tuple[Candidate, ...]:
        """All replicas as they stand towards a prompt."""
        everybody = sum(ledger.cache.bit for ledger in self.ledgers.values())
        cached = self.tree.cached(match, everybody)
        confirmed = self.tree.cached(match, everybody, confirmed=True)
        return tuple(
            Candidate(
                replica=number,
                state=ledger.state,
                cached_tokens=cached[ledger.cache.slot],
                confirmed_tokens=confirmed[ledger.cache.slot],
                in_flight=ledger.in_flight,
                queued_prefill_tokens=ledger.queued_prefill_tokens,
                decoding=ledger.decoding,
                costs=costs.get(number, NO_COSTS),
            )
            for number, ledger in self.ledgers.items()
        )

    def check(self) -> None:
        """Prove from scratch that the books and the tree agree."""
        for number, ledger in self.ledgers.items():
            require(number == ledger.replica < self.numbers_used, f"replica {number} has a wrong number")
            ledger.check()
        eligible = tuple(ledger for ledger in self.ledgers.values() if ledger.eligible)
        require(self.eligible == eligible, "the eligible replicas are out of date")
        require(self._eligible_slots == tuple(one.cache.slot for one in eligible), "their slots are out of date")
        require(self._eligible_mask == sum(one.cache.bit for one in eligible), "their mask is out of date")
        everything = [(ledger, request) for ledger in self.ledgers.values() for request in ledger.requests.values()]
        prompts = [(request.node, ledger.cache.slot) for ledger, request in everything if request.node is not None]
        for _, request in everything:
            whole = len(request.tokens) - len(request.tokens) % self.page_size
            end = 0 if request.node is None else request.node.end
            require(end == whole, f"request {request.request_id!r}: its prompt is not in the tree")
        self.tree.check_residency({ledger.cache for ledger in self.ledgers.values()}, prompts)
        self.sessions.check(list(self.ledgers.values()))

    def _lose(self, ledger: Ledger) -> list[Request]:
        lost = self._take_off(ledger.requests.values())
        self.tree.forget(ledger.cache)
        self.sessions.forget(ledger)
        return lost

    def _take_off(self, requests: Iterable[Request]) -> list[Request]:
        oldest_first = sorted(requests, key=lambda request: request.number)
        for request in oldest_first:
            self.leave(request)
        return oldest_first

    def _find_eligible(self) -> None:
        self.eligible = tuple(ledger for ledger in self.ledgers.values() if ledger.eligible)
        self._eligible_slots = tuple(ledger.cache.slot for ledger in self.eligible)
        self._eligible_mask = sum(1 << slot for slot in self._eligible_slots)
