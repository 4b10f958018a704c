"""Where each page is, by its hash: how the replicas' cache events find their places in the prefix tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from preble.sched.hashing import Hashes, in_common
from preble.sched.invariants import require
from preble.sched.prefix_node import PrefixNode
from preble.sched.replica_cache import ReplicaCache

Entry = PrefixNode | int
"""The node that has the page; or, where its tokens are in no prompt that the tree knows, the mask of the slots that
hold it. Such pages are *strangers*: mostly output."""


class PageIndex:
    """All pages of the tree, and those that replicas hold besides."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.strangers = 0
        """How many there are."""

    def insert(self, node: PrefixNode, names: list[int]) -> list[tuple[int, int]]:
        """These pages are now the node's. Returns the strangers among them, which they are no longer: position in
        `names` and the mask of the slots that hold it."""
        entries = self.entries
        strangers: list[tuple[int, int]] = []
        for page, name in enumerate(names):
            entry = entries.setdefault(name, node)
            if entry is not node:
                if type(entry) is int:
                    strangers.append((page, entry))
                entries[name] = node
        self.strangers -= len(strangers)
        return strangers

    def remove(self, names: list[int]) -> None:
        """These pages leave the tree."""
        entries = self.entries
        for name in names:
            del entries[name]

    def holders(self, hashes: Hashes) -> tuple[int, ...]:
        """Masks of the slots that hold the first of these pages, as far as they are strangers in a row."""
        if not self.strangers or not len(hashes) or type(self.entries.get(int(hashes[0]))) is not int:
            return ()
        masks: list[int] = []
        for name in hashes.tolist():
            mask = self.entries.get(name)
            if type(mask) is not int:
                break
            masks.append(mask)
        return tuple(masks)

    def remember(self, cache: ReplicaCache, name: int) -> None:
        """The replica holds a stranger. Where it would hold more than it has pages, the oldest is forgotten."""
        mask = self.entries.get(name, 0)
        assert isinstance(mask, int)
        self.strangers += not mask
        self.entries[name] = mask | cache.bit
        cache.unknown[name] = None
        if len(cache.unknown) > cache.capacity_pages:
            self.disown(cache, next(iter(cache.unknown)))

    def disown(self, cache: ReplicaCache, name: int) -> None:
        """The replica does not hold that stranger, if it did."""
        if name in cache.unknown:
            del cache.unknown[name]
            mask = self.entries[name]
            assert isinstance(mask, int)
            if mask == cache.bit:
                del self.entries[name]
                self.strangers -= 1
            else:
                self.entries[name] = mask & ~cache.bit

    def runs(
        self, cache: ReplicaCache, hashes: Hashes, strange: Callable[[ReplicaCache, int], None]
    ) -> Iterator[tuple[PrefixNode, int]]:
        """An event's pages as runs: a node and the bits of its pages. The strangers are given to `strange`."""
        raw = hashes.tobytes()
        entries = self.entries
        at, count = 0, len(hashes)
        while at < count:
            name = int(hashes[at])
            node = entries.get(name)
            if type(node) is not PrefixNode:
                strange(cache, name)
                at += 1
                continue
            edge = node.hashes
            whole = edge.tobytes()
            first = _position(whole, raw[8 * at : 8 * at + 8])
            more = min(len(edge) - first, count - at)
            # Nearly always the rest of the edge, or of the event, goes on in step. Comparing bytes is fastest then.
            if whole[8 * first : 8 * (first + more)] != raw[8 * at : 8 * (at + more)]:
                more = in_common(edge[first:], hashes[at:])
            last = first + more
            if more == 1 and first and at + 1 < count:
                more += in_common(edge[:first][::-1], hashes[at + 1 :])
                first = last - more
            at += more
            yield node, (1 << last) - (1 << first)

    def check(self, nodes: Iterable[PrefixNode], caches: Iterable[ReplicaCache]) -> None:
        """Prove that nothing else is here than the tree's pages and the caches' strangers."""
        pages = 0
        for node in nodes:
            indexed = all(self.entries.get(name) is node for name in node.hashes.tolist())
            require(indexed, f"prefix node {node.start}:{node.end} is not indexed")
            pages += len(node.hashes)
        strangers = {name: mask for name, mask in self.entries.items() if isinstance(mask, int)}
        require(len(strangers) == self.strangers, f"{self.strangers} strangers are counted, {len(strangers)} are here")
        require(pages == len(self.entries) - len(strangers), "pages are indexed that are not in the tree")
        known: Counter[int] = Counter()
        for cache in caches:
            require(len(cache.unknown) <= cache.capacity_pages, f"slot {cache.slot} remembers too many strangers")
            known.update(dict.fromkeys(cache.unknown, cache.bit))
        require(known == strangers, "strangers and their replicas do not match")


def _position(hashes: bytes, one: bytes) -> int:
    """Where a hash stands among others, given their bytes."""
    at = hashes.find(one)
    while at % 8:
        at = hashes.find(one, at + 1)
    return at // 8
