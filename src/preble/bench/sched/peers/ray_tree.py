"""The prefix tree of Ray Serve's prefix-aware router, called in process; in Ray it is an actor, a remote call away.

The tree works on text: each token is four characters of it. A decision is `prefix_match`, the router's own rule on the
result, and `insert`; the rest is to evict what is more than a replica holds.
"""

from __future__ import annotations

from collections import Counter, deque
from importlib.metadata import version
from typing import Any

from preble.bench.sched.peers.worker import Case, Peer, Tally, read_clocks, serve

CHARACTERS = 4
"""Per token, about as in English text."""
LEAST_MATCH = 0.1
"""The router's default: below this fraction of the prompt it takes the replica with the least text."""
EVICTED_TO = 0.9
"""The router's default: it evicts down to this fraction of the limit."""


def _run(case: Case, prompts: list[list[int]]) -> Tally:
    tree: Any = _prefix_tree()()
    replicas = [str(number) for number in range(case.replicas)]
    tree.add_tenants(replicas, 0.0)
    limit = case.capacity_tokens * CHARACTERS
    words = [f"{token:0{CHARACTERS}x}" for token in range(case.vocabulary)]
    texts = ["".join(map(words.__getitem__, tokens)) for tokens in prompts]
    in_flight: deque[str] = deque()
    tally = Tally()
    matched = 0
    for number, text in enumerate(texts):
        load = Counter(in_flight)
        began = read_clocks()
        prefix, holders = tree.prefix_match(text, replicas)
        if len(prefix) < LEAST_MATCH * len(text):
            holders = tree.get_smallest_tenants()
        chosen = min(holders, key=load.__getitem__)
        tree.insert(text, chosen, float(number))
        decided = read_clocks()
        if tree.tenant_to_char_count[chosen] > limit:
            tree.evict_tenant_by_lru(chosen, int(tree.tenant_to_char_count[chosen] - EVICTED_TO * limit))
        ended = read_clocks()
        in_flight.append(chosen)
        if len(in_flight) > case.in_flight:
            in_flight.popleft()
        if number >= case.fill:
            tally.add(began, decided, ended)
            matched += len(prefix)
    tally.hit_rate = matched / CHARACTERS / (len(tally.whole) * case.prompt_tokens)
    return tally


def _prefix_tree() -> Any:
    from ray.llm._internal.serve.routing_policies.prefix_aware import (  # type: ignore[import-not-found,unused-ignore]
        prefix_tree,  # only where it is measured
    )

    return prefix_tree.PrefixTree


def make_peer() -> Peer:
    """The peer, once its package is loaded."""
    _prefix_tree()
    return Peer({"ray": version("ray")}, {"characters per token": str(CHARACTERS), "actor": "no"}, _run)


if __name__ == "__main__":
    serve(make_peer)
