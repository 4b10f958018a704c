"""Placement policies: by name, or an object of your own."""

from __future__ import annotations

import difflib

from preble.errors import InvalidRequest
from preble.sched.policies.base import Choice, Policy, ReplicaView, RequestView, Stretch, TrafficView, View
from preble.sched.policies.dynamo import Dynamo
from preble.sched.policies.e2 import E2
from preble.sched.policies.least_loaded import LeastLoaded
from preble.sched.policies.llm_d import LlmD
from preble.sched.policies.lmetric import LMetric
from preble.sched.policies.pmc import PMC
from preble.sched.policies.prefix_affinity import PrefixAffinity
from preble.sched.policies.ray import Ray
from preble.sched.policies.round_robin import RoundRobin
from preble.sched.policies.sglang import SGLang

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (E2, PMC, PrefixAffinity, LeastLoaded, RoundRobin, SGLang, Dynamo, LMetric, LlmD, Ray)
}
"""The policies that have a name."""


def make_policy(policy: str | Policy) -> Policy:
    """The policy of this name, with its defaults; an object is taken as it is.

    Raises:
        InvalidRequest: there is none of this name.
    """
    if isinstance(policy, Policy):
        return policy
    known = POLICIES.get(policy) if isinstance(policy, str) else None
    if known is None:
        close = difflib.get_close_matches(policy, POLICIES, n=1) if isinstance(policy, str) else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        names = ", ".join(sorted(POLICIES))
        raise InvalidRequest(f"policy must be one of {names}, or a preble.sched.Policy, not {policy!r}{hint}")
    return known()


__all__ = [
    "E2",
    "POLICIES",
    "Choice",
    "Policy",
    "ReplicaView",
    "RequestView",
    "Stretch",
    "TrafficView",
    "View",
    "make_policy",
]
