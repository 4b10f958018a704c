"""A node of the global prefix tree."""

from __future__ import annotations

from preble.sched.hashing import Hashes, Tokens
from preble.sched.prefix_stats import PrefixStats
from preble.sched.radix import Node


class PrefixNode(Node):
    """A run of pages, who has it, and who uses it. Replicas are named by their slot, or by a bit per slot in a mask."""

    __slots__ = ("cover", "full", "gone", "namespace", "pins", "resident", "stats", "uses")

    def __init__(self, tokens: Tokens, hashes: Hashes, parent: Node | None, start: int) -> None:
        self.tokens = tokens  # not by way of Node.__init__: a node is made for every request
        self.hashes = hashes
        self.parent = parent
        self.children = {}
        self.start = start
        self.end = start + len(tokens)
        self.namespace: str = parent.namespace if parent is not None else ""  # type: ignore[attr-defined]  # as above
        self.gone = False
        """It was taken out of the tree; a placement that is still in the window may remember it."""
        self.uses = 0
        """Placements within the window whose prompt reaches or passes this node."""
        self.pins: dict[int, int] = {}
        """Per slot: requests in flight there whose prompt reaches or passes this node; never 0."""
        self.resident: dict[int, int] = {}
        """Per slot: a bit for each page of this edge that is in the replica's prefix cache; never 0."""
        self.full = 0
        """Mask of the slots where every page of this edge is resident."""
        self.cover = 0
        """Mask of the slots that have this whole edge, or soon will: resident or pinned."""
        self.stats: PrefixStats | None = None
        """What requests with this key portion experienced; only where several shared it."""

    def recount(self) -> None:
        """Work the masks out from `resident` and `pins`."""
        whole = (1 << len(self.hashes)) - 1
        full = 0
        for slot, bits in self.resident.items():
            if bits == whole:
                full |= 1 << slot
        self.full = self.cover = full
        for slot in self.pins:
            self.cover |= 1 << slot

    @property
    def pages_held(self) -> int:
        """How many pages, from the first one on, reach up to the last one that is resident anywhere."""
        held = 0
        for bits in self.resident.values():
            held = max(held, bits.bit_length())
        return held
