"""The rule of Ray Serve's prefix-aware router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preble.sched.policies.base import Choice, Policy, ReplicaView, View, draw


@dataclass(frozen=True)
class Ray(Policy):
    """Prefix affinity while the queues are alike, the better of two drawn by lot otherwise: `PrefixCacheAffinityRouter`
    of Ray Serve LLM.

    While the longest and the shortest queue differ little, the candidates are the replicas with the longest match, or
    where that is too short, those with the smallest cache, counting what they are about to compute; the shortest queue
    among them wins. Ties are drawn by lot; theirs follow the order of a hash set. What a replica has in its cache is
    ours: their tree holds the text sent to each replica and forgets nothing unless told to, so their smallest cache is
    the one that was given the least.

    Wherever all prompts begin alike, the match is never too short, and the holders get everything until the queues
    differ.

    Reasons: `power-of-two`, the queues differ too much; `exploit`, one that has the longest match; `explore`, one with
    the smallest cache.
    """

    imbalanced_threshold: float = 10
    """The queues differ too much if the longest has more requests than the shortest by more than this. As documented;
    in Ray's code the default is infinity, which turns this off."""
    match_rate_threshold: float = 0.1
    """A match counts if it is at least this share of the prompt."""

    name = "ray"

    def choose(self, view: View) -> Choice:
        queues = [replica.in_flight for replica in view.replicas]
        longest = max(view.matched)
        if max(queues) - min(queues) > self.imbalanced_threshold:
            candidates, reason = _two(view), "power-of-two"
        elif longest / view.request.prompt_tokens >= self.match_rate_threshold:
            candidates = [index for index, matched in enumerate(view.matched) if matched == longest]
            reason = "exploit"
        else:
            sizes = [_size(replica) for replica in view.replicas]
            smallest = min(sizes)
            candidates = [index for index, size in enumerate(sizes) if size == smallest]
            reason = "explore"
        shortest = min(queues[index] for index in candidates)
        index = draw(view, [index for index in candidates if queues[index] == shortest])
        return Choice(index, reason, self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        replica = view.replicas[index]
        return {
            "in_flight": replica.in_flight,
            "cached_share": view.matched[index] / view.request.prompt_tokens,
            "cache_tokens": _size(replica),
        }


def _size(replica: ReplicaView) -> int:
    """Tokens that its cache has or soon will."""
    return replica.resident_tokens + replica.queued_prefill_tokens


def _two(view: View) -> list[int]:
    """Two different replicas by lot; there are at least two."""
    first = view.lots.draw(len(view.replicas))
    second = view.lots.draw(len(view.replicas) - 1)
    return [first, second + (second >= first)]
