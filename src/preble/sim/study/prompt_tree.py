"""The prefix tree of a trace's prompts."""

from __future__ import annotations

from preble.sched.radix import Node, RadixTree
from preble.sim.study.reuse import ReuseDistances
from preble.sim.trace import Trace, TracedRequest


class PromptNode(Node):
    """A run of blocks that the same requests have. Its positions (`start`, `end`, `tokens`) count blocks."""

    __slots__ = ("end_token", "first", "last", "requests")

    parent: PromptNode | None
    end_token: int
    """Prompt tokens to its end."""
    requests: int
    """How many have it."""
    first: int
    """The first of them, by its number in the trace."""
    last: int
    """The last."""

    @property
    def start_token(self) -> int:
        """Prompt tokens before it."""
        return self.parent.end_token if self.parent is not None else 0

    @property
    def own_tokens(self) -> int:
        """Prompt tokens in it."""
        return self.end_token - self.start_token

    def path(self) -> list[PromptNode]:
        """From below the root to here."""
        nodes: list[PromptNode] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PromptTree(RadixTree[PromptNode]):
    """All prompts of a trace: a block of the trace is a token of the tree."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(PromptNode, page_size=1)
        self.block_size = trace.block_size
        self.reuse = ReuseDistances(trace.block_size, len(trace.requests))
        root = self.root("")
        root.end_token = 0
        self.prompts: list[PromptNode] = []
        """Where each prompt ends."""
        for number, request in enumerate(trace.requests):
            self.prompts.append(self._add(root, number, request))

    def _add(self, root: PromptNode, number: int, request: TracedRequest) -> PromptNode:
        node, matched = self.walk(root, request.blocks)
        if matched < node.end:
            node = self.split(node, matched)
        path = node.path()
        self.reuse.request(request.prompt_tokens, [(one.last, one.own_tokens) for one in path])
        for one in path:
            one.requests += 1
            one.last = number
        if matched < len(request.blocks):
            node = self.extend(node, request.blocks)
            node.end_token = request.prompt_tokens
            node.requests, node.first, node.last = 1, number, number
        return node

    def _split_payload(self, upper: PromptNode, lower: PromptNode, pages: int) -> None:
        upper.end_token = upper.end * self.block_size
        upper.requests, upper.first, upper.last = lower.requests, lower.first, lower.last
