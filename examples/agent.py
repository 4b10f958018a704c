"""An agent that calls tools: the model says which, in which order and where, Python functions do the work.

    python examples/agent.py
    python examples/agent.py --model path/to/model --replicas 2

The system message is a handbook of the tools, made from the functions below: what each takes, what it gives, and its
port. An agent knows no more than their names. To get from what it has to what is wanted it asks the model, one
question a turn, plans backwards with the answers, and then calls the function that listens on the port that the
model named: a wrong answer would call the wrong one, or none.

Every turn sends the whole conversation again. `session=` keeps a conversation on one replica where that costs nothing,
and the handbook and the earlier turns are found in the prefix cache: the last line says for how many tokens.
"""

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import preble
from preble.demo import Fact, Handbook

ORDERS = {
    "Rania Blake": {"number": "4117", "grams": 1250, "city": "Lisbon"},
    "Otto Finch": {"number": "2096", "grams": 300, "city": "Oslo"},
}
BY_NUMBER = {order["number"]: {"name": name, **order} for name, order in ORDERS.items()}


@dataclass(frozen=True)
class Tool:
    """A function, and what the handbook says of it."""

    input: str
    output: str
    port: str
    run: Callable[[str], str]


TOOLS = {
    "label_parcel": Tool("address", "text", "3170", lambda address: f"TO: {address.upper()}"),
    "parse_letter": Tool("json", "address", "8254", lambda record: "{name}, {city}".format(**json.loads(record))),
    "scan_badge": Tool("image", "number", "1948", lambda image: f"the number in {image}"),
    "find_order": Tool("name", "number", "7402", lambda name: str(ORDERS[name]["number"])),
    "load_order": Tool("number", "json", "5386", lambda number: json.dumps(BY_NUMBER[number])),
    "rank_voucher": Tool("weight", "price", "6619", lambda grams: f"{2 + int(grams) / 500:.2f}"),
    "count_parcel": Tool("json", "weight", "4035", lambda record: str(json.loads(record)["grams"])),
}
SERVICES = {tool.port: tool.run for tool in TOOLS.values()}
HANDBOOK = Handbook(
    tuple(
        Fact(attribute, name, getattr(tool, attribute))
        for attribute in ("output", "port", "input")
        for name, tool in TOOLS.items()
    )
)


@dataclass
class Agent:
    """One conversation with the model."""

    cluster: preble.Cluster
    session: str
    log: list[str] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_tokens: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=lambda: [{"role": "system", "content": HANDBOOK.text}])

    async def ask(self, question: str) -> str:
        """What the model says, in the light of what was said before. Nothing is asked twice."""
        if question not in self.answers:
            self.messages.append({"role": "user", "content": question})
            reply = await self.cluster.chat(self.messages, session=self.session, max_tokens=8, temperature=0)
            self.messages.append({"role": "assistant", "content": reply.text.strip()})
            self.answers[question] = reply.text.strip()
            self.cached_tokens += reply.usage.cached_tokens
            self.prompt_tokens += reply.usage.prompt_tokens
        return self.answers[question]

    async def plan(self, have: str, want: str, without: frozenset[str] = frozenset()) -> list[str] | None:
        """The tools that lead from one kind of value to another, in order; `None` if none do."""
        if have == want:
            return []
        for tool in sorted(TOOLS.keys() - without):
            if await self.ask(f"output of {tool}?") == want:
                before = await self.plan(have, await self.ask(f"input of {tool}?"), without | {tool})
                if before is not None:
                    return [*before, tool]
        return None

    async def work(self, name: str, want: str) -> None:
        """Find something out about a customer by name."""
        self.log.append(f"{self.session}: {want} for {name}")
        tools = await self.plan("name", want)
        if tools is None:
            self.log.append(f"  no tool leads from a name to {want}")
            return
        value = name
        for tool in tools:
            port = await self.ask(f"port of {tool}?")
            value = SERVICES[port](value)
            self.log.append(f"  {tool} on port {port}: {value}")


async def main(model: str, replicas: int | None) -> None:
    async with preble.Cluster(model, replicas=replicas) as cluster:
        agents = [Agent(cluster, f"agent {number}") for number in (1, 2, 3)]
        async with asyncio.TaskGroup() as group:
            group.create_task(agents[0].work("Rania Blake", "price"))
            group.create_task(agents[1].work("Otto Finch", "text"))
            group.create_task(agents[2].work("Otto Finch", "video"))
    for agent in agents:
        print(*agent.log, sep="\n")
    questions = sum(len(agent.answers) for agent in agents)
    cached, prompt = (sum(getattr(agent, count) for agent in agents) for count in ("cached_tokens", "prompt_tokens"))
    print(f"{questions} questions, {prompt} prompt tokens, {cached / prompt:.0%} of them cached")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint folder, a hub id, or demo")
    parser.add_argument("--replicas", type=int, help="engines; one per device by default")
    options = parser.parse_args()
    asyncio.run(main(options.model, options.replicas))
