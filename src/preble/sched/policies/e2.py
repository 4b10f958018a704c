"""E2, exploitation and exploration; for now without the cost model."""

from __future__ import annotations

from preble.sched.policies.base import Choice, View, least
from preble.sched.policies.prefix_affinity import PrefixAffinity

FACTOR = 1.5
MARGIN = 4


class E2(PrefixAffinity):
    """Prefix affinity with a load limit: a request goes where its prefix lies as long as that replica has at most
    `FACTOR` times the requests in flight of the least loaded one plus `MARGIN`, otherwise to the least loaded one.

    Interim: the load cost in seconds, rebalancing and the autoscaling of prefixes will take the place of this limit.
    """

    name = "e2"

    def choose(self, view: View) -> Choice:
        choice = super().choose(view)
        if choice.reason == "exploit":
            lowest = min(replica.in_flight for replica in view.replicas)
            if view.replicas[choice.chosen].in_flight > FACTOR * lowest + MARGIN:
                index = least(view, range(len(view.replicas)))
                return Choice(index, "rebalance", self.costs(view, index))
        return choice
