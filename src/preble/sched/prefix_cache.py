"""A replica's prefix cache: which pages hold which prefix, who uses them, and which to evict first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from preble.sched.block_table import BlockTable
from preble.sched.hashing import Hashes, Tokens
from preble.sched.pages import PagePool
from preble.sched.radix import Node, RadixTree


class CachedRun(Node):
    """A run of pages in the cache. `users` counts the sequences that read it; their ancestors count them too. `retired`
    once the cache has forgotten it: it is no longer in the tree, and there only for those who use it."""

    __slots__ = ("last_used", "namespace", "pages", "retired", "users")

    def __init__(self, tokens: Tokens, hashes: Hashes, parent: Node | None, start: int) -> None:
        super().__init__(tokens, hashes, parent, start)
        self.pages: list[int] = []
        self.users = 0
        self.last_used = 0
        self.retired = False
        self.namespace: str = parent.namespace if isinstance(parent, CachedRun) else ""


class _CacheTree(RadixTree[CachedRun]):
    def root(self, namespace: str) -> CachedRun:
        root = super().root(namespace)
        root.namespace = namespace
        return root

    def _split_payload(self, upper: CachedRun, lower: CachedRun, pages: int) -> None:
        upper.pages, lower.pages = lower.pages[:pages], lower.pages[pages:]
        upper.users = lower.users
        upper.last_used = lower.last_used


@dataclass(slots=True)
class CacheChange:
    """Pages that entered or left the cache, named by the hashes of the prefixes they end."""

    stored: bool
    namespace: str
    hashes: list[Hashes]


class PrefixCache:
    """Pages of one replica: free, cached (in the tree, used by nobody), or in use. The three always add up.

    A sequence *locks* the cached prefix it starts from, allocates pages for the rest, and *publishes* whole pages as it
    computes them, so that later sequences find them at once. Eviction takes the least recently used leaves, from their
    far end, and only as many pages as are needed.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.cached = 0
        self.version = 0
        """Changes whenever pages enter or leave the cache: until then, what a lookup found is still so."""
        self._tree = _CacheTree(CachedRun, page_size)
        self._nodes = 0
        self._clock = 0
        self._changes: list[CacheChange] = []
        self._evictable: list[tuple[int, int, CachedRun]] = []

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return self.pool.free + self.cached

    @property
    def in_use(self) -> int:
        """Pages that running sequences hold."""
        return self.pool.total - self.available

    def lookup(self, namespace: str, tokens: Tokens) -> tuple[int, int]:
        """Length of the longest cached prefix in tokens (whole pages), and how many of its pages nobody uses now.

        The length is the same until `version` changes; the number of unused pages is not.
        """
        if namespace not in self._tree.roots:
            return 0, 0
        node, matched = self._tree.match(namespace, tokens)
        unused = 0
        stop = matched
        for run in self._path(node):
            if run.users == 0:
                unused += (stop - run.start) // self.page_size
            stop = run.start
        return matched, unused

    def lock(self, namespace: str, tokens: Tokens) -> CachedRun:
        """Lock the longest cached prefix of `tokens` against eviction; `release` it or `publish` onwards from it."""
        node, matched = self._tree.match(namespace, tokens)
        if matched < node.end:
            node = self._split(node, matched)
        for run in self._path(node):
            self._use(run)
        return node

    def held_alone(self, node: CachedRun) -> int:
        """Pages of the prefix that ends with `node` that only one sequence has locked, given that one has."""
        pages = 0
        run: CachedRun = node
        while run.users == 1 and run.parent is not None:
            pages += len(run.pages)
            run = run.parent  # type: ignore[assignment]  # a tree's nodes are all of one type
        return pages

    def pages_of(self, node: CachedRun) -> list[int]:
        """The pages of the prefix that ends with `node`, in order."""
        pages: list[int] = []
        for run in reversed(list(self._path(node))):
            pages += run.pages
        return pages

    def publish(self, node: CachedRun, tokens: Tokens, table: BlockTable) -> CachedRun:
        """Put a sequence's computed whole pages into the cache and move its lock from `node` to their end.

        Where another sequence published the same prefix first, the sequence's own copies are freed and its block table
        names the cached ones instead. What continues a retired run is not published.

        Args:
            node: the run the sequence has locked.
            tokens: the sequence's tokens whose KV is computed.
            table: the sequence's pages.
        """
        size = self.page_size
        stop = len(tokens) - len(tokens) % size
        if stop <= node.end or node.retired:
            return node
        deepest, matched = self._tree.walk(node, tokens[:stop])
        if matched < deepest.end:
            deepest = self._split(deepest, matched)
        if matched > node.end:
            first, last = node.end // size, matched // size
            self.pool.release(table.replace(first, self.pages_of(deepest)[first:last]))
        if matched < stop:
            deepest = self._tree.extend(deepest, tokens[:stop])
            deepest.pages = table.pages[matched // size : stop // size]
            self._nodes += 1
            self.cached += len(deepest.pages)
            self._changed(True, deepest, deepest.hashes)
        for run in self._path(deepest):
            if run is node:
                break
            self._use(run)
        return deepest

    def release(self, node: CachedRun) -> None:
        """Undo a lock: what nobody uses any more becomes evictable, or free where it is retired."""
        self._clock += 1
        for run in self._path(node):
            run.users -= 1
            run.last_used = self._clock
            if run.users == 0:
                if run.retired:
                    self.pool.release(run.pages)
                    continue
                self.cached += len(run.pages)
                if not run.children:
                    self._offer(run)
        if not run.retired:
            self._forget_empty_root(run)

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int] | None:
        """`count` pages, evicting cached ones where none is free; `None` (and no change) where that is not enough."""
        if count > self.available:
            return None
        while self.pool.free < count:
            self._evict(count - self.pool.free)
        return self.pool.allocate(count, after=after, room=room)

    def take_changes(self) -> list[CacheChange]:
        """What entered and left the cache since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def clear(self) -> None:
        """Evict everything that nobody uses."""
        while self.cached:
            self._evict(self.cached)

    def reset(self) -> None:
        """Forget everything: evict what nobody uses, and retire the rest."""
        self.clear()
        for run in [*self._tree.roots.values(), *self._tree.nodes()]:
            run.retired = True
            run.children = {}
            if run.pages:
                self._changed(False, run, run.hashes)
        self._tree.roots.clear()
        self._nodes = 0

    def check(self, holders: dict[CachedRun, int], private: list[int]) -> None:
        """Prove the accounts from scratch.

        Args:
            holders: how many sequences have locked each run.
            private: pages that sequences hold outside the cache.
        """
        self._tree.check()
        users: dict[int, int] = {}
        for node, count in holders.items():
            for run in self._path(node):
                users[id(run)] = users.get(id(run), 0) + count
        retired: dict[int, CachedRun] = {}
        for node in holders:
            retired.update({id(run): run for run in self._path(node) if run.retired})
        cached = 0
        owned = list(private)
        for run in retired.values():
            assert run.users == users[id(run)]
            assert not run.children, "a retired run can be reached from another"
            owned += run.pages
        for root in self._tree.roots.values():
            assert not root.retired
            assert root.users == users.get(id(root), 0)
            assert root.users or root.children, f"namespace {root.namespace!r} is empty and still known"
        for run in self._tree.nodes():
            assert not run.retired
            assert len(run.pages) * self.page_size == len(run.tokens)
            assert run.users == users.get(id(run), 0)
            owned += run.pages
            cached += len(run.pages) if run.users == 0 else 0
            evictable = run.users == 0 and not run.children
            assert not evictable or any(entry[2] is run and entry[0] == run.last_used for entry in self._evictable)
        assert cached == self.cached
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert not self.pool.free_pages() & set(owned), "a page is free and owned"
        assert len(owned) + self.pool.free == self.pool.total, "a page is lost"

    def _path(self, node: CachedRun) -> Iterator[CachedRun]:
        """From `node` up to its root, which holds no pages but counts users like any other run."""
        run: Node | None = node
        while run is not None:
            yield run  # type: ignore[misc]  # a tree's nodes are all of one type
            run = run.parent

    def _split(self, node: CachedRun, at: int) -> CachedRun:
        self._nodes += 1
        return self._tree.split(node, at)

    def _use(self, run: CachedRun) -> None:
        if run.users == 0:
            self.cached -= len(run.pages)
        run.users += 1

    def _offer(self, run: CachedRun) -> None:
        """Note an evictable leaf. Entries go stale when it is used again; they are dropped when met, or in bulk."""
        if run.parent is None:
            return
        if len(self._evictable) > 2 * self._nodes + 64:
            self._evictable = [entry for entry in self._evictable if self._is_current(entry)]
            heapq.heapify(self._evictable)
        heapq.heappush(self._evictable, (run.last_used, id(run), run))

    @staticmethod
    def _is_current(entry: tuple[int, int, CachedRun]) -> bool:
        last_used, _, run = entry
        return run.parent is not None and run.users == 0 and not run.children and run.last_used == last_used

    def _evict(self, count: int) -> None:
        """Evict up to `count` pages of the least recently used leaf."""
        entry = heapq.heappop(self._evictable)
        while not self._is_current(entry):
            entry = heapq.heappop(self._evictable)
        run = entry[2]
        keep = max(len(run.pages) - count, 0)
        self._changed(False, run, run.hashes[keep:])
        self.cached -= len(run.pages) - keep
        self.pool.release(run.pages[keep:])
        if keep:
            run.pages = run.pages[:keep]
            run.hashes = run.hashes[:keep].copy()
            run.tokens = run.tokens[: keep * self.page_size].copy()
            run.end = run.start + len(run.tokens)
            self._offer(run)
            return
        parent = run.parent
        assert isinstance(parent, CachedRun)
        self._tree.remove(run)
        self._nodes -= 1
        if parent.users == 0 and not parent.children:
            self._offer(parent)
            self._forget_empty_root(parent)

    def _changed(self, stored: bool, run: CachedRun, hashes: Hashes) -> None:
        self.version += 1
        last = self._changes[-1] if self._changes else None
        if last is not None and last.stored is stored and last.namespace == run.namespace:
            last.hashes.append(hashes)
        else:
            self._changes.append(CacheChange(stored, run.namespace, [hashes]))

    def _forget_empty_root(self, root: CachedRun) -> None:
        """Namespaces come and go; one without pages and users leaves nothing behind."""
        if root.parent is None and root.users == 0 and not root.children:
            self._tree.roots.pop(root.namespace, None)
