"""Which decodes of a batch begin with the same pages, and which of them are best answered together.

The first pages of all requests of the batch form a tree. It lives from step to step, and only requests that come and go
change it, because the pages that a running request gets are its own. What is decided for a batch is plain integers, to
be copied to where `preble.kernels.shared_prefix` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from operator import is_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHORTEST_SPLIT = 128
"""Tokens of a prefix that one program reads at least: with fewer, writing and merging partial answers costs as much."""
# Estimates for an H100, until they are measured.
CACHED_BYTES_PER_SECOND = 5e12
"""At which K and V are read that another request has just read: from the L2 cache, for the most part."""
BYTES_PER_SECOND = 3e12
"""At which partial answers are written and read."""
LAUNCH_SECONDS = 4e-6
"""What one more kernel costs a layer, from its start until its last program has ended, beyond its share of the work."""


@dataclass(frozen=True, slots=True)
class SharingCosts:
    """Seconds of one layer that reading a prefix for several requests at once saves and costs."""

    token_seconds: float
    """Reading K and V of a token once more."""
    piece_seconds: float
    """Writing and merging one partial answer of one request."""
    launch_seconds: float
    """The kernel itself, however many tiles it has."""
    most_pieces: int
    """The most splits of a prefix: each gives a partial answer for each request."""

    @classmethod
    def estimate(
        cls, *, query_heads: int, kv_heads: int, head_dim: int, kv_itemsize: int, splits: int, query_length: int = 1
    ) -> SharingCosts:
        """For a model on an H100 whose K and V take `kv_itemsize` bytes a number, with that many splits at most."""
        return cls(
            token_seconds=2 * kv_heads * head_dim * kv_itemsize / CACHED_BYTES_PER_SECOND,
            piece_seconds=2 * 4 * query_length * query_heads * head_dim / BYTES_PER_SECOND,
            launch_seconds=LAUNCH_SECONDS,
            most_pieces=splits,
        )

    def saving(self, members: int, tokens: int) -> float:
        """What one tile saves, the launch left aside: the prefix is read once, and each request has more to merge."""
        pieces = min(-(-tokens // SHORTEST_SPLIT), self.most_pieces) + 1  # with its own tokens
        return (members - 1) * tokens * self.token_seconds - members * pieces * self.piece_seconds


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """What a batch is to share. All arrays are int32 and must not be written to."""

    members: NDArray[np.int32]
    """[T, R]: the requests of each tile by their place in the batch, then -1."""
    prefix_lengths: NDArray[np.int32]
    """[T]: tokens that they have in common, whole pages; 0 for tiles that are not needed, which are the last."""
    starts: NDArray[np.int32]
    """[B]: tokens of each request that a tile answers; 0 for those that are in none."""
    tiles: int
    """Tiles that are needed; with 0 the batch is better decoded without."""


class _Tile(NamedTuple):
    saving: float
    pages: int
    members: list[int]
    """Ascending places in the batch."""


class _Choice(NamedTuple):
    """What the requests that end at or below a node share."""

    saving: float
    members: int
    """Requests in tiles."""
    tiles: list[_Tile]
    loose: list[int]
    """Requests in none, by their place in the batch."""


class _Node:
    """A run of pages that the same requests have in common. No node but the root has a single child and no table."""

    __slots__ = ("children", "count", "end", "pages", "parent", "tables")

    def __init__(self, pages: list[int], parent: _Node | None, end: int) -> None:
        self.pages = pages
        self.parent = parent
        self.end = end
        """Pages from the root to the end of this node."""
        self.children: dict[int, _Node] = {}
        """By their first page."""
        self.tables: set[int] = set()
        """Of requests that end here, by identity."""
        self.count = 0
        """Requests that end here or below."""


class _Entry(NamedTuple):
    table: list[int]
    """Held, so that no other list can have its identity."""
    node: _Node
    least_context: int
    """With a shorter context, its pages in the tree would not all be complete."""


class PrefixGroups:
    """Finds the groups of decodes that are worth a tile, step after step.

    A request is known by its list of pages, of which no other request has the same object, and which is only appended
    to: with other first pages a request has another list, as `BlockTable.replace` gives it. Pages that are filled while
    a request decodes are taken to be its own.

    Args:
        costs: of sharing.
        requests_per_tile: R.
        page_size: tokens in a page.
        query_length: new tokens of each decode.
    """

    def __init__(self, costs: SharingCosts, *, requests_per_tile: int, page_size: int, query_length: int = 1) -> None:
        self._costs = costs
        self._requests = requests_per_tile
        self._page_size = page_size
        self._query_length = query_length
        self._root = _Node([], None, 0)
        self._entries: dict[int, _Entry] = {}
        self._tables: list[list[int]] = []
        self._shape: tuple[int, int] | None = None
        self._shared = SharedPrefixes(np.zeros((0, 0), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
        self._least_contexts = np.zeros(0, np.int32)

    def update(
        self, tables: Sequence[list[int]], context_lengths: Sequence[int], *, batch: int, tiles: int
    ) -> SharedPrefixes:
        """What the decodes with these page lists and context lengths, new tokens included, are to share.

        The answer has room for `batch` requests and `tiles` tiles: where more would pay, the best are kept. As long
        as the batch stays the same it is the same object.
        """
        if (
            self._shape == (batch, tiles)
            and len(tables) == len(self._tables)
            and all(map(is_, tables, self._tables))
            and bool((self._least_contexts <= np.asarray(context_lengths)).all())
        ):
            return self._shared
        self._tables = list(tables)
        self._shape = (batch, tiles)
        places = self._renew(tables, context_lengths)
        chosen = self._choose(places, tiles)
        starts = [0] * batch
        for tile in chosen:
            for place in tile.members:
                starts[place] = tile.pages * self._page_size
        padding = [[-1] * self._requests] * (tiles - len(chosen))
        members = [tile.members + [-1] * (self._requests - len(tile.members)) for tile in chosen] + padding
        lengths = [tile.pages * self._page_size for tile in chosen] + [0] * len(padding)
        self._shared = SharedPrefixes(
            np.array(members, np.int32).reshape(tiles, self._requests),
            np.array(lengths, np.int32),
            np.array(starts, np.int32),
            len(chosen),
        )
        own = self._shared.starts[: len(tables)]
        self._least_contexts = np.where(own > 0, own + self._query_length + 1, 0)
        return self._shared

    def _renew(self, tables: Sequence[list[int]], context_lengths: Sequence[int]) -> dict[int, int]:
        """Bring the tree up to date; the place of each table in the batch."""
        places = {id(table): place for place, table in enumerate(tables)}
        for gone in self._entries.keys() - places.keys():
            self._remove(gone)
        for table, context_length in zip(tables, context_lengths, strict=True):
            entry = self._entries.get(id(table))
            if entry is not None and entry.least_context > context_length:
                self._remove(id(table))
                entry = None
            if entry is None:
                # Only complete pages, and none with a new token.
                pages = table[: max(context_length - self._query_length - 1, 0) // self._page_size]
                least = len(pages) * self._page_size + self._query_length + 1
                self._entries[id(table)] = _Entry(table, self._insert(id(table), pages), least)
        return places

    def _insert(self, table: int, pages: list[int]) -> _Node:
        """Add a request with these complete pages; where it ends."""
        node = self._root
        node.count += 1
        while node.end < len(pages):
            child = node.children.get(pages[node.end])
            if child is None:
                child = node.children[pages[node.end]] = _Node(pages[node.end :], node, len(pages))
            elif child.pages != pages[node.end : child.end]:
                child = _split(child, pages)
            node = child
            node.count += 1
        node.tables.add(table)
        return node

    def _remove(self, table: int) -> None:
        node: _Node | None = self._entries.pop(table).node
        assert node is not None
        node.tables.remove(table)
        while node is not None:
            node.count -= 1
            parent = node.parent
            if parent is not None:
                if node.count == 0:
                    del parent.children[node.pages[0]]
                elif len(node.children) == 1 and not node.tables:
                    (child,) = node.children.values()
                    child.pages = node.pages + child.pages
                    child.parent = parent
                    parent.children[child.pages[0]] = child
            node = parent

    def _choose(self, places: dict[int, int], most: int) -> list[_Tile]:
        """The tiles, best first, or none if they do not save more than the launch costs."""
        nodes = [self._root]
        for node in nodes:  # which grows: parents come before children
            nodes.extend(child for child in node.children.values() if child.count > 1)
        choices: dict[_Node, _Choice] = {}
        for node in reversed(nodes):
            choices[node] = self._choose_below(node, places, choices)
        tiles = sorted(choices[self._root].tiles, key=lambda tile: (-tile.saving, tile.members))[:most]
        return tiles if sum(tile.saving for tile in tiles) > self._costs.launch_seconds else []

    def _choose_below(self, node: _Node, places: dict[int, int], choices: dict[_Node, _Choice]) -> _Choice:
        """Which requests share this node, and which something longer below it.

        The best of three: those that share nothing longer; also those whose tiles below save less for each than sharing
        this node with others would; all.
        """
        below = [choices[child] for child in node.children.values() if child.count > 1]
        least = -1.0
        if below and node.end:
            here = self._saving(self._requests, node.end) / self._requests
            least = max((-1.0, here, inf), key=lambda least: self._total(node, below, least))
        tiles: list[_Tile] = []
        members = [places[table] for table in node.tables]
        members += [places[table] for child in node.children.values() if child.count == 1 for table in child.tables]
        for choice in below:
            members += choice.loose
            if choice.saving > least * choice.members:
                tiles += choice.tiles
            else:
                members += [place for tile in choice.tiles for place in tile.members]
        members.sort()
        loose: list[int] = []
        for first in range(0, len(members), self._requests):
            some = members[first : first + self._requests]
            saving = self._costs.saving(len(some), node.end * self._page_size)
            if saving > 0.0:
                tiles.append(_Tile(saving, node.end, some))
            else:
                loose += some
        return _Choice(sum([tile.saving for tile in tiles]), node.count - len(loose), tiles, loose)

    def _total(self, node: _Node, below: list[_Choice], least: float) -> float:
        """What is saved if only tiles below that save more than `least` for each of their members are kept."""
        kept = [choice for choice in below if choice.saving > least * choice.members]
        sharing = node.count - sum([choice.members for choice in kept])
        return sum([choice.saving for choice in kept]) + self._saving(sharing, node.end)

    def _saving(self, members: int, pages: int) -> float:
        """What tiles of so many members in all save, where that is anything."""
        tokens = pages * self._page_size
        full, rest = divmod(members, self._requests)
        return max(full * self._costs.saving(self._requests, tokens), 0.0) + max(self._costs.saving(rest, tokens), 0.0)


def _split(node: _Node, pages: list[int]) -> _Node:
    """Cut a node where `pages`, of which it has at least one, go on differently; the new upper part."""
    parent = node.parent
    assert parent is not None
    own = pages[parent.end : node.end]
    same = next((i for i, (one, other) in enumerate(zip(own, node.pages, strict=False)) if one != other), len(own))
    upper = _Node(node.pages[:same], parent, parent.end + same)
    upper.count = node.count
    parent.children[upper.pages[0]] = upper
    node.pages = node.pages[same:]
    node.parent = upper
    upper.children[node.pages[0]] = node
    return upper
