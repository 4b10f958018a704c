"""Ray Serve's prefix tree, and the rule of its `PrefixCacheAffinityRouter` on top of it.

The tree is Ray's code. The rule is eight lines of a class that lives in a running Ray cluster and reaches the tree by
remote calls; it is written here, with the threshold for unequal queues that its documentation gives (in the code it
is off). Where it has several candidates, the router takes the shortest queue, here the first of equals in the order
that the tree gave them.

The tree works on text. Here each token is one character of it, so that shares of the prompt are what they are.
Nothing is evicted from it, as by Ray's default. With its eviction on, all trees soon have about the size of a cache,
and the smallest of them, which gets what matches nowhere, is no longer the one that had the least to do.
"""

from __future__ import annotations

import random
from importlib.metadata import version
from typing import Any

from preble.bench.sim.peers import base
from preble.bench.sim.peers.base import PeerRouter
from preble.sched.hashing import Tokens
from preble.sim.settings import Settings

IMBALANCED = 10
"""The queues differ too much from here on."""
LEAST_MATCH = 0.1


class RayRouter(PeerRouter):
    """One tree for all replicas."""

    def __init__(self, fleet: Settings) -> None:
        from ray.llm._internal.serve.routing_policies.prefix_aware import (  # type: ignore[import-not-found,unused-ignore]
            prefix_tree,  # only where it is measured
        )

        super().__init__("ray-tree", fleet.replicas)
        self._tree: Any = prefix_tree.PrefixTree()
        self._tree.add_tenants([str(replica) for replica in sorted(self.up)], 0.0)
        self._characters: dict[int, str] = {}
        self._random = random.Random(fleet.seed)

    def choose(self, request_id: str, tokens: Tokens, now: float) -> tuple[int, str]:
        text = self._text(tokens)
        queues = self.in_flight()
        tenants = [str(replica) for replica in queues]
        if max(queues.values()) - min(queues.values()) > IMBALANCED:
            candidates, reason = self._random.sample(tenants, 2), "power-of-two"
        else:
            prefix, holders = self._tree.prefix_match(text, tenants)
            if len(prefix) / len(text) < LEAST_MATCH:
                candidates, reason = self._tree.get_smallest_tenants(), "explore"
            else:
                candidates, reason = holders, "exploit"
        chosen = min(map(int, candidates), key=queues.__getitem__)
        self._tree.insert(text, str(chosen), now)
        return chosen, reason

    def left(self, replica: int) -> None:
        self._tree.remove_tenants([str(replica)])

    def joined(self, replica: int) -> None:
        self._tree.add_tenants([str(replica)], 0.0)

    def _text(self, tokens: Tokens) -> str:
        characters = self._characters
        return "".join([characters.setdefault(token, chr(len(characters) + 32)) for token in tokens.tolist()])


def make_router(fleet: Settings) -> RayRouter:
    """A fresh one.

    Raises:
        ImportError: this interpreter has no ray[serve].
    """
    return RayRouter(fleet)


def settings() -> base.Settings:
    """What it is run with."""
    return {
        "ray": version("ray"),
        "imbalanced_threshold": IMBALANCED,
        "match_rate_threshold": LEAST_MATCH,
        "do_eviction": False,
        "characters per token": 1,
    }
