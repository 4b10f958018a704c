"""Which stretches of prompts many requests share, and who has them: the hottest nodes of the global prefix tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import nsmallest

from preble.sched.prefix_node import PrefixNode
from preble.sched.prefix_tree import PrefixTree


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A stretch of tokens that prompts have in common, at the same place behind the same beginning."""

    namespace: str
    """Whose prompts these are."""
    start: int
    """Position in these prompts of its first token."""
    end: int
    """… and of the first token behind it."""
    name: int
    """Hash of the prompts up to `end` (`preble.sched.hashing`): the same in every scheduler."""
    uses: int
    """Placements within the window whose prompt contains it."""
    replicas: Mapping[int, int]
    """Replica -> how many of its tokens are in the prefix cache there, by number, without those that have none."""

    @property
    def tokens(self) -> int:
        """How long it is."""
        return self.end - self.start

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens within the window that need not be computed if it is computed once: its heat."""
        return (self.uses - 1) * self.tokens


def hottest_prefixes(tree: PrefixTree, replicas: Mapping[int, int], count: int) -> list[HotPrefix]:
    """The `count` stretches with the most shared tokens, the hottest first; none that fewer than two prompts contain.

    Args:
        tree: the tree; it is not changed.
        replicas: slot in the tree -> replica number.
        count: how many at most.
    """
    shared = (node for node in tree.nodes() if node.uses > 1)
    hottest = nsmallest(count, shared, key=lambda node: (-(node.uses - 1) * (node.end - node.start), _place(node)))
    return [_hot_prefix(node, replicas, tree.page_size) for node in hottest]


def _place(node: PrefixNode) -> tuple[str, int, int]:
    """Tells equals apart."""
    return node.namespace, node.start, int(node.hashes[-1])


def _hot_prefix(node: PrefixNode, replicas: Mapping[int, int], page_size: int) -> HotPrefix:
    held = sorted((replicas[slot], bits.bit_count() * page_size) for slot, bits in node.resident.items())
    return HotPrefix(node.namespace, node.start, node.end, int(node.hashes[-1]), node.uses, dict(held))
