"""The global prefix tree: every prompt in use, and which replicas hold which part of it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from preble.sched.hashing import Hashes, Tokens, namespace_salt, page_hashes
from preble.sched.invariants import require
from preble.sched.page_index import PageIndex
from preble.sched.prefix_node import PrefixNode
from preble.sched.radix import RadixTree
from preble.sched.replica_cache import ReplicaCache

MOST_SWEPT = 64
"""How many outdated uses one operation forgets, so that none takes long after a pause in traffic."""

SHARED = 2
"""Placements within the window that keep a prompt known though nobody holds it."""

_NO_HASHES: Hashes = np.empty(0, np.uint64)
_NO_TOKENS: Tokens = np.empty(0, np.int32)


class Match(NamedTuple):
    """What the tree knows of a prompt. Good until the tree changes."""

    node: PrefixNode | None
    """The deepest node reached; `None` in a namespace without any."""
    matched: int
    """Tokens of the prompt in the tree, whole pages; may end inside the node's edge."""
    tail: Hashes
    """Hashes of the prompt's whole pages behind that."""
    stored: tuple[int, ...]
    """For the first of these, as far as any replica holds them: the mask of the slots that do. These pages were
    generated, so the tree has not seen their tokens in a prompt yet."""


class PrefixTree(RadixTree[PrefixNode]):
    """Prompts of all namespaces with their residency.

    *Resident* is what a replica's `Stored` and `Evicted` events say, page by page. A prompt *pins* its path on the
    replica that it was placed on until the request ends: what of it is not resident there soon will be. Where events
    arrive out of order a replica may for a while hold a page without the one before it; what counts as cached is the
    run of pages from the first one on.

    Output is not in the tree: its pages are known by their hashes alone, until a prompt contains them.

    The tree is bounded: a page stays as long as some replica holds it or one behind it, or a prompt in flight contains
    it, or two placed within the last `window` seconds do. What only one prompt contained tells nothing about others
    once nobody has it. Uses older than the window are forgotten in order, a bounded number of them per `sweep`.

    Args:
        page_size: tokens in a page.
        window: seconds for which an unheld prefix is remembered: H in the paper.
    """

    def __init__(self, page_size: int, window: float) -> None:
        super().__init__(PrefixNode, page_size)
        self.window = window
        self.pages = 0
        """Pages in the tree."""
        self._index = PageIndex()
        self._caches: dict[int, ReplicaCache] = {}
        self._width = 0
        """Slots in use lie below this."""
        self._uses: deque[tuple[float, PrefixNode]] = deque()
        """When a prompt was placed and where it ends, oldest first."""
        self._swept = float("-inf")
        """No use before this time is remembered."""

    # Prompts

    def root(self, namespace: str) -> PrefixNode:
        root = super().root(namespace)
        root.namespace = namespace
        return root

    def find(self, namespace: str, tokens: Tokens) -> Match:
        """What is known of a prompt. Changes nothing."""
        root = self.roots.get(namespace)
        if root is None:
            node, matched, base = None, 0, namespace_salt(namespace)
        else:
            node, matched = self.walk(root, tokens)
            base = int(node.hashes[-1 if matched == node.end else (matched - node.start) // self.page_size - 1])
        if len(tokens) - matched < self.page_size:
            return Match(node, matched, _NO_HASHES, ())
        tail = page_hashes(tokens[matched:], self.page_size, start=matched, base=base)
        return Match(node, matched, tail, self._index.holders(tail))

    def enter(self, namespace: str, tokens: Tokens, match: Match, cache: ReplicaCache, now: float) -> PrefixNode | None:
        """A prompt is placed on a replica: put it into the tree where `find` ended, count the use, pin its path.

        Returns:
            The node with which the prompt's whole pages end, for `leave`; `None` if it has none.
        """
        if len(tokens) < self.page_size:
            return None
        node, matched = match.node, match.matched
        if node is None:
            node = self.root(namespace)
        elif matched < node.end:
            node = self.split(node, matched)
        if len(match.tail):
            node = self.extend(node, tokens, hashes=match.tail)
            names = match.tail.tolist()
            self.pages += len(names)
            for page, holders in self._index.insert(node, names):
                while holders:
                    holder = self._caches[(holders & -holders).bit_length() - 1]
                    holders &= holders - 1
                    del holder.unknown[names[page]]
                    self._add(holder, node, 1 << page)
        self._uses.append((now, node))
        slot = cache.slot
        one = node
        while one.parent is not None:
            one.uses += 1
            pins = one.pins
            if slot in pins:
                pins[slot] += 1
            else:
                pins[slot] = 1
                one.cover |= cache.bit
                cache.pinned_pages += len(one.hashes)
                bits = one.resident.get(slot)
                if bits is not None:
                    cache.idle_pages -= bits.bit_count()
            one = one.parent  # type: ignore[assignment]  # a tree's nodes are all of one type
        return node

    def leave(self, cache: ReplicaCache, node: PrefixNode) -> None:
        """A prompt that ends with `node` is no longer in flight on the replica."""
        slot = cache.slot
        one = node
        while one.parent is not None:
            pins = one.pins
            bits = one.resident.get(slot)
            if pins[slot] > 1:
                pins[slot] -= 1
            else:
                del pins[slot]
                cache.pinned_pages -= len(one.hashes)
                if bits is not None:
                    cache.idle_pages += bits.bit_count()
                if not one.full & cache.bit:
                    one.cover &= ~cache.bit
            if bits is not None:
                cache.nodes.move_to_end(one)
            one = one.parent  # type: ignore[assignment]  # as above
        cache.changed()
        if node.uses < SHARED:
            self._prune(node)

    def path(self, node: PrefixNode) -> Iterator[PrefixNode]:
        """From `node` upwards, without the root."""
        parent = node.parent
        while parent is not None:
            yield node
            node = parent  # type: ignore[assignment]  # as above
            parent = node.parent

    def key_portion(self, node: PrefixNode, stop: int) -> PrefixNode | None:
        """The deepest node, up to `node`, whose own tokens outnumber all tokens before it; `None` without any. Of
        `node` itself the tokens up to position `stop` count. (Preble, section 2: it decides where a prompt belongs.)"""
        parent = node.parent
        while parent is not None:
            start, end = node.start, node.end
            if (stop if stop < end else end) - start > start:
                return node
            node = parent  # type: ignore[assignment]  # as above
            parent = node.parent
        return None

    def sweep(self, now: float) -> None:
        """Forget uses from before the window, a bounded number of them, and what nobody holds any more."""
        uses = self._uses
        outdated = now - self.window
        for _ in range(MOST_SWEPT):
            if not uses or uses[0][0] >= outdated:
                self._swept = outdated
                return
            end = uses.popleft()[1]
            while end.gone:
                end = end.parent  # type: ignore[assignment]  # as above
            node = end
            while node.parent is not None:
                node.uses -= 1
                node = node.parent  # type: ignore[assignment]  # as above
            if end.uses < SHARED:
                self._prune(end)

    # Residency

    def cached(self, match: Match, mask: int, *, confirmed: bool = False) -> list[int]:
        """How much of a prompt the replicas in `mask` have.

        Returns:
            Tokens by slot, whole pages. With `confirmed` only what is resident counts.
        """
        found = [0] * self._width
        node, matched = match.node, match.matched
        if node is not None:
            path = []
            while node.parent is not None:
                path.append(node)
                node = node.parent  # type: ignore[assignment]  # as above
            for one in reversed(path):
                cover = one.full if confirmed else one.cover
                lost = mask & ~cover
                if lost:
                    start = one.start
                    while start and lost:
                        found[(lost & -lost).bit_length() - 1] = start
                        lost &= lost - 1
                    lost = mask & ~cover
                    for slot, bits in one.resident.items():
                        if lost >> slot & 1:
                            leading = (~bits & (bits + 1)).bit_length() - 1
                            reached = start + leading * self.page_size
                            if reached < matched:
                                found[slot] = reached
                            else:  # the match ends inside this edge, and strangers may go on from there
                                cover |= 1 << slot
                mask &= cover
                if not mask:
                    return found
        for holders in match.stored:
            lost = mask & ~holders
            while lost:
                found[(lost & -lost).bit_length() - 1] = matched
                lost &= lost - 1
            mask &= holders
            matched += self.page_size
        while mask:
            found[(mask & -mask).bit_length() - 1] = matched
            mask &= mask - 1
        return found

    def open_cache(self, capacity_pages: int, seconds: Callable[[int, int], float]) -> ReplicaCache:
        """A cache for one more replica, empty. `seconds` prices its pages (`ReplicaCache`)."""
        slot = next(slot for slot in range(len(self._caches) + 1) if slot not in self._caches)
        cache = self._caches[slot] = ReplicaCache(slot, capacity_pages, self.page_size, seconds)
        self._width = max(self._width, slot + 1)
        return cache

    def close_cache(self, cache: ReplicaCache) -> None:
        """The replica is gone, and its requests with it. Costs what it held."""
        self.forget(cache)
        del self._caches[cache.slot]

    def store(self, cache: ReplicaCache, hashes: Hashes) -> None:
        """These pages are in the replica's cache."""
        for node, bits in self._index.runs(cache, hashes, self._index.remember):
            self._add(cache, node, bits)
        cache.changed()

    def evict(self, cache: ReplicaCache, hashes: Hashes) -> None:
        """These pages are no longer in the replica's cache."""
        for node, bits in self._index.runs(cache, hashes, self._index.disown):
            self._discard(cache, node, bits)
        cache.changed(evicted=len(hashes))

    def forget(self, cache: ReplicaCache) -> None:
        """The replica's cache is empty. Costs what it held."""
        for name in list(cache.unknown):
            self._index.disown(cache, name)
        for node in list(cache.nodes):
            self._discard(cache, node, node.resident[cache.slot])
        cache.changed(evicted=cache.capacity_pages)

    def resident(self, cache: ReplicaCache) -> frozenset[int]:
        """The hashes of all pages in the replica's cache."""
        names = set(cache.unknown)
        for node in cache.nodes:
            bits = node.resident[cache.slot]
            names.update(name for page, name in enumerate(node.hashes.tolist()) if bits >> page & 1)
        return frozenset(names)

    def _split_payload(self, upper: PrefixNode, lower: PrefixNode, pages: int) -> None:
        self._index.insert(upper, upper.hashes.tolist())
        upper.pins = lower.pins.copy()
        upper.uses = lower.uses
        if lower.stats is not None and upper.end - upper.start > upper.start:
            upper.stats, lower.stats = lower.stats, None
        below = (1 << pages) - 1
        for slot, bits in list(lower.resident.items()):
            cache = self._caches[slot]
            if bits & below:
                upper.resident[slot] = bits & below
                cache.nodes[upper] = None
            if bits >> pages:
                lower.resident[slot] = bits >> pages
            else:
                del lower.resident[slot], cache.nodes[lower]
        upper.recount()
        lower.recount()

    def _add(self, cache: ReplicaCache, node: PrefixNode, bits: int) -> None:
        old = node.resident.get(cache.slot, 0)
        new = old | bits
        node.resident[cache.slot] = new
        cache.nodes[node] = None
        more = new.bit_count() - old.bit_count()
        cache.pages += more
        if cache.slot not in node.pins:
            cache.idle_pages += more
        if new == (1 << len(node.hashes)) - 1:
            node.full |= cache.bit
            node.cover |= cache.bit

    def _discard(self, cache: ReplicaCache, node: PrefixNode, bits: int) -> None:
        old = node.resident.get(cache.slot, 0)
        new = old & ~bits
        if new == old:
            return
        fewer = old.bit_count() - new.bit_count()
        cache.pages -= fewer
        if cache.slot not in node.pins:
            cache.idle_pages -= fewer
            node.cover &= ~cache.bit
        node.full &= ~cache.bit
        if new:
            node.resident[cache.slot] = new
        else:
            del node.resident[cache.slot], cache.nodes[node]
        if node.uses < SHARED:
            self._prune(node)

    def _prune(self, node: PrefixNode) -> None:
        """Cut back what nobody holds or shares, from a node upwards."""
        while node.parent is not None and not (node.children or node.pins or node.uses >= SHARED):
            held = node.pages_held
            if held:
                if held < len(node.hashes):
                    self._truncate(node, held)
                return
            parent = node.parent
            self.pages -= len(node.hashes)
            self._index.remove(node.hashes.tolist())
            self.remove(node)
            # A placement within the window may still lead here, and from here on upwards.
            node.gone, node.parent = True, parent
            node.tokens, node.hashes = _NO_TOKENS, _NO_HASHES
            node = parent  # type: ignore[assignment]  # as in `path`
        if node.parent is None and not node.children and self.roots.get(node.namespace) is node:
            del self.roots[node.namespace]

    def _truncate(self, node: PrefixNode, pages: int) -> None:
        self.pages -= len(node.hashes) - pages
        self._index.remove(node.hashes[pages:].tolist())
        spare = len(node.hashes) > 2 * pages  # a view keeps the memory of what is cut off
        tokens, hashes = node.tokens[: pages * self.page_size], node.hashes[:pages]
        node.tokens, node.hashes = (tokens.copy(), hashes.copy()) if spare else (tokens, hashes)
        node.end = node.start + len(tokens)
        node.recount()

    def check_residency(self, caches: Iterable[ReplicaCache], prompts: Iterable[tuple[PrefixNode, int]]) -> None:
        """Prove the structure, the residency and the bound from scratch.

        Args:
            caches: those of all replicas.
            prompts: of each prompt in flight, where it ends and the slot it is on.
        """
        self.check()
        slots = {cache.slot: cache for cache in caches}
        require(slots == self._caches, "a removed replica left a trace")
        pins: dict[PrefixNode, Counter[int]] = {}
        for end, slot in prompts:
            for node in self.path(end):
                pins.setdefault(node, Counter())[slot] += 1
        uses = Counter(node for _, end in self._uses for node in self.path(end) if not node.gone)
        holding: dict[int, set[PrefixNode]] = {slot: set() for slot in slots}
        pinned = dict.fromkeys(slots, 0)
        idle = dict.fromkeys(slots, 0)
        for node in self.nodes():
            where = f"prefix node {node.start}:{node.end}"
            possible = all(0 < bits < 1 << len(node.hashes) for bits in node.resident.values())
            require(possible, f"{where} holds impossible pages")
            require(node.pins == pins.pop(node, {}), f"{where} has wrong pins")
            require(node.uses == uses.pop(node, 0), f"{where} counts {node.uses} uses")
            for slot, bits in node.resident.items():
                holding[slot].add(node)
                idle[slot] += 0 if slot in node.pins else bits.bit_count()
            for slot in node.pins:
                pinned[slot] += len(node.hashes)
            masks = (node.full, node.cover)
            node.recount()
            require(masks == (node.full, node.cover), f"{where} has wrong masks")
            kept = node.children or node.pins or node.uses >= SHARED or node.pages_held == len(node.hashes)
            require(bool(kept), f"{where} should have been cut back")
        require(not pins and not uses, "a node in use was removed")
        pages = sum(len(node.hashes) for node in self.nodes())
        require(pages == self.pages, "the tree's pages are miscounted")
        self._index.check(self.nodes(), slots.values())
        require(all(root.children for root in self.roots.values()), "an empty namespace is still known")
        for slot, cache in slots.items():
            require(cache.nodes.keys() == holding[slot], f"slot {slot} forgot where it holds pages")
            held = sum(node.resident[slot].bit_count() for node in cache.nodes)
            require(held == cache.pages, f"slot {slot} counts {cache.pages} pages and has {held}")
            require(cache.idle_pages == idle[slot], f"slot {slot} counts {cache.idle_pages} idle pages")
            require(cache.pinned_pages == pinned[slot], f"slot {slot} counts {cache.pinned_pages} pinned pages")
        times = [time for time, _ in self._uses]
        require(times == sorted(times), "uses are not in order")
        require(not times or times[0] >= self._swept, "an outdated use is remembered")
