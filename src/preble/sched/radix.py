"""A radix tree over token ids: the core of the global prefix tree and of every replica's prefix cache.

Edges are numpy arrays of whole pages; a node with children of different tokens splits only at page boundaries, so two
children may start with the same tokens but never with the same page. One root per namespace: nothing is shared across.
What a node stands for (pages, residency, uses) is the business of the subclass, through `_split_payload`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from preble.sched.hashing import Hashes, Tokens, namespace_salt, page_hashes
from preble.sched.invariants import require

LONG = 4096
"""Tokens in an edge from which arrays are compared rather than bytes."""


class Node:
    """A run of whole pages below a parent. `start` and `end` are token positions in the prompt."""

    __slots__ = ("children", "end", "hashes", "parent", "start", "tokens")

    tokens: Tokens
    hashes: Hashes
    """Prefix hash at the end of each page of this edge."""
    parent: Node | None
    children: dict[bytes, Node]

    def __init__(self, tokens: Tokens, hashes: Hashes, parent: Node | None, start: int) -> None:
        self.tokens = tokens
        self.hashes = hashes
        self.parent = parent
        self.children = {}
        self.start = start
        self.end = start + len(tokens)


N = TypeVar("N", bound=Node)


class RadixTree(Generic[N]):
    """Prefixes of token ids, page-aligned. Every operation costs O(length of the path it touches)."""

    def __init__(self, node_type: type[N], page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        self.page_size = page_size
        self.roots: dict[str, N] = {}
        self._node_type = node_type

    def root(self, namespace: str) -> N:
        """The empty prefix of a namespace, made on first use."""
        root = self.roots.get(namespace)
        if root is None:
            salt = np.array([namespace_salt(namespace)], np.uint64)
            root = self.roots[namespace] = self._node_type(np.empty(0, np.int32), salt, None, 0)
        return root

    def walk(self, node: N, tokens: Tokens) -> tuple[N, int]:
        """Follow a prompt downwards from `node`, up to whose end it is known to match.

        Returns:
            The deepest node reached and the length of the match from position 0, in tokens, whole pages. The match may
            end inside that node's edge (`match < node.end`).
        """
        page = self.page_size
        limit = len(tokens) - len(tokens) % page
        matched = node.end
        while matched < limit:
            child = node.children.get(tokens[matched : matched + page].tobytes())
            if child is None:
                break
            node = child  # type: ignore[assignment]  # children have their parent's type
            stop = min(node.end, limit)
            run, edge = tokens[matched:stop], node.tokens[: stop - matched]
            # Comparing bytes is faster than comparing arrays, up to a length.
            if len(run) > LONG or run.tobytes() != edge.tobytes():
                differs = run != edge
                first = int(differs.argmax())
                if differs[first]:
                    return node, matched + first - first % page
            if stop < node.end:
                return node, stop
            matched = stop
        return node, matched

    def match(self, namespace: str, tokens: Tokens) -> tuple[N, int]:
        """The longest prefix of `tokens` in the tree, as `walk` gives it."""
        return self.walk(self.root(namespace), tokens)

    def split(self, node: N, at: int) -> N:
        """Cut the edge of `node` at position `at` (a page boundary inside it); returns the new upper node.

        `node` stays the lower one, so that references to where a prefix ends stay right.
        """
        keep = at - node.start
        pages = keep // self.page_size
        parent = node.parent
        assert parent is not None
        assert 0 < keep < len(node.tokens)
        # The upper part is copied, so that it does not keep the memory of a lower part that is gone.
        upper = self._node_type(node.tokens[:keep].copy(), node.hashes[:pages].copy(), parent, node.start)
        parent.children[self._key(node)] = upper
        node.tokens = node.tokens[keep:]
        node.hashes = node.hashes[pages:]
        node.start = at
        node.parent = upper
        upper.children[self._key(node)] = node
        self._split_payload(upper, node, pages)
        return upper

    def extend(self, node: N, tokens: Tokens, hashes: Hashes | None = None) -> N:
        """Put the whole pages of a prompt behind `node.end` below `node` as one new leaf, copied; returns the leaf.
        `hashes` are those pages' where the caller has them already."""
        stop = len(tokens)
        run = tokens[node.end : stop - stop % self.page_size].copy()
        if hashes is None:
            hashes = page_hashes(run, self.page_size, start=node.end, base=int(node.hashes[-1]))
        leaf = self._node_type(run, hashes, node, node.end)
        node.children[self._key(leaf)] = leaf
        return leaf

    def remove(self, node: N) -> None:
        """Take a leaf out of the tree."""
        assert node.parent is not None
        assert not node.children
        del node.parent.children[self._key(node)]
        node.parent = None

    def nodes(self) -> Iterator[N]:
        """Every node but the roots, parents first."""
        stack: list[Node] = [child for root in self.roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node  # type: ignore[misc]
            stack.extend(node.children.values())

    def check(self) -> None:
        """Prove the structure from scratch."""
        for namespace, root in self.roots.items():
            require(root.parent is None and root.start == root.end == 0, f"namespace {namespace!r}: not a root")
            require(int(root.hashes[0]) == namespace_salt(namespace), f"namespace {namespace!r}: wrong salt")
        for node in self.nodes():
            parent = node.parent
            where = f"node {node.start}:{node.end}"
            assert parent is not None
            require(node.start == parent.end, f"{where} does not start where its parent ends")
            require(len(node.tokens) == node.end - node.start > 0, f"{where} holds {len(node.tokens)} tokens")
            require(len(node.tokens) % self.page_size == 0, f"{where} is not made of whole pages")
            require(parent.children.get(self._key(node)) is node, f"{where} is not its parent's child")
            expected = page_hashes(node.tokens, self.page_size, start=node.start, base=int(parent.hashes[-1]))
            require(np.array_equal(node.hashes, expected), f"{where} has wrong hashes")

    def _key(self, node: Node) -> bytes:
        key: bytes = node.tokens[: self.page_size].tobytes()
        return key

    def _split_payload(self, upper: N, lower: N, pages: int) -> None:
        """Divide what `lower` carried: its first `pages` pages are now `upper`."""
