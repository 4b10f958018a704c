"""What the global tree knows of one replica's prefix cache."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from preble.sched.event_order import EventOrder

if TYPE_CHECKING:
    from preble.sched.prefix_node import PrefixNode

MOST_VICTIMS = 16
"""How many nodes are priced at a time, from the least recently used one on."""

MOST_EVICTED = 0.125
"""… or until they make up this part of the cache."""

MOST_CHANGES = 64
"""Prices are worked out again after so many changes, or sooner where the cache has few nodes."""


class ReplicaCache:
    """One replica's side of the residency that the tree's nodes keep: where it holds pages, so that all of it can be
    forgotten without a search, and in what order it would evict them.

    Args:
        slot: the replica's bit position in the tree's masks; slots are used again, replica numbers are not.
        capacity_pages: how many pages the replica has.
        page_size: tokens in a page.
        seconds: prefill time of so many tokens behind so many.
    """

    __slots__ = (
        "_changes",
        "_evicted",
        "_page_size",
        "_prefill_seconds",
        "_victim_once",
        "_victim_pages",
        "_victim_seconds",
        "bit",
        "capacity_pages",
        "idle_pages",
        "nodes",
        "order",
        "pages",
        "pinned_pages",
        "slot",
        "unknown",
    )

    def __init__(self, slot: int, capacity_pages: int, page_size: int, seconds: Callable[[int, int], float]) -> None:
        self._page_size = page_size
        self._prefill_seconds = seconds
        self._changes = 0
        self._evicted = 0
        """Pages that went since the prices were worked out."""
        self._victim_pages = [0]
        self._victim_once = [0.0]
        self._victim_seconds = [0.0]
        """Running sums over what would be evicted first: pages, what computing them once more takes of those used
        within the window, and the same times the prompts that used them."""
        self.slot = slot
        self.bit = 1 << slot
        self.capacity_pages = capacity_pages
        self.order = EventOrder()
        self.pages = 0
        """Resident pages whose tokens the tree knows."""
        self.idle_pages = 0
        """… of which no prompt in flight here uses these."""
        self.pinned_pages = 0
        """Pages of the prompts in flight here, resident or not, shared ones counted once."""
        self.nodes: OrderedDict[PrefixNode, None] = OrderedDict()
        """The nodes with at least one resident page, least recently used first and descendants before their ancestors:
        the order in which the replica evicts."""
        self.unknown: dict[int, None] = {}
        """Hashes of resident pages whose tokens the tree does not know: mostly output. Oldest first. Never more than
        the replica has pages: beyond that the oldest are forgotten."""

    @property
    def evictable_pages(self) -> int:
        """Resident pages that the replica could evict."""
        return self.idle_pages + len(self.unknown)

    def eviction_seconds(self, pages: int) -> float:
        """M in the paper: what it costs to lose the `pages` pages that the replica would evict first. Of each run: the
        time to compute it again times the number of prompts within the window that used it."""
        return self._lost(pages, self._victim_seconds)

    def recomputing_seconds(self, pages: int) -> float:
        """The time to compute once more the `pages` pages that the replica would evict first, of those that a prompt
        within the window used."""
        return self._lost(pages, self._victim_once)

    def _lost(self, pages: int, seconds: list[float]) -> float:
        pages -= len(self.unknown)  # output that no prompt has contained yet goes at no cost
        if pages <= 0:
            return 0.0
        return self._sum(self._evicted + pages, seconds) - self._sum(self._evicted, seconds)

    def _sum(self, pages: int, seconds: list[float]) -> float:
        sums = self._victim_pages
        if pages >= sums[-1]:  # go on at the average price
            return seconds[-1] * pages / sums[-1] if sums[-1] else 0.0
        at = bisect_left(sums, pages)
        if sums[at] == pages:
            return seconds[at]
        part = (pages - sums[at - 1]) / (sums[at] - sums[at - 1])
        return seconds[at - 1] + part * (seconds[at] - seconds[at - 1])

    def changed(self, evicted: int = 0) -> None:
        """Pages came or went, or were used. Prices are worked out now and then, never when they are asked for: asking
        must change nothing."""
        self._evicted += evicted
        self._changes += 1
        if self._changes >= MOST_CHANGES or 4 * self._changes >= len(self.nodes):
            self._price()

    def _price(self) -> None:
        self._changes = self._evicted = 0
        pages, once, seconds, slot, size = [0], [0.0], [0.0], self.slot, self._page_size
        enough = self.capacity_pages * MOST_EVICTED
        for node in self.nodes:
            if slot in node.pins:
                continue
            count = node.resident[slot].bit_count()
            price = self._prefill_seconds(count * size, node.start) if node.uses else 0.0
            pages.append(pages[-1] + count)
            once.append(once[-1] + price)
            seconds.append(seconds[-1] + node.uses * price)
            if len(pages) > MOST_VICTIMS or pages[-1] > enough:
                break
        self._victim_pages, self._victim_once, self._victim_seconds = pages, once, seconds
