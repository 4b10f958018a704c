"""From a policy to a state machine that checks it."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from preble.errors import InvalidRequest
from preble.sched.policies import E2, E2Paper, Policy, make_policy
from preble.sched.testing.e2_machine import E2Machine
from preble.sched.testing.e2_paper_machine import E2PaperMachine
from preble.sched.testing.machine import SchedulerMachine


def machine_for(policy: str | Callable[[], Policy]) -> type[SchedulerMachine]:
    """The state machine that checks a policy, E2 against its rule as well. Its `TestCase` is a test for pytest and
    unittest.

    Args:
        policy: a policy's name, or what makes a fresh one: its class, or a function.

    Raises:
        InvalidRequest: no policy has that name, or this is a policy rather than what makes one.
    """
    if isinstance(policy, Policy):
        raise InvalidRequest(f"give the class or a function that makes the policy, not the object {policy!r}")

    def made(machine: SchedulerMachine | None = None) -> Policy:
        return make_policy(policy if isinstance(policy, str) else policy())

    first = made()
    base: type[SchedulerMachine] = SchedulerMachine
    if isinstance(first, E2):
        base = E2Machine
    elif isinstance(first, E2Paper):
        base = E2PaperMachine
    return type(f"{type(first).__name__}Machine", (base,), {"new_policy": made, "__module__": __name__})


def check_policy(policy: str | Callable[[], Policy], *, max_examples: int = 100, steps: int = 30) -> None:
    """Run a policy through random histories, checking the scheduler after every step.

    Args:
        policy: as for `machine_for`.
        max_examples: histories.
        steps: rules in one history, at most.

    Raises:
        InvalidRequest: as for `machine_for`.
        Exception: whatever failed, an `AssertionError` that names it where an invariant did not hold. Hypothesis prints
            the shortest history that it found to fail so.
    """
    run_state_machine_as_test(
        machine_for(policy),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
