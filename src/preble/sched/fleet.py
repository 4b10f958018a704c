"""The replicas: what each has in its cache, and what each has to do."""

from __future__ import annotations

from collections.abc import Mapping

from preble.errors import InvalidRequest
from preble.sched.event_order import EventOrder
from preble.sched.explanation import Candidate
from preble.sched.invariants import require
from preble.sched.ledger import Ledger
from preble.sched.lots import Lots
from preble.sched.policies.base import NO_COSTS, View
from preble.sched.prefix_node import PrefixNode
from preble.sched.prefix_tree import PrefixTree
from preble.sched.request import Request


class Fleet:
    """All replicas, numbered in order of arrival, over one prefix tree.

    Args:
        page_size: tokens in a page, the same on all replicas.
        window: seconds for which a prefix is remembered that no replica holds and nobody uses.
    """

    def __init__(self, page_size: int, window: float) -> None:
        self.page_size = page_size
        self.tree = PrefixTree(page_size, window)
        self.ledgers: dict[int, Ledger] = {}
        """By number, in ascending order."""
        self.numbers_used = 0
        """Replica numbers from 0 up to this were given out, and never will be again."""
        self.eligible: tuple[Ledger, ...] = ()
        """Those that may be given requests."""
        self._eligible_slots: tuple[int, ...] = ()
        self._eligible_mask = 0
        self._placements = 0

    def ledger(self, replica: int) -> Ledger:
        """The books of a replica that must be here."""
        ledger = self.ledgers.get(replica)
        if ledger is None:
            here = ", ".join(map(str, self.ledgers)) or "none"
            raise InvalidRequest(f"there is no replica {replica!r}; there are: {here}")
        return ledger

    # Replicas come and go

    def add(self, capacity_tokens: int) -> int:
        """One more replica, with an empty cache; returns its number."""
        if capacity_tokens < self.page_size:
            raise InvalidRequest(f"capacity_tokens={capacity_tokens} is less than a page of {self.page_size} tokens")
        number = self.numbers_used
        self.numbers_used += 1
        cache = self.tree.open_cache(capacity_tokens // self.page_size)
        self.ledgers[number] = Ledger(number, capacity_tokens, self.page_size, cache)
        self._find_eligible()
        return number

    def remove(self, ledger: Ledger, now: float) -> list[Request]:
        """Forget a replica; returns what was in flight there, oldest first."""
        lost = self._lose(ledger, now)
        self.tree.close_cache(ledger.cache)
        del self.ledgers[ledger.replica]
        self._find_eligible()
        return lost

    def drain(self, ledger: Ledger) -> None:
        """Give a replica nothing more."""
        ledger.draining = True
        self._find_eligible()

    def down(self, ledger: Ledger, now: float) -> list[Request]:
        """A replica lost its cache and its requests; returns these, oldest first."""
        lost = self._lose(ledger, now)
        ledger.up = False
        self._find_eligible()
        return lost

    def up(self, ledger: Ledger, sequence: int) -> None:
        """A replica that was down serves again; its cache events up to `sequence` belong to its earlier life."""
        ledger.up = True
        ledger.cache.order = EventOrder(sequence)
        self._find_eligible()

    # Requests come and go

    def view(self, request: Request, node: PrefixNode | None, matched: int, now: float, lots: Lots) -> View:
        """What a policy sees of a request whose prompt was found to end at `node`. Some replica must be eligible."""
        cached = self.tree.cached(node, matched, self._eligible_mask)
        return View(request, self.eligible, tuple([cached[slot] for slot in self._eligible_slots]), now, lots)

    def place(
        self, request: Request, ledger: Ledger, cached_tokens: int, node: PrefixNode | None, matched: int, now: float
    ) -> None:
        """Book a request, whose prompt was found to end at `node`, on a replica that has `cached_tokens` of it."""
        request.node = end = self.tree.use(request.namespace, request.tokens, node, matched, now)
        if end is not None:
            request.prediction = self.tree.predict(ledger.cache, end)
        ledger.place(request, cached_tokens, self._placements)
        self._placements += 1

    def leave(self, request: Request, now: float) -> None:
        """A request leaves its replica. Prompt and output stay known for a while, as a conversation may go on."""
        assert request.ledger is not None
        request.ledger.release(request)
        tree = self.tree
        if request.prediction is not None:
            tree.retract(request.prediction)
            request.prediction = None
        end = request.node
        if end is not None and end.parent is not None:
            tokens = request.history(end.end)
            tree.use(request.namespace, tokens, *tree.walk(end, tokens, end.end), now, end.end)
        else:
            tokens = request.history()
            tree.use(request.namespace, tokens, *tree.find(request.namespace, tokens), now)
        request.node = None

    def candidates(
        self, node: PrefixNode | None, matched: int, costs: Mapping[int, Mapping[str, float]]
    ) -> tuple[Candidate, ...]:
        """All replicas as they stand towards a prompt that was found to end at `node`."""
        everybody = sum(ledger.cache.bit for ledger in self.ledgers.values())
        cached = self.tree.cached(node, matched, everybody)
        confirmed = self.tree.cached(node, matched, everybody, confirmed=True)
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
        caches = {ledger.cache for ledger in self.ledgers.values()}
        predictions = []
        for ledger in self.ledgers.values():
            for request in ledger.requests.values():
                if request.prediction is not None:
                    predictions.append(request.prediction)
                    here = request.prediction.slot == ledger.cache.slot
                    require(here, f"request {request.request_id!r} is predicted elsewhere")
        self.tree.check_residency(caches, predictions)

    def _lose(self, ledger: Ledger, now: float) -> list[Request]:
        lost = sorted(ledger.requests.values(), key=lambda request: request.number)
        for request in lost:
            self.leave(request, now)
        self.tree.forget(ledger.cache)
        return lost

    def _find_eligible(self) -> None:
        self.eligible = tuple(ledger for ledger in self.ledgers.values() if ledger.eligible)
        self._eligible_slots = tuple(ledger.cache.slot for ledger in self.eligible)
        self._eligible_mask = sum(1 << slot for slot in self._eligible_slots)
