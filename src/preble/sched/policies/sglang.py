"""The rule of SGLang's router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preble.sched.policies.base import Choice, Policy, View


@dataclass(frozen=True)
class SGLang(Policy):
    """Prefix affinity while the queues are alike, the shortest queue otherwise: the `cache_aware` policy of SGLang's
    router (sgl-router, later sgl-model-gateway), with the defaults of its command line.

    Every tie goes to the first replica, and neither load nor seed decides between two holders of the same prefix: that
    is the rule, and why cold prompts pile up on the first replica. What a replica has in its cache is ours: their tree
    holds the text that was sent to each worker and never hears of evictions.

    Reasons: `shortest-queue`, the queues differ too much; `exploit`, the replica with the longest match; `explore`,
    nobody has enough of the prompt, so the shortest queue, too.
    """

    cache_threshold: float = 0.3
    """A match counts if it is more than this share of the prompt."""
    balance_abs_threshold: int = 64
    """The queues differ too much if the longest has more requests than the shortest by more than this, …"""
    balance_rel_threshold: float = 1.5
    """… and more than this many times as many."""

    name = "sglang"

    def choose(self, view: View) -> Choice:
        loads = [replica.in_flight for replica in view.replicas]
        shortest, longest = min(loads), max(loads)
        imbalanced = longest - shortest > self.balance_abs_threshold and longest > self.balance_rel_threshold * shortest
        match = max(view.matched)
        if imbalanced:
            index, reason = loads.index(shortest), "shortest-queue"
        elif match / view.request.prompt_tokens > self.cache_threshold:
            index, reason = view.matched.index(match), "exploit"
        else:
            index, reason = loads.index(shortest), "explore"
        return Choice(index, reason, self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        return {
            "in_flight": view.replicas[index].in_flight,
            "cached_share": view.matched[index] / view.request.prompt_tokens,
        }
