"""Every replica in turn."""

from __future__ import annotations

from collections.abc import Mapping

from preble.sched.policies.base import Choice, Policy, View, draw


class RoundRobin(Policy):
    """The replica whose last request was placed the longest ago; those that never got one go first, by lot."""

    name = "round-robin"

    def choose(self, view: View) -> Choice:
        oldest = min(replica.last_placed for replica in view.replicas)
        index = draw(view, [i for i, replica in enumerate(view.replicas) if replica.last_placed == oldest])
        return Choice(index, "round-robin", self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        return {"last_placed": view.replicas[index].last_placed}
