"""A node of the global prefix tree, and the predictions that end at one."""

from __future__ import annotations

from preble.sched.hashing import Hashes, Tokens
from preble.sched.radix import Node


class PrefixNode(Node):
    """A run of pages, and who has it. Replicas are named by their slot, or by a bit per slot in a mask."""

    __slots__ = ("cover", "ends", "full", "last_used", "namespace", "predicted", "resident")

    def __init__(self, tokens: Tokens, hashes: Hashes, parent: Node | None, start: int) -> None:
        super().__init__(tokens, hashes, parent, start)
        self.namespace: str = parent.namespace if isinstance(parent, PrefixNode) else ""
        self.last_used = 0.0
        self.resident: dict[int, int] = {}
        """Per slot: a bit for each page of this edge that is in the replica's prefix cache; never 0."""
        self.full = 0
        """Mask of the slots where every page of this edge is resident."""
        self.predicted: dict[int, int] = {}
        """Per slot: how many predictions reach or pass this node; never 0."""
        self.ends: dict[int, Prediction] = {}
        """Per slot: the prediction that ends here."""
        self.cover = 0
        """Mask of the slots that have this whole edge, resident or predicted."""

    def recount(self) -> None:
        """Work the masks out from `resident` and `predicted`."""
        whole = (1 << len(self.hashes)) - 1
        self.full = sum(1 << slot for slot, bits in self.resident.items() if bits == whole)
        self.cover = self.full
        for slot in self.predicted:
            self.cover |= 1 << slot

    @property
    def pages_held(self) -> int:
        """How many pages, from the first one on, reach up to the last one that is resident anywhere."""
        return max((bits.bit_length() for bits in self.resident.values()), default=0)


class Prediction:
    """A replica is going to hold the prefix that ends with `node`: `requests` requests were placed there with it."""

    __slots__ = ("node", "requests", "slot")

    def __init__(self, node: PrefixNode, slot: int) -> None:
        self.node = node
        self.slot = slot
        self.requests = 1
