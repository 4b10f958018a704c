"""Tenants on one cluster: each has prefixes of its own, a priority, and a quota of tokens to be computed.

    python examples/tenants.py
    python examples/tenants.py --model path/to/model

Three tenants ask about the same handbook. `namespace=` keeps them apart: the first request of each finds nothing in the
cache, though another tenant has just sent the same text, so `cached_tokens` tells nobody what others ask. From its
second request on a tenant finds what it sent before. `priority=` decides who is next where requests wait. The quota is
this program's: a tenant pays for the tokens that had to be computed, and is refused when it has spent its own.
"""

import argparse
import asyncio
from dataclasses import dataclass, field
from itertools import islice

import preble
from preble.demo import Handbook

HANDBOOK = Handbook.generate(seed=5, facts=60)
QUESTIONS = list(islice(HANDBOOK.questions(seed=3), 12))


class QuotaExceeded(Exception):
    """A tenant has spent its tokens."""


@dataclass
class Tenant:
    """A customer, what it may use and what it used."""

    name: str
    priority: int = 0
    quota: int = 10_000
    """Tokens that may be computed for it."""
    at_once: int = 4
    """Requests that it may have in flight. Its further ones wait here, in nobody's way."""
    computed: int = 0
    cached: list[int] = field(default_factory=list)
    """Prompt tokens found in the cache, for each request."""

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(self.at_once)

    async def generate(self, cluster: preble.Cluster, prompt: str) -> preble.GenerationOutput:
        """Raises `QuotaExceeded` if nothing is left; the request that spends the last token is still served."""
        async with self._turns:
            if self.computed >= self.quota:
                raise QuotaExceeded(f"{self.name} has spent its {self.quota} tokens")
            output = await cluster.generate(
                prompt, namespace=self.name, priority=self.priority, max_tokens=16, temperature=0
            )
        usage = output.usage
        self.computed += usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        self.cached.append(usage.cached_tokens)
        return output


async def ask_all(cluster: preble.Cluster, tenant: Tenant, served: list[str]) -> str:
    """All questions of a tenant: the first one alone, then the others together. Gives a line about them."""
    right = refused = 0

    async def ask(number: int) -> None:
        nonlocal right, refused
        question = QUESTIONS[number]
        try:
            output = await tenant.generate(cluster, HANDBOOK.prompt(question))
        except QuotaExceeded:
            refused += 1
        else:
            right += question.is_answered_by(output.text)
            served.append(tenant.name)

    await ask(0)
    async with asyncio.TaskGroup() as group:
        for number in range(1, len(QUESTIONS)):
            group.create_task(ask(number))
    first, *others = tenant.cached
    return f"{tenant.name:10} {tenant.priority:8} {right:5} {refused:7} {tenant.computed:8} {first:12} {min(others):12}"


async def main(model: str, replicas: int | None) -> None:
    tenants = [
        Tenant("batch", priority=-1, at_once=12),
        Tenant("trial", quota=600, at_once=1),
        Tenant("customer", priority=1),
    ]
    async with preble.Cluster(model, replicas=replicas, max_pending=2) as cluster:
        print("tenant     priority right refused computed cached first cached later")
        served: list[str] = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask_all(cluster, tenant, served)) for tenant in tenants]
    for task in tasks:
        print(task.result())
    print("served in this order:", *(name[0] for name in served))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint folder, a hub id, or demo")
    parser.add_argument("--replicas", type=int, help="engines; one per device by default")
    options = parser.parse_args()
    asyncio.run(main(options.model, options.replicas))
