"""Projected marginal cost: what everybody would wait for this request if a replica took it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from preble.sched.policies.base import Choice, Policy, View, draw
from preble.sched.policies.projection import Projection, Terms


class PMC(Policy):
    """The replica where the request costs everybody the fewest seconds, itself, those in flight and those to come:

    score = W + KV + (λ/N) W Δp φ + ω (n D / (D + drain(x)) Δs φ + D + n ΔD); the smallest wins, ties are drawn by lot.
    `Projection` says what the letters mean.

    The formula's factor 1 / (1 - u) on arrivals, with u the utilisation by prefills, is left out (u = 0), which was
    found to do as well.

    Reason: `least-cost`.
    """

    name = "pmc"

    def choose(self, view: View) -> Choice:
        projection = Projection(view)
        best: list[tuple[int, Terms]] = []
        lowest = math.inf
        for index in range(len(view.replicas)):
            terms = projection.terms(index, lowest)
            if terms is None or (score := terms.seconds) > lowest:
                continue
            if score < lowest:
                lowest = score
                best.clear()
            best.append((index, terms))
        index, terms = best[draw(view, list(range(len(best))))]
        return Choice(index, "least-cost", named(terms))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        terms = Projection(view).terms(index)
        assert terms is not None
        return named(terms)


def named(terms: Terms) -> dict[str, float]:
    """The terms as `Placement.costs` calls them, in the order of the formula: W, KV, the four weighted terms, φ, the
    score."""
    return {
        "wait_seconds": terms.wait,
        "pages_seconds": terms.pages,
        "arrivals_seconds": terms.arrivals,
        "stall_seconds": terms.stall,
        "decode_seconds": terms.decode,
        "slowdown_seconds": terms.slowdown,
        "copy_discount": terms.discount,
        "score_seconds": terms.seconds,
    }
