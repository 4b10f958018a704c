"""What the global tree knows of one replica's prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preble.sched.event_order import EventOrder

if TYPE_CHECKING:
    from preble.sched.prefix_node import PrefixNode


class ReplicaCache:
    """One replica's side of the residency that the tree's nodes keep: where it holds pages, so that all of it can be
    forgotten without a search.

    Args:
        slot: the replica's bit position in the tree's masks; slots are used again, replica numbers are not.
        capacity_pages: how many pages the replica has.
    """

    __slots__ = ("bit", "capacity_pages", "nodes", "order", "pages", "slot", "unknown")

    def __init__(self, slot: int, capacity_pages: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.capacity_pages = capacity_pages
        self.order = EventOrder()
        self.pages = 0
        """Resident pages whose tokens the tree knows."""
        self.nodes: dict[PrefixNode, None] = {}
        """The nodes with at least one resident page."""
        self.unknown: dict[int, None] = {}
        """Hashes of resident pages whose tokens the tree does not know, oldest first. Never more than the replica has
        pages: beyond that the oldest are forgotten."""
