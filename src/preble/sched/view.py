"""What a policy sees of one decision, worked out no sooner than it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preble.sched.policies.base import Stretch

if TYPE_CHECKING:
    from preble.sched.ledger import Ledger
    from preble.sched.lots import Lots
    from preble.sched.prefix_stats import PrefixStats
    from preble.sched.prefix_tree import Match, PrefixTree
    from preble.sched.request import Request
    from preble.sched.traffic import Traffic


class Situation:
    """A request, the replicas that may take it, and what they have of its prompt (`View`)."""

    __slots__ = ("_match", "_tree", "lots", "matched", "now", "prefix", "replicas", "request", "session", "traffic")

    def __init__(
        self,
        request: Request,
        replicas: tuple[Ledger, ...],
        matched: tuple[int, ...],
        now: float,
        lots: Lots,
        traffic: Traffic,
        session: int | None,
        prefix: PrefixStats | None,
        match: Match,
        tree: PrefixTree,
    ) -> None:
        self.request = request
        self.replicas = replicas
        self.matched = matched
        self.now = now
        self.lots = lots
        self.traffic = traffic
        self.session = session
        self.prefix = prefix
        self._match = match
        self._tree = tree

    @property
    def window(self) -> float:
        """H, in seconds."""
        return self._tree.window

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The longest match with any replica or recent prompt, from its start."""
        match, size = self._match, self._tree.page_size
        found: list[Stretch] = []
        if match.node is not None:
            for node in reversed(list(self._tree.path(match.node))):
                stop = min(node.end, match.matched)
                found.append(Stretch(node.start, stop, sum(node.pins.values()), node.cover.bit_count()))
        start = match.matched
        for holders in match.stored:
            found.append(Stretch(start, start + size, 0, holders.bit_count()))
            start += size
        return tuple(found)

    def eviction_seconds(self, index: int) -> float:
        """M: the price of what `replicas[index]` must evict to make room for the request."""
        pages = self._pages_to_evict(index)
        return self.replicas[index].cache.eviction_seconds(pages) if pages > 0 else 0.0

    def recomputing_seconds(self, index: int) -> float:
        """The time to compute once more what must go, of what was used within H."""
        pages = self._pages_to_evict(index)
        return self.replicas[index].cache.recomputing_seconds(pages) if pages > 0 else 0.0

    def _pages_to_evict(self, index: int) -> int:
        """How many pages the replica lacks for the request, as far as evicting helps; 0 or less if it lacks none."""
        ledger, request = self.replicas[index], self.request
        cache, size = ledger.cache, ledger.page_size
        evictable = cache.idle_pages + len(cache.unknown)
        tokens = len(request.tokens) + request.expected_tokens - self.matched[index]
        missing = cache.pinned_pages + ledger.private_pages + evictable - int(-tokens // size) - cache.capacity_pages
        return min(missing, evictable)
