"""What prompts have in common: shared tokens, key portions, the prefixes that carry most of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from preble.sim.study.distribution import Distribution
from preble.sim.study.prompt_tree import PromptNode, PromptTree


@dataclass(frozen=True, slots=True, eq=False)
class KeyPortions:
    """The key portion of a prompt: the deepest node on its path in the prefix tree that has more tokens than all before
    it together (Srivatsa et al., "Preble", 2025). It decides where the request should go."""

    tokens: Distribution
    """Of each key portion, without what is before it."""
    requests: Distribution
    """Of each key portion: whose deepest it is. They sum to all requests."""
    share: float
    """Of all prompt tokens: those in the request's key portion."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.requests.values)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "count": self.count,
            "share_of_prompt_tokens": self.share,
            "tokens": self.tokens.as_json(),
            "requests": self.requests.as_json(),
        }


@dataclass(frozen=True, slots=True)
class SharedRun:
    """A node of the prefix tree that several requests have."""

    start: int
    """Prompt tokens before it. They are shared by at least as many."""
    tokens: int
    """Its own."""
    requests: int
    """At least 2."""
    first_request: int
    """The number in the trace, from 1, of the first request that has it."""
    share: float
    """Of all prompt tokens: those of its requests in it. Shares of several nodes can be summed."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "start_token": self.start,
            "tokens": self.tokens,
            "requests": self.requests,
            "first_request": self.first_request,
            "share_of_prompt_tokens": self.share,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """What prompts have in common."""

    shared: float
    """Share of all prompt tokens that another request, earlier or later, has in the same prefix."""
    ideal_hit_rate: float
    """Share of all prompt tokens in a prefix of an earlier request: hits of a cache that is large enough."""
    distinct_tokens: int
    """Tokens in the prefix tree: how large a cache is large enough."""
    key_portions: KeyPortions
    hottest: tuple[SharedRun, ...]
    """The shared nodes with most prompt tokens in them, most first."""

    @classmethod
    def of(cls, tree: PromptTree, hottest: int = 10) -> Sharing:
        """What a tree's prompts have in common, with so many of the hottest nodes."""
        nodes = list(tree.nodes())
        total = sum(node.own_tokens * node.requests for node in nodes)
        shared = [node for node in nodes if node.requests > 1]
        shared.sort(key=lambda node: (-node.own_tokens * node.requests, node.first, node.start))
        distinct = sum(node.own_tokens for node in nodes)
        return cls(
            shared=sum(node.own_tokens * node.requests for node in shared) / total,
            ideal_hit_rate=(total - distinct) / total,
            distinct_tokens=distinct,
            key_portions=_key_portions(tree, total),
            hottest=tuple(
                SharedRun(
                    start=node.start_token,
                    tokens=node.own_tokens,
                    requests=node.requests,
                    first_request=node.first + 1,
                    share=node.own_tokens * node.requests / total,
                )
                for node in shared[:hottest]
            ),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shared": self.shared,
            "ideal_hit_rate": self.ideal_hit_rate,
            "distinct_tokens": self.distinct_tokens,
            "key_portions": self.key_portions.as_json(),
            "hottest": [run.as_json() for run in self.hottest],
        }


def key_portion(prompt: PromptNode) -> PromptNode:
    """Of the prompt that ends at a node."""
    # There is one: the first node has nothing before it.
    return next(node for node in reversed(prompt.path()) if node.own_tokens > node.start_token)


def _key_portions(tree: PromptTree, prompt_tokens: int) -> KeyPortions:
    ends = Counter(tree.prompts)
    requests: Counter[PromptNode] = Counter()
    for prompt, count in ends.items():
        requests[key_portion(prompt)] += count
    return KeyPortions(
        tokens=Distribution.of([node.own_tokens for node in requests]),
        requests=Distribution.of(list(requests.values())),
        share=sum(node.own_tokens * count for node, count in requests.items()) / prompt_tokens,
    )
