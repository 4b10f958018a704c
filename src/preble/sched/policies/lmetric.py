"""The rule of LMetric."""

from __future__ import annotations

from collections.abc import Mapping

from preble.sched.policies.base import Choice, Policy, View, draw


class LMetric(Policy):
    """Least product of tokens to prefill and batch size (Zhang et al., "Simple is better: multiplication may be all you
    need for LLM request scheduling", OSDI 2026, arXiv 2603.15202): a product needs no weights.

    The tokens are those the replica has yet to compute plus the part of the prompt that it does not have, at least one,
    as engines compute at least the last. The batch is every request in flight, queued or running, and this one: without
    it all idle replicas would score 0, whatever they have cached, for which reason the authors' router adds it. The
    paper does not say how ties are broken; they are drawn by lot. Its detector, which takes the holders of a prefix out
    of the choice when the product fails on a hot one, is left out: the paper itself finds that to be rare.

    Under cache pressure it gives hits away: a holder with twice the batch of another loses to it as soon as it has more
    than half as many tokens to prefill.

    Reason: `least-product`.
    """

    name = "lmetric"

    def choose(self, view: View) -> Choice:
        prompt = view.request.prompt_tokens
        scores = [
            (replica.queued_prefill_tokens + max(prompt - matched, 1)) * (replica.in_flight + 1)
            for replica, matched in zip(view.replicas, view.matched, strict=True)
        ]
        least = min(scores)
        index = draw(view, [index for index, score in enumerate(scores) if score == least])
        return Choice(index, "least-product", self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        replica = view.replicas[index]
        tokens = replica.queued_prefill_tokens + max(view.request.prompt_tokens - view.matched[index], 1)
        return {"prefill_tokens": tokens, "batch_requests": replica.in_flight + 1}
