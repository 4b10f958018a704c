"""The global prefix tree: every prompt in use, and which replicas hold which part of it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

from preble.sched.hashing import Hashes, Tokens, in_common
from preble.sched.invariants import require
from preble.sched.prefix_node import Prediction, PrefixNode
from preble.sched.radix import RadixTree
from preble.sched.replica_cache import ReplicaCache

MOST_SWEPT = 64
"""How many outdated nodes one operation looks at, so that none takes long after a pause in traffic."""


class PrefixTree(RadixTree[PrefixNode]):
    """Prefixes of all namespaces with their residency.

    *Resident* is what a replica's `Stored` and `Evicted` events say, page by page. *Predicted* is what it will hold
    because a request was placed there: from the placement until all of the prompt's pages are resident, or the request
    ends. Where events arrive out of order a replica may for a while hold a page without the one before it; what
    counts as cached is the run of pages from the first one on.

    The tree is bounded: a page stays as long as some replica holds it or one behind it, resident or predicted, or
    somebody used it within the last `window` seconds. What is outdated is found at the front of a queue in order of
    use, a bounded number of nodes per `sweep`.

    Args:
        page_size: tokens in a page.
        window: seconds for which an unheld prefix is remembered.
    """

    def __init__(self, page_size: int, window: float) -> None:
        super().__init__(PrefixNode, page_size)
        self.window = window
        self.pages = 0
        """Pages in the tree."""
        self._index: dict[int, PrefixNode] = {}
        self._caches: dict[int, ReplicaCache] = {}
        self._width = 0
        """Slots in use lie below this."""
        self._unknown: dict[int, int] = {}
        self._in_use: OrderedDict[PrefixNode, None] = OrderedDict()
        self._swept = float("-inf")
        """Nothing that was last used before this time is left in the queue."""

    # Prompts

    def root(self, namespace: str) -> PrefixNode:
        root = super().root(namespace)
        root.namespace = namespace
        return root

    def find(self, namespace: str, tokens: Tokens) -> tuple[PrefixNode | None, int]:
        """The longest known prefix as `match` gives it, without making a root; (`None`, 0) where there is none."""
        root = self.roots.get(namespace)
        return (None, 0) if root is None else self.walk(root, tokens)

    def use(
        self, namespace: str, tokens: Tokens, found: PrefixNode | None, matched: int, now: float, offset: int = 0
    ) -> PrefixNode | None:
        """A request uses this prompt: put what is new of it into the tree, where `find` (or `walk`) ended. `tokens` is
        the prompt from position `offset` on.

        Returns:
            The node with which the prompt's whole pages end, `None` if it has none. When a node leaves the tree it has
            no parent any more.
        """
        length = offset + len(tokens)
        if length < self.page_size:
            return None
        node = self.root(namespace) if found is None else found
        if matched < node.end:
            node = self.split(node, matched)
        if length - matched >= self.page_size:
            node = self.extend(node, tokens, offset)
            names = node.hashes.tolist()
            self.pages += len(names)
            self._index.update(dict.fromkeys(names, node))
            if not self._unknown.keys().isdisjoint(names):
                self._recognise(node, names)
        in_use = self._in_use
        for one in self.path(node):
            one.last_used = now
            in_use[one] = None
            in_use.move_to_end(one)
        return node

    def path(self, node: PrefixNode) -> Iterator[PrefixNode]:
        """From `node` upwards, without the root."""
        parent = node.parent
        while parent is not None:
            yield node
            node = parent  # type: ignore[assignment]  # a tree's nodes are all of one type
            parent = node.parent

    def sweep(self, now: float) -> None:
        """Drop what nobody holds and nobody used within the window, a bounded part of it."""
        in_use = self._in_use
        outdated = now - self.window
        for _ in range(MOST_SWEPT):
            node = next(iter(in_use), None)
            if node is None or node.last_used >= outdated:
                self._swept = outdated
                return
            del in_use[node]
            self._prune(node)

    # Residency

    def cached(self, node: PrefixNode | None, matched: int, mask: int, *, confirmed: bool = False) -> list[int]:
        """How much of a prompt the replicas in `mask` have, given what `find` returned for it.

        Returns:
            Tokens by slot, whole pages. With `confirmed` only what is resident counts.
        """
        found = [0] * self._width
        if node is None:
            return found
        for one in reversed(list(self.path(node))):
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
                        found[slot] = min(start + leading * self.page_size, matched)
            mask &= cover
            if not mask:
                return found
        while mask:
            found[(mask & -mask).bit_length() - 1] = matched
            mask &= mask - 1
        return found

    def open_cache(self, capacity_pages: int) -> ReplicaCache:
        """A cache for one more replica, empty."""
        slot = next(slot for slot in range(len(self._caches) + 1) if slot not in self._caches)
        cache = self._caches[slot] = ReplicaCache(slot, capacity_pages)
        self._width = max(self._width, slot + 1)
        return cache

    def close_cache(self, cache: ReplicaCache) -> None:
        """The replica is gone, and its requests with it. Costs what it held."""
        self.forget(cache)
        del self._caches[cache.slot]

    def store(self, cache: ReplicaCache, hashes: Hashes) -> None:
        """These pages are in the replica's cache."""
        for node, bits in self._runs(cache, hashes, self._remember):
            self._add(cache, node, bits)

    def evict(self, cache: ReplicaCache, hashes: Hashes) -> None:
        """These pages are no longer in the replica's cache."""
        for node, bits in self._runs(cache, hashes, self._disown):
            self._discard(cache, node, bits)

    def forget(self, cache: ReplicaCache) -> None:
        """The replica's cache is empty. Costs what it held."""
        for name in list(cache.unknown):
            self._disown(cache, name)
        for node in list(cache.nodes):
            self._discard(cache, node, node.resident[cache.slot])

    def resident(self, cache: ReplicaCache) -> frozenset[int]:
        """The hashes of all pages in the replica's cache."""
        names = set(cache.unknown)
        for node in cache.nodes:
            bits = node.resident[cache.slot]
            names.update(name for page, name in enumerate(node.hashes.tolist()) if bits >> page & 1)
        return frozenset(names)

    def predict(self, cache: ReplicaCache, node: PrefixNode) -> Prediction | None:
        """The replica will soon hold the prefix that ends with `node`; `None` where it does already."""
        prediction = node.ends.get(cache.slot)
        if prediction is not None:
            prediction.requests += 1
            return prediction
        if node.full & cache.bit and self._is_resident(cache, node):
            return None
        prediction = node.ends[cache.slot] = Prediction(node, cache.slot)
        for one in self.path(node):
            one.predicted[cache.slot] = one.predicted.get(cache.slot, 0) + 1
            one.cover |= cache.bit
        return prediction

    def retract(self, prediction: Prediction) -> None:
        """One of the prediction's requests has ended. Call `use` with its tokens right after: nobody may hold them now,
        and only what was used is looked at again."""
        prediction.requests -= 1
        if prediction.requests == 0 and prediction.node.ends.get(prediction.slot) is prediction:
            self._withdraw(prediction)

    def _split_payload(self, upper: PrefixNode, lower: PrefixNode, pages: int) -> None:
        self._index.update(dict.fromkeys(upper.hashes.tolist(), upper))
        upper.predicted = lower.predicted.copy()
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

    def _runs(
        self, cache: ReplicaCache, hashes: Hashes, strange: Callable[[ReplicaCache, int], None]
    ) -> Iterator[tuple[PrefixNode, int]]:
        """The pages as runs: a node and the bits of its pages. The unknown ones are given to `strange`."""
        names = hashes.tolist()
        at = 0
        while at < len(names):
            node = self._index.get(names[at])
            if node is None:
                strange(cache, names[at])
                at += 1
                continue
            edge = node.hashes
            first = int((edge == hashes[at]).argmax())
            at += 1
            more = in_common(edge[first + 1 :], hashes[at:])
            last = first + 1 + more
            if not more:
                more = in_common(edge[:first][::-1], hashes[at:])
                first -= more
            at += more
            yield node, (1 << last) - (1 << first)

    def _add(self, cache: ReplicaCache, node: PrefixNode, bits: int) -> None:
        old = node.resident.get(cache.slot, 0)
        new = old | bits
        node.resident[cache.slot] = new
        cache.nodes[node] = None
        cache.pages += new.bit_count() - old.bit_count()
        if new == (1 << len(node.hashes)) - 1:
            node.full |= cache.bit
            node.cover |= cache.bit
            if cache.slot in node.predicted:
                self._confirm(cache, node)

    def _discard(self, cache: ReplicaCache, node: PrefixNode, bits: int) -> None:
        old = node.resident.get(cache.slot, 0)
        new = old & ~bits
        if new == old:
            return
        cache.pages -= old.bit_count() - new.bit_count()
        if new:
            node.resident[cache.slot] = new
        else:
            del node.resident[cache.slot], cache.nodes[node]
        node.full &= ~cache.bit
        if cache.slot not in node.predicted:
            node.cover &= ~cache.bit
        if node not in self._in_use:
            self._prune(node)

    def _remember(self, cache: ReplicaCache, name: int) -> None:
        """A page of a prefix that the tree will know later, when the tokens generated since are told."""
        cache.unknown[name] = None
        self._unknown[name] = self._unknown.get(name, 0) | cache.bit
        if len(cache.unknown) > cache.capacity_pages:
            self._disown(cache, next(iter(cache.unknown)))

    def _disown(self, cache: ReplicaCache, name: int) -> None:
        if name in cache.unknown:
            del cache.unknown[name]
            others = self._unknown[name] & ~cache.bit
            if others:
                self._unknown[name] = others
            else:
                del self._unknown[name]

    def _recognise(self, node: PrefixNode, names: list[int]) -> None:
        """Pages of a new node that replicas were known to hold before their tokens were."""
        for page, name in enumerate(names):
            mask = self._unknown.pop(name, 0)
            while mask:
                cache = self._caches[(mask & -mask).bit_length() - 1]
                mask &= mask - 1
                del cache.unknown[name]
                self._add(cache, node, 1 << page)

    def _is_resident(self, cache: ReplicaCache, node: PrefixNode) -> bool:
        return all(one.full & cache.bit for one in self.path(node))

    def _confirm(self, cache: ReplicaCache, node: PrefixNode) -> None:
        """The node's pages are all there now: predictions that waited for the last of them have come true."""
        if not self._is_resident(cache, node):
            return
        come_true = [node]
        while come_true:
            one = come_true.pop()
            for child in one.children.values():
                assert isinstance(child, PrefixNode)
                if child.full & cache.bit and cache.slot in child.predicted:
                    come_true.append(child)
            prediction = one.ends.get(cache.slot)
            if prediction is not None:
                self._withdraw(prediction)

    def _withdraw(self, prediction: Prediction) -> None:
        slot = prediction.slot
        del prediction.node.ends[slot]
        for one in self.path(prediction.node):
            count = one.predicted[slot] - 1
            if count:
                one.predicted[slot] = count
            else:
                del one.predicted[slot]
                if not one.full >> slot & 1:
                    one.cover &= ~(1 << slot)

    def _prune(self, node: PrefixNode) -> None:
        """Cut back what nobody holds, from an outdated node upwards."""
        while node.parent is not None and not node.children and not node.predicted and node not in self._in_use:
            held = node.pages_held
            if held:
                if held < len(node.hashes):
                    self._truncate(node, held)
                return
            parent = node.parent
            self.pages -= len(node.hashes)
            self._unindex(node, 0)
            self.remove(node)
            node = parent  # type: ignore[assignment]  # as in `path`
        if node.parent is None and not node.children:
            self.roots.pop(node.namespace, None)

    def _truncate(self, node: PrefixNode, pages: int) -> None:
        self.pages -= len(node.hashes) - pages
        self._unindex(node, pages)
        node.tokens = node.tokens[: pages * self.page_size].copy()
        node.hashes = node.hashes[:pages].copy()
        node.end = node.start + len(node.tokens)
        node.recount()

    def _unindex(self, node: PrefixNode, start: int) -> None:
        for name in node.hashes[start:].tolist():
            self._index.pop(name, None)

    def check_residency(self, caches: Iterable[ReplicaCache], predictions: Iterable[Prediction]) -> None:
        """Prove the structure, the residency and the bound from scratch.

        Args:
            caches: those of all replicas.
            predictions: those of all requests on replicas, each as often as requests refer to it.
        """
        self.check()
        slots = {cache.slot: cache for cache in caches}
        require(slots == self._caches, "a removed replica left a trace")
        references = Counter(predictions)
        holding: dict[int, set[PrefixNode]] = {slot: set() for slot in slots}
        for node in self.nodes():
            where = f"prefix node {node.start}:{node.end}"
            require(all(self._index.get(name) is node for name in node.hashes.tolist()), f"{where} is not indexed")
            possible = all(0 < bits < 1 << len(node.hashes) for bits in node.resident.values())
            require(possible, f"{where} holds impossible pages")
            for slot in node.resident:
                holding[slot].add(node)
            counts = Counter(node.ends.keys())
            for child in node.children.values():
                counts.update(child.predicted)  # type: ignore[attr-defined]  # a tree's nodes are all of one type
            require(counts == node.predicted, f"{where} has wrong predictions")
            for slot, prediction in node.ends.items():
                require((prediction.node, prediction.slot) == (node, slot), f"{where} has another's prediction")
                require(prediction.requests == references[prediction] > 0, f"{where} has a prediction of nobody")
            masks = (node.full, node.cover)
            node.recount()
            require(masks == (node.full, node.cover), f"{where} has wrong masks")
            kept = node.children or node.predicted or node.pages_held == len(node.hashes) or node in self._in_use
            require(bool(kept), f"{where} should have been cut back")
        pages = sum(len(node.hashes) for node in self.nodes())
        require(pages == self.pages == len(self._index), "the tree's pages are miscounted")
        require(all(root.children for root in self.roots.values()), "an empty namespace is still known")
        unknown: Counter[int] = Counter()
        for slot, cache in slots.items():
            require(cache.nodes.keys() == holding[slot], f"slot {slot} forgot where it holds pages")
            held = sum(node.resident[slot].bit_count() for node in cache.nodes)
            require(held == cache.pages, f"slot {slot} counts {cache.pages} pages and has {held}")
            require(len(cache.unknown) <= cache.capacity_pages, f"slot {slot} remembers too many unknown pages")
            require(not cache.unknown.keys() & self._index.keys(), f"slot {slot} did not recognise a page")
            unknown.update(dict.fromkeys(cache.unknown, cache.bit))
        require(unknown == self._unknown, "unknown pages and their replicas do not match")
        last_used = [node.last_used for node in self._in_use]
        require(last_used == sorted(last_used), "the queue is not in order of use")
        require(all(node.parent is not None for node in self._in_use), "a removed node is still queued")
        require(not last_used or last_used[0] >= self._swept, "an outdated node was left in the queue")
