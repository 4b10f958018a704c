"""The replica with the longest prefix, however busy it is."""

from __future__ import annotations

from collections.abc import Mapping

from preble.sched.policies.base import Choice, Policy, View, holders, least


class PrefixAffinity(Policy):
    """The replica that has the longest prefix of the prompt, the least loaded of several; without any match the least
    loaded of all."""

    name = "prefix-affinity"

    def choose(self, view: View) -> Choice:
        having = holders(view)
        index = least(view, having or range(len(view.replicas)))
        return Choice(index, "exploit" if having else "explore", self.costs(view, index))

    def costs(self, view: View, index: int) -> Mapping[str, float]:
        replica = view.replicas[index]
        return {
            "missed_tokens": view.request.prompt_tokens - view.matched[index],
            "in_flight": replica.in_flight,
            "queued_tokens": replica.queued_prefill_tokens,
        }
