"""E2: exploit the replica that has the prefix, or explore another one, whichever costs everybody fewer seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from heapq import nsmallest

from preble.sched.policies.base import Choice, Policy, ReplicaView, View, draw
from preble.sched.policies.pmc import named
from preble.sched.policies.projection import Projection, Terms

FOLLOWERS = 2.0
"""Those who come while a request waits are delayed by it, and so are those who come while these are served. Where half
of the time is spent on prefills, that makes twice as many: 1 / (1 - u) for a utilisation u."""

BACKLOG_STEPS = 2
"""A replica has room for more while what it has to compute fits into so many full steps: it never runs dry before the
scheduler hears of it, and whoever comes next is not far behind."""

BACKLOG_SECONDS = 0.5
"""… or takes no longer than this: reports may be that late."""

WANTED_AGAIN = 0.5
"""Of pages that are evicted though a request used them within H, the share that will be computed again."""

MOST_WEIGHED = 16
"""Of a larger fleet so many replicas are weighed, so that a decision does not take longer the more there are."""

SHORTEST = 1e-9
"""Seconds that any prefill takes, whatever the cost model says."""


class E2(Policy):
    """Exploitation and exploration, weighed in one currency: GPU seconds that somebody waits.

    score = W + KV + 2 (λ/N) W Δp φ + ω (n D / (D + drain(x)) Δs φ + D + n ΔD) + M / 2 - S

    The smallest wins; of equals the session's last replica, or one by lot. `Projection` says what the letters mean; in
    short: the request's own wait for its first token and for pages, what its prefill costs those who come and those who
    decode, and what its decoding costs itself and the others. M is the time to compute again what must be evicted to
    make room (`View.recomputing_seconds`): of pages used within H, half are expected to be wanted again. The paper
    multiplies it by the requests that used them; but whoever misses them first computes them for all. S = (1 - φ) Δp is
    the part of the prefill that others in flight will share, if the replica has room for a copy of the prefix (M = 0):
    then a copy is an investment, otherwise it displaces what is used.

    Of more than 16 replicas those 16 are weighed that come first by the product of tokens to compute and requests (the
    rule of `lmetric`), which is quickly worked out.

    A replica that has much of the prompt wins by a small W, Δp and Δs: it is exploited until waiting there costs more
    than computing the prefix again elsewhere, for which nothing needs to be set.

    *Late binding.* A replica has room while its backlog fits into two full steps and nobody waits there for pages. A
    request whose best replica has no room waits in the cluster, where it can still go to whichever turns out best.
    Those who wait are offered the replicas in the order of their response ratio, (wait + p) / p, p being the prefill of
    what they miss at best, so that short ones overtake long ones; every 64th turn is the oldest one's, who takes any
    room there is.

    Args:
        eviction_cost: count M.
        late_binding: let requests wait in the cluster.

    Reasons: `exploit`, nobody has more of the prompt, and somebody has less; `replicate`, somebody has more than half
    of it, and another one gets a copy; `explore` otherwise.
    """

    name = "e2"

    def __init__(self, *, eviction_cost: bool = True, late_binding: bool = True) -> None:
        self.eviction_cost = eviction_cost
        self.late_binding = self.overtakes = late_binding

    def choose(self, view: View) -> Choice | None:
        replicas = view.replicas
        projection = Projection(view)
        insists = view.request.insists
        best: list[tuple[int, Terms]] = []
        lowest = math.inf
        for index in _candidates(view):
            if insists and not has_room(replicas[index]):
                continue
            terms = projection.terms(index, lowest)
            if terms is None:
                continue
            eviction, shared = self._copying(view, index, terms)
            score = _score(terms, eviction, shared)
            if score > lowest:
                continue
            if score < lowest:
                lowest = score
                best.clear()
            best.append((index, terms))
        if not best:
            return None
        at = next((at for at, (index, _) in enumerate(best) if index == view.session), None)
        index, terms = best[draw(view, list(range(len(best)))) if at is None else at]
        if self.late_binding and not has_room(replicas[index]):
            return None
        return Choice(index, _reason(view, index), self._named(view, index, terms))

    def accepts(self, replicas: Sequence[ReplicaView]) -> bool:
        return not self.late_binding or any(map(has_room, replicas))

    def service_seconds(self, view: View) -> float:
        cached = max(view.matched)
        missed = view.request.prompt_tokens - cached or 1
        return max(view.replicas[view.matched.index(cached)].cost.prefill_seconds(missed, cached), SHORTEST)

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        terms = Projection(view).terms(index)
        assert terms is not None
        return self._named(view, index, terms)

    def _copying(self, view: View, index: int, terms: Terms) -> tuple[float, float]:
        """M / 2, and S."""
        eviction = WANTED_AGAIN * view.recomputing_seconds(index) if self.eviction_cost else 0.0
        return eviction, 0.0 if eviction else (1 - terms.discount) * terms.prefill

    def _named(self, view: View, index: int, terms: Terms) -> dict[str, float]:
        eviction, shared = self._copying(view, index, terms)
        return named(terms) | {
            "arrivals_seconds": FOLLOWERS * terms.arrivals,
            "eviction_seconds": eviction,
            "shared_seconds": shared,
            "score_seconds": _score(terms, eviction, shared),
        }


def _candidates(view: View) -> Sequence[int]:
    """The positions of the replicas to be weighed, of equals those that got nothing for longest; a request that insists
    may go to any."""
    replicas, prompt_tokens = view.replicas, view.request.prompt_tokens
    if len(replicas) <= MOST_WEIGHED or view.request.insists:
        return range(len(replicas))
    products = [
        (replica.queued_prefill_tokens + prompt_tokens - matched + 1) * (replica.in_flight + 1)
        for replica, matched in zip(replicas, view.matched, strict=True)
    ]
    first = nsmallest(MOST_WEIGHED, range(len(replicas)), key=lambda at: (products[at], replicas[at].last_placed))
    return sorted(first)


def _score(terms: Terms, eviction: float, shared: float) -> float:
    return terms.seconds + (FOLLOWERS - 1) * terms.arrivals + eviction - shared


def has_room(replica: ReplicaView) -> bool:
    """Whether a replica would soon get to what it is given."""
    tokens, budget = replica.queued_prefill_tokens, replica.max_batched_tokens
    if not tokens:
        return True
    if replica.queued and replica.unique_pages * replica.page_size > replica.capacity_tokens:
        return False
    if tokens <= BACKLOG_STEPS * budget:
        return True
    return tokens / budget * replica.cost.step_seconds(((budget, budget),), replica.decoding, 0) <= BACKLOG_SECONDS


def _reason(view: View, index: int) -> str:
    matched = view.matched
    longest = max(matched)
    if matched[index] == longest and min(matched) < longest:
        return "exploit"
    return "replicate" if matched[index] < longest and 2 * longest > view.request.prompt_tokens else "explore"
