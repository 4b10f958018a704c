"""What everybody would wait for a request if a replica took it: the terms that `pmc` and `e2` add up."""

from __future__ import annotations

import math
from typing import NamedTuple

from preble.sched.policies.base import ReplicaView, View, holders

NO_HISTORY = math.sqrt(0.5)
"""ω before any request ended: its largest value, that of requests that end with their first token."""


class Terms(NamedTuple):
    """Of one replica, in seconds; `Projection` has the formulas."""

    wait: float
    """W: the request's own time to its first token."""
    pages: float
    """KV: the wait for pages."""
    arrivals: float
    """Added to those who will come while it waits."""
    stall: float
    """Added by its prefill to those who decode, times ω."""
    decode: float
    """Its own decoding, times ω."""
    slowdown: float
    """Added to the decoding of the others, times ω."""
    discount: float
    """φ, by which `arrivals` and `stall` are multiplied already."""
    prefill: float
    """Δp: its own prefill, a part of W."""

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.wait + self.pages + self.arrivals + self.stall + self.decode + self.slowdown


class Projection:
    """One decision: what does not depend on the replica is worked out once.

    - x tokens are still to be computed at a replica, d requests decode, n are in flight, and T tokens fit into a step.
      The request adds the part of its prompt that is not cached there, at least one token.
    - drain(x): seconds to work off x in steps of T - d tokens beside d decodes. stall(x): drain(x) less the decode
      steps that would have run instead, one decode if there are none. Δp, Δs: by how much the request's tokens raise
      them; these begin in what the last step of x has left, so a small miss behind a backlog is nearly free.
    - W = drain with the request + its steps x the time a step takes to attend to the d decodes' context: the projected
      TTFT. D: the expected output x a decode step of the n requests and this one, with the context that they will have
      at their ends. ΔD: D less the same without it.
    - KV = max(0, demand - capacity) / release rate. Demand: what the n and this one hold at their ends, shared pages
      once. The release rate is Little's: what the n hold, within drain(x) + D.
    - arrivals = (λ/N) W Δp φ: λ requests arrive per second at N replicas; those that will come here while this one
      waits are delayed by Δp each. stall = ω n D / (D + drain(x)) Δs φ, decode = ω D, slowdown = ω n ΔD.
    - φ discounts the price of copying a hot prefix: f = 1 / (1 + max(0, c - h) / h) for a token that c requests in
      flight share and h replicas hold, 1 where nobody holds it; f̄ is its mean over the tokens that are not cached
      here, and φ = 1 / (1 + (1/f̄ - 1) max(0, 1 - n / n_holder)), with the n of the least busy of the longest match's
      holders.
    - ω = sqrt(mean TTFT / (mean TTFT + mean latency)), as observed.
    """

    __slots__ = ("_end", "_excess", "_fewest", "_omega", "_output", "_prompt", "_rate", "_view", "matched")

    def __init__(self, view: View) -> None:
        traffic = view.traffic
        self.matched = view.matched
        self._view = view
        self._prompt = view.request.prompt_tokens
        self._output = view.request.expected_tokens
        self._end = self._prompt + int(self._output)
        self._rate = traffic.arrival_rate / len(view.replicas)
        ttft, latency = traffic.mean_ttft, traffic.mean_latency
        self._omega = math.sqrt(ttft / (ttft + latency)) if latency else NO_HISTORY
        self._fewest = min((view.replicas[index].in_flight for index in holders(view)), default=0)
        """Requests in flight at the least busy of the replicas with the longest match."""
        self._excess: dict[int, float] = {}
        """1/f̄ - 1 by cached tokens."""

    def terms(self, index: int, limit: float = math.inf) -> Terms | None:
        """The terms of a replica, or `None` as soon as their sum, be it without Δp, is sure to be above the limit."""
        replica, output, omega = self._view.replicas[index], self._output, self._omega
        new = self._prompt - self.matched[index] or 1
        in_flight, decoding, page_size = replica.in_flight, replica.decoding, replica.page_size
        decode_seconds = replica.cost.decode_seconds
        drain, longer, steps, added = self._prefill(replica, new)
        alone = decode_seconds(decoding or 1, 0)
        wait = drain + longer
        if decoding:
            wait += steps * (decode_seconds(decoding, replica.decode_context_tokens) - alone)
        if wait - longer > limit:
            return None

        context = replica.total_pages * page_size
        decode = output * decode_seconds(in_flight + 1, context + self._end)
        discount = 1.0
        if in_flight < self._fewest:
            discount = 1 / (1 + self._copies(self._prompt - new) * (1 - in_flight / self._fewest))
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
        arrivals = self._rate * wait * longer * discount
        return Terms(wait, pages, arrivals, stalled, omega * decode, slowdown, discount, longer)

    def _prefill(self, replica: ReplicaView, new: int) -> tuple[float, float, int, int]:
        """drain(x), Δp, all steps until the request's first token, and how many of them it adds."""
        step_seconds, decoding = replica.cost.step_seconds, replica.decoding
        budget = replica.max_batched_tokens - decoding
        if budget < 1:
            budget = 1
        cached = self._prompt - new
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
                longer += step_seconds(((final, self._prompt),), decoding, 0)
                added += 1
        return drain, longer, full + added, added

    def _copies(self, cached: int) -> float:
        """1/f̄ - 1 of the prompt's tokens from `cached` on."""
        excess = self._excess.get(cached)
        if excess is None:
            missed = self._prompt - cached
            spared = 0.0
            for start, end, in_flight, having in self._view.stretches:
                if end > cached and in_flight > having > 0:
                    spared += (end - max(start, cached)) * (1 - having / in_flight)
            excess = self._excess[cached] = missed / (missed - spared) - 1
        return excess
