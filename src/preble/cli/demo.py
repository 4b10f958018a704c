"""Serve prompts that share long prefixes on several replicas, and show what the scheduler did with them.

Streams an answer, then sends the same burst of questions about a few shared handbooks twice: once placed by the policy,
once in turn (round robin). With the built-in model the answers are word salad; the work is real.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from preble.cli.options import add_cluster_arguments, cluster_options

if TYPE_CHECKING:
    from rich.console import Console

    from preble.cluster import Cluster
    from preble.outputs import ClusterStats, GenerationOutput

HANDBOOKS = 6
ENTRIES = 90
NOUNS = (
    "book city door field garden horse house island king letter map mountain paper river road school song star".split()
)
KINDS = (
    "big close cold dark early good great green high last little long new old open quick red small strong young".split()
)
PLACES = "north south east west".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--requests", type=int, default=48, help="questions in the burst (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to a file")
    add_cluster_arguments(parser, model="demo", replicas=2)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    anyio.run(_demo, args)
    return 0


def handbook(number: int) -> str:
    """A document of a few thousand words that many questions share. The same every time."""
    rng = random.Random(number)
    lines = [f"Handbook {number}. Answer from these notes alone."]
    for entry in range(ENTRIES):
        kind, noun, other = rng.choice(KINDS), rng.choice(NOUNS), rng.choice(NOUNS)
        steps, place = rng.randrange(2, 60), rng.choice(PLACES)
        lines.append(
            f"Note {entry}: the {kind} {noun} is {steps} miles {place} of the {other}, and it is open all year."
        )
    return "\n".join(lines)


def questions(count: int) -> list[str]:
    """Prompts in a random but repeatable order, popular handbooks more often than others."""
    rng = random.Random(0)
    books = [handbook(number) for number in range(HANDBOOKS)]
    popularity = [1 / (rank + 1) for rank in range(HANDBOOKS)]
    return [
        f"{rng.choices(books, popularity)[0]}\nQuestion: where is the {rng.choice(KINDS)} {rng.choice(NOUNS)}?\nAnswer:"
        for _ in range(count)
    ]


async def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from preble import Cluster

    console = Console()
    options = cluster_options(args)
    prompts = questions(args.requests)
    console.print(f"[bold]Preble[/]: {args.replicas} replicas of [cyan]{args.model}[/], policy [cyan]{args.policy}[/]")
    results: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys((args.policy, "round-robin")):
        starting = console.status(f"starting the replicas ({policy})")
        starting.start()
        async with Cluster(args.model, **{**options, "policy": policy}) as cluster:
            starting.stop()
            if policy == args.policy:
                await _stream_one(cluster, console, args.max_tokens)
            outputs = await _burst(cluster, console, policy, prompts, args.max_tokens)
            stats = cluster.stats()
        results[policy] = _summary(outputs, stats)
        _print_replicas(console, policy, outputs, stats)
    _print_policies(console, results)
    if args.json is not None:
        settings = {"model": args.model, "requests": args.requests, "max_tokens": args.max_tokens, **options}
        args.json.write_text(json.dumps({"settings": settings, "policies": results}, indent=2) + "\n")
        console.print(f"results written to {args.json}")


async def _stream_one(cluster: Cluster, console: Console, max_tokens: int) -> None:
    """One answer, printed as it comes."""
    prompt = "You are a guide to the island. Tell me about the old house by the river.\nAnswer:"
    console.print(f"\n[dim]{prompt}[/]", end="")
    async with cluster.stream(prompt, max_tokens=max_tokens, temperature=0.7, seed=1) as stream:
        async for chunk in stream:
            console.print(chunk.text, end="", highlight=False, markup=False)
        timing = stream.output.timing
    console.print(f"\n[dim]first token after {timing.ttft * 1000:.0f} ms, then one each {timing.tpot * 1000:.1f} ms[/]")


async def _burst(
    cluster: Cluster, console: Console, policy: str, prompts: list[str], max_tokens: int
) -> list[GenerationOutput]:
    """All questions at once."""
    console.print(f"\n[bold]{len(prompts)} questions about {HANDBOOKS} handbooks, all at once, policy {policy}[/]")
    outputs: list[GenerationOutput] = await cluster.generate_many(
        prompts, progress=True, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
    )
    return outputs


def _summary(outputs: list[GenerationOutput], stats: ClusterStats) -> dict[str, Any]:
    """The figures of one burst; times in seconds."""
    ttft = sorted(output.timing.ttft for output in outputs)
    total = sorted(output.timing.total for output in outputs)
    prompt_tokens = sum(output.usage.prompt_tokens for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "hit_rate": sum(output.usage.cached_tokens for output in outputs) / prompt_tokens,
        "computed_tokens": sum(replica.computed_tokens for replica in stats.replicas),
        "ttft": {"mean": statistics.fmean(ttft), "p99": ttft[int(0.99 * (len(ttft) - 1))]},
        "latency": {"mean": statistics.fmean(total), "p99": total[int(0.99 * (len(total) - 1))]},
        "requests_per_second": len(outputs) / total[-1],
        "placements": stats.placements,
    }


def _print_replicas(console: Console, policy: str, outputs: list[GenerationOutput], stats: ClusterStats) -> None:
    """What went where, and why."""
    from rich.table import Table

    table = Table(title=f"placed by {policy}", title_justify="left")
    for heading in ("replica", "requests", "why", "prompt tokens", "cached", "computed", "pages cached / total"):
        table.add_column(heading, justify="left" if heading == "why" else "right")
    for replica in stats.replicas:
        mine = [output for output in outputs if output.placement.replica == replica.replica]
        reasons: dict[str, int] = {}
        for output in mine:
            reasons[output.placement.reason] = reasons.get(output.placement.reason, 0) + 1
        table.add_row(
            str(replica.replica),
            str(len(mine)),
            ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
            f"{replica.prompt_tokens:,}",
            f"{replica.hit_rate:.0%}",
            f"{replica.computed_tokens:,}",
            f"{replica.pages_cached:,} / {replica.pages_total:,}",
        )
    console.print(table)


def _print_policies(console: Console, results: dict[str, dict[str, Any]]) -> None:
    """The policies side by side."""
    from rich.table import Table

    table = Table(title="the same questions, placed differently", title_justify="left")
    headings = (
        "policy",
        "hit rate",
        "tokens computed",
        "mean TTFT",
        "p99 TTFT",
        "mean latency",
        "p99 latency",
        "requests/s",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy, result in results.items():
        table.add_row(
            policy,
            f"{result['hit_rate']:.0%}",
            f"{result['computed_tokens']:,}",
            *(f"{result[name][part]:.2f} s" for name in ("ttft", "latency") for part in ("mean", "p99")),
            f"{result['requests_per_second']:.1f}",
        )
    console.print(table)
