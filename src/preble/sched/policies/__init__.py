"""Placement policies: by name, or an object of your own."""

from __future__ import annotations

from preble.sched.by_name import by_name
from preble.sched.policies.base import Choice, Policy, ReplicaView, RequestView, Stretch, TrafficView, View
from preble.sched.policies.dynamo import Dynamo
from preble.sched.policies.e2 import E2
from preble.sched.policies.e2_paper import E2Paper
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
    for policy in (E2, E2Paper, PMC, PrefixAffinity, LeastLoaded, RoundRobin, SGLang, Dynamo, LMetric, LlmD, Ray)
}
"""The policies that have a name."""


def make_policy(policy: str | Policy) -> Policy:
    """The policy of this name, with its defaults; an object is taken as it is.

    Raises:
        InvalidRequest: there is none of this name.
    """
    if isinstance(policy, Policy):
        return policy
    return by_name("policy", policy, POLICIES, "a preble.sched.Policy")()


__all__ = [
    "E2",
    "POLICIES",
    "Choice",
    "E2Paper",
    "Policy",
    "ReplicaView",
    "RequestView",
    "Stretch",
    "TrafficView",
    "View",
    "make_policy",
]
