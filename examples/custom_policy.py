"""A placement policy of one's own: written, serving, and tested with random histories.

    python examples/custom_policy.py
    python -m pytest examples/custom_policy.py

The program asks two replicas questions about a few handbooks, all at once. This policy places them, then round robin
the same ones. It prints how many answers were right (placement must not change that), which share of the prompts'
tokens was found in the cache, and for which reasons requests went where they did.

Under pytest a state machine of hypothesis (`pip install 'preble[test]'`) takes the policy through bursts, late events,
evictions, and replicas that crash, drain and leave. `docs/testing-schedulers.md` says what must hold all the time.
"""

import argparse
import asyncio
import random
from itertools import islice

import preble
from preble.demo import Handbook
from preble.sched import Choice, Policy, View


class BoundedAffinity(Policy):
    """Where most of the prompt is cached, among the replicas with at most `slack` more requests in flight than the
    idlest one has: a popular prefix spreads to as many replicas as it keeps busy, a rare one stays where it is."""

    name = "bounded-affinity"

    def __init__(self, slack: int = 4) -> None:
        self.slack = slack

    def choose(self, view: View) -> Choice:
        in_flight = [replica.in_flight for replica in view.replicas]
        near = [index for index, count in enumerate(in_flight) if count <= min(in_flight) + self.slack]
        order = {index: (-view.matched[index], in_flight[index]) for index in near}
        best = [index for index in near if order[index] == min(order.values())]
        chosen = best[view.lots.draw(len(best))]
        if not any(view.matched):
            reason = "new"
        elif view.matched[chosen] == max(view.matched):
            reason = "cached there"
        else:
            reason = "cached on a busy one"
        return Choice(chosen, reason, {"matched_tokens": view.matched[chosen], "in_flight": in_flight[chosen]})


def test_histories() -> None:
    from preble.sched.testing import check_policy

    check_policy(BoundedAffinity, max_examples=12)


def test_no_replica_is_far_ahead_of_the_idlest() -> None:
    """A rule that only this policy has, checked at each decision in such histories."""
    from hypothesis import settings
    from hypothesis.stateful import run_state_machine_as_test

    from preble.sched import Explanation, Placement, Waiting
    from preble.sched.testing import SchedulerMachine

    class Machine(SchedulerMachine):
        def new_policy(self) -> Policy:
            return BoundedAffinity(slack=1)

        def decided(self, before: Explanation, answer: Placement | Waiting) -> None:
            if isinstance(answer, Placement):
                in_flight = {one.replica: one.in_flight for one in before.candidates if one.state == "up"}
                assert in_flight[answer.replica] <= min(in_flight.values()) + 1

    run_state_machine_as_test(Machine, settings=settings(max_examples=12, deadline=None))


async def serve(model: str, policy: str | Policy, questions: int) -> None:
    """The same questions, whatever the policy."""
    handbooks = [Handbook.generate(seed, facts=60) for seed in range(4)]
    asked = [(handbook, question) for handbook in handbooks for question in islice(handbook.questions(1), questions)]
    random.Random(0).shuffle(asked)
    async with preble.Cluster(model, replicas=2, policy=policy) as cluster:
        prompts = [handbook.prompt(question) for handbook, question in asked]
        outputs = await cluster.generate_many(prompts, max_tokens=16, temperature=0)
        stats = cluster.stats()
    right = sum(question.is_answered_by(output.text) for (_, question), output in zip(asked, outputs, strict=True))
    print(f"{stats.policy}: {right} of {len(asked)} right, hit rate {stats.hit_rate:.0%}, {stats.placements}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint folder, a hub id, or demo")
    parser.add_argument("--questions", type=int, default=12, help="about each handbook (%(default)s)")
    options = parser.parse_args()
    for policy in (BoundedAffinity(), "round-robin"):
        asyncio.run(serve(options.model, policy, options.questions))
