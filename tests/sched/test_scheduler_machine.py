"""The global scheduler under everything that can happen at once, with every policy (`preble.sched.testing`)."""

from __future__ import annotations

import pytest

from preble.sched import E2, POLICIES, E2Paper
from preble.sched.testing import check_policy


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_policy_survives_anything(policy: str) -> None:
    check_policy(policy, max_examples=160 if policy == "e2" else 80, steps=20)


SWITCHES = ("eviction_cost", "rebalancing", "autoscaling", "prefill_decode_balance", "late_binding")


@pytest.mark.parametrize("switch", ["eviction_cost", "late_binding"])
def test_e2_survives_without_either_of_its_parts(switch: str) -> None:
    check_policy(lambda: E2(**{switch: False}), max_examples=50, steps=20)


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_papers_e2_survives_without_any_of_its_parts(switch: str) -> None:
    check_policy(lambda: E2Paper(**{switch: False}), max_examples=25, steps=20)


@pytest.mark.long
@pytest.mark.parametrize(("steps", "examples"), [(15, 1500), (40, 600), (100, 250)])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_policy_survives_anything_for_long(policy: str, steps: int, examples: int) -> None:
    check_policy(policy, max_examples=examples, steps=steps)


@pytest.mark.long
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_papers_e2_survives_without_any_of_its_parts_for_long(switch: str) -> None:
    check_policy(lambda: E2Paper(**{switch: False}), max_examples=600, steps=40)
