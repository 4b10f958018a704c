"""The rule of llm-d's scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preble.sched.policies.base import Choice, Policy, View, draw


@dataclass(frozen=True)
class LlmD(Policy):
    """Sticky until saturated: llm-d's optimized baseline of 2026, the `prefix-cache-affinity-filter` followed by the
    `token-load-scorer`, each with its defaults.

    Replicas that have most of the prompt are the only candidates, unless even the best of them would start on it later
    than the best of the others by more than a budget. Of the candidates the one with the least uncached tokens wins,
    its backlog and this prompt's together; ties are drawn by lot.

    The time to start is the backlog over the prefill rate. llm-d's default rate was measured on one set-up, 15,928
    tokens/s, and is to be replaced by the throughput of one full step on an idle server. Here the cost model of each
    replica says what that is. So the backlog that ends stickiness is prefill rate x budget *more than elsewhere*, not
    in all.

    Decoding counts for nothing: replicas that are full of long answers look idle.

    Reasons: `exploit`, the best of those that have most of the prompt; `saturated`, these have too much to do;
    `explore`, nobody has most of it.
    """

    affinity_threshold: float = 0.80
    """A replica has most of the prompt if it has this share."""
    max_ttft_penalty_ms: float = 18_000.0
    """The budget in milliseconds; with 0 there is no limit to stickiness."""
    queue_threshold_tokens: int = 4_194_304
    """Uncached tokens from which on replicas count as equally loaded."""

    name = "llm-d"

    def choose(self, view: View) -> Choice:
        everybody = range(len(view.replicas))
        prompt = view.request.prompt_tokens
        sticky = [index for index in everybody if view.matched[index] / prompt >= self.affinity_threshold]
        if not sticky:
            candidates, reason = list(everybody), "explore"
        elif self._saturated(view, sticky):
            candidates, reason = list(everybody), "saturated"
        else:
            candidates, reason = sticky, "exploit"
        loads = [min(_uncached(view, index), self.queue_threshold_tokens) for index in candidates]
        least = min(loads)
        index = draw(view, [index for index, load in zip(candidates, loads, strict=True) if load == least])
        return Choice(index, reason, self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        return {
            "uncached_tokens": _uncached(view, index),
            "ttft_seconds": _ttft(view, index),
            "cached_share": view.matched[index] / view.request.prompt_tokens,
        }

    def _saturated(self, view: View, sticky: list[int]) -> bool:
        others = set(range(len(view.replicas))).difference(sticky)
        if not others or self.max_ttft_penalty_ms <= 0:
            return False
        penalty = min(_ttft(view, index) for index in sticky) - min(_ttft(view, index) for index in others)
        return penalty * 1000 > self.max_ttft_penalty_ms


def _uncached(view: View, index: int) -> int:
    """Tokens that the replica would have to compute."""
    return view.replicas[index].queued_prefill_tokens + view.request.prompt_tokens - view.matched[index]


def _ttft(view: View, index: int) -> float:
    """Seconds of the backlog at the rate of full steps."""
    replica = view.replicas[index]
    step = replica.max_batched_tokens
    return replica.queued_prefill_tokens * replica.cost.prefill_seconds(step) / step
