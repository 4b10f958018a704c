"""Projected marginal cost: what everybody would wait for this request if a replica took it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from preble.sched.policies.base import Choice, Policy, ReplicaView, View, draw, holders

NO_HISTORY = math.sqrt(0.5)
"""ω before any request ended: its largest value, that of requests that end with their first token."""

TERMS = (
    "wait_seconds",
    "pages_seconds",
    "arrivals_seconds",
    "stall_seconds",
    "decode_seconds",
    "slowdown_seconds",
    "copy_discount",
    "score_seconds",
)
"""What `PMC.costs` names, in the order of the formula: W, KV, the four weighted terms, φ, the score."""


class PMC(Policy):
    """The replica where the request costs everybody the fewest seconds, itself, those in flight and those to come:

    score = W + KV + (λ/N) W Δp φ + ω (n D / (D + drain(x)) Δs φ + D + n ΔD); the smallest wins, ties are drawn by lot.

    - x tokens are still to be computed there, d requests decode, n are in flight, and T tokens fit into a step. The
      request adds the part of its prompt that is not cached there, at least one token.
    - drain(x): seconds to work off x in steps of T - d tokens beside d decodes. stall(x): drain(x) less the decode
      steps that would have run instead, one decode if there are none. Δp, Δs: by how much the request's tokens raise
      them; these begin in what the last step of x has left, so a small miss behind a backlog is nearly free.
    - W = drain with the request + its steps x the time a step takes to attend to the d decodes' context: the projected
      TTFT. D: the expected output x a decode step of the n requests and this one, with the context that they will have
      at their ends. ΔD: D less the same without it.
    - KV = max(0, demand - capacity) / release rate. Demand: what the n and this one hold at their ends, shared pages
      once. The release rate is Little's: what the n hold, within drain(x) + D.
    - λ requests arrive per second at N replicas: those that will come here while this one waits are delayed by Δp each.
    - φ discounts the price of copying a hot prefix: f = 1 / (1 + max(0, c - h) / h) for a token that c requests in
      flight share and h replicas hold, 1 where nobody holds it; f̄ is its mean over the tokens that are not cached
      here, and φ = 1 / (1 + (1/f̄ - 1) max(0, 1 - n / n_holder)), with the n of the least busy of the longest match's
      holders.
    - ω = sqrt(mean TTFT / (mean TTFT + mean latency)), as observed.

    The formula's factor 1 / (1 - u) on arrivals, with u the utilisation by prefills, is left out (u = 0), which was
    found to do as well.

    Reason: `least-cost`.
    """

    name = "pmc"

    def choose(self, view: View) -> Choice:
        projection = _Projection(view)
        best: list[tuple[int, _Terms]] = []
        lowest = math.inf
        for index in range(len(view.replicas)):
            terms = projection.terms(index, lowest)
            if terms is None or terms[-1] > lowest:
                continue
            if terms[-1] < lowest:
                lowest = terms[-1]
                best.clear()
            best.append((index, terms))
        index, terms = best[draw(view, list(range(len(best))))]
        return Choice(index, "least-cost", dict(zip(TERMS, terms, strict=True)))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        terms = _Projection(view).terms(index, math.inf)
        assert terms is not None
        return dict(zip(TERMS, terms, strict=True))


_Terms: TypeAlias = tuple[float, float, float, float, float, float, float, float]
"""The values of `TERMS`."""


class _Projection:
    """One decision: what does not depend on the replica, worked out once."""

    __slots__ = ("end", "excess", "fewest", "matched", "omega", "output", "prompt", "rate", "view")

    def __init__(self, view: View) -> None:
        traffic = view.traffic
        self.view = view
        self.matched = view.matched
        self.prompt = view.request.prompt_tokens
        self.output = view.request.expected_tokens
        self.end = self.prompt + int(self.output)
        self.rate = traffic.arrival_rate / len(view.replicas)
        ttft, latency = traffic.mean_ttft, traffic.mean_latency
        self.omega = math.sqrt(ttft / (ttft + latency)) if latency else NO_HISTORY
        self.fewest = min((view.replicas[index].in_flight for index in holders(view)), default=0)
        """Requests in flight at the least busy of the replicas with the longest match."""
        self.excess: dict[int, float] = {}
        """1/f̄ - 1 by cached tokens."""

    def terms(self, index: int, limit: float) -> _Terms | None:
        """The terms of a replica, or `None` as soon as the score is sure to be above the limit."""
        replica, output, omega = self.view.replicas[index], self.output, self.omega
        new = self.prompt - self.matched[index] or 1
        in_flight, decoding, page_size = replica.in_flight, replica.decoding, replica.page_size
        decode_seconds = replica.cost.decode_seconds
        drain, longer, steps, added = self._prefill(replica, new)
        alone = decode_seconds(decoding or 1, 0)
        wait = drain + longer
        if decoding:
            wait += steps * (decode_seconds(decoding, replica.decode_context_tokens) - alone)
        if wait > limit:
            return None

        context = replica.total_pages * page_size
        decode = output * decode_seconds(in_flight + 1, context + self.end)
        discount = 1.0
        if in_flight < self.fewest:
            discount = 1 / (1 + self._excess(self.prompt - new) * (1 - in_flight / self.fewest))
        pages = stalled = slowdown = 0.0
        if in_flight:
            slowdown = omega * in_flight * (decode - output * decode_seconds(in_flight, context))
            held = replica.unique_pages * page_size
            lacking = held + new + output - replica.capacity_tokens
            if lacking > 0:
                pages = lacking * (drain + decode) / held
            stall = longer - added * alone
            if stall > 0 and decode > 0:
                stalled = omega * in_flight * decode / (decode + drain) * stall * discount
        arrivals = self.rate * wait * longer * discount
        decode *= omega
        score = wait + pages + arrivals + stalled + decode + slowdown
        return wait, pages, arrivals, stalled, decode, slowdown, discount, score

    def _prefill(self, replica: ReplicaView, new: int) -> tuple[float, float, int, int]:
        """drain(x), Δp, all steps until the request's first token, and how many of them it adds."""
        step_seconds, decoding = replica.cost.step_seconds, replica.decoding
        budget = replica.max_batched_tokens - decoding
        if budget < 1:
            budget = 1
        cached = self.prompt - new
        full, left = divmod(replica.queued_prefill_tokens, budget)
        drain = full * step_seconds(((budget, budget),), decoding, 0) if full else 0.0
        part = budget - left
        if part > new:
            part = new
        if left:
            last = step_seconds(((left, left),), decoding, 0)
            longer = step_seconds(((left, left), (part, cached + part)), decoding, 0) - last
            drain += last
            full += 1
            added = 0
        else:
            longer = step_seconds(((part, cached + part),), decoding, 0)
            added = 1
        if new > part:
            more, final = divmod(new - part, budget)
            if more:
                attended = cached + part + budget * (more + 1) // 2
                longer += more * step_seconds(((budget, attended),), decoding, 0)
                added += more
            if final:
                longer += step_seconds(((final, self.prompt),), decoding, 0)
                added += 1
        return drain, longer, full + added, added

    def _excess(self, cached: int) -> float:
        """1/f̄ - 1 of the prompt's tokens from `cached` on."""
        excess = self.excess.get(cached)
        if excess is None:
            missed = self.prompt - cached
            spared = 0.0
            for start, end, in_flight, having in self.view.stretches:
                if end > cached and in_flight > having > 0:
                    spared += (end - max(start, cached)) * (1 - having / in_flight)
            excess = self.excess[cached] = missed / (missed - spared) - 1
        return excess
