"""The replica with the least to do, wherever the prefix lies."""

from __future__ import annotations

from preble.sched.policies.base import Choice, Policy, View, least


class LeastLoaded(Policy):
    """Fewest requests in flight, then fewest tokens to prefill, then by lot."""

    name = "least-loaded"

    def choose(self, view: View) -> Choice:
        index = least(view, range(len(view.replicas)))
        return Choice(index, "least-loaded", self.costs(view, index))
