"""Ray Serve's prefix tree, and the rule of its `PrefixCacheAffinityRouter` on top of it.

The tree is Ray's code. The rule is eight lines of a class that lives in a running Ray cluster and reaches the tree by
remote calls; it is written here, with the threshold for unequal queues that its documentation gives (in the code it
is off). Where it has several candidates, the router takes the shortest queue, the first of equals in the order that
the tree gave them.

The tree works on text. Here each token is one character of it, so that shares of the prompt are what they are. Its
loop that evicts is on, on virtual time, at its default interval; a replica may have as many characters as its KV has
tokens.
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
EVICTION_SECONDS = 10.0
EVICTED_TO = 0.9
"""Of the limit, as by the defaults of Ray's router."""


class RayRouter(PeerRouter):
    """One tree for all replicas."""

    def __init__(self, fleet: Settings) -> None:
        from ray.llm._internal.serve.routing_policies.prefix_aware import (  # type: ignore[import-not-found,unused-ignore]
            prefix_tree,  # only where it is measured
        )

        super().__init__("ray-tree", fleet.replicas)
        self._tree: Any = prefix_tree.PrefixTree()
        self._tree.add_tenants([str(replica) for replica in sorted(self.up)], 0.0)
        self._limit = fleet.kv_tokens
        self._characters: dict[int, str] = {}
        self._random = random.Random(fleet.seed)
        self._next_eviction = EVICTION_SECONDS

    def choose(self, request_id: str, tokens: Tokens, now: float) -> tuple[int, str]:
        self._evict(now)
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

    def _evict(self, now: float) -> None:
        """What its loop does after every interval."""
        while self._next_eviction <= now:
            for tenant, size in list(self._tree.tenant_to_char_count.items()):
                if size > self._limit:
                    self._tree.evict_tenant_by_lru(tenant, int(size - EVICTED_TO * self._limit))
            self._next_eviction += EVICTION_SECONDS

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
        "eviction_interval_secs": EVICTION_SECONDS,
        "characters per token": 1,
    }
