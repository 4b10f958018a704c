"""Serve prompts that share long prefixes on several replicas, and show what the scheduler did with them.

Streams one answer, then asks the same questions about a few shared handbooks twice, all at once each time: once placed
by the policy, once in turn (round-robin). With the built-in model the answers are word salad; the work is real.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from preble.cli.burst import Burst, legend, policy_table, replica_table, verdict
from preble.cli.handbooks import HANDBOOKS, questions
from preble.cli.options import add_cluster_arguments, cluster_options, positive_integer
from preble.cli.word_wrap import WordWrap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from rich.console import Console

    from preble.cluster import Cluster

BASELINE = "round-robin"
GUIDE = "You are a guide to the island. Tell me about the old house by the river.\nAnswer:"
FILE_WIDTH = 120
"""Columns when the output is not a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--requests", type=positive_integer, default=48, metavar="N", help="questions asked (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=positive_integer, default=24, metavar="N", help="tokens per answer (default: %(default)s)"
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="also write settings and results to this file")
    add_cluster_arguments(parser, model="demo", replicas=2)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    anyio.run(_demo, args, console)
    return 0


def _writable(text: str) -> Path:
    """An argument type: a file that can be written when the work is done."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: it must be a file in an existing folder")
    return path


async def _demo(args: argparse.Namespace, console: Console) -> None:
    prompts = questions(args.requests)
    console.print(
        f"[bold]Preble[/]: {len(prompts)} questions about {HANDBOOKS} handbooks, each with its handbook in the prompt"
    )
    bursts: list[Burst] = []
    for policy in dict.fromkeys((args.policy, BASELINE)):
        async with _serving(args, policy, console) as cluster:
            # The second cluster answers it as well, unseen, so that both start the burst equally warm.
            await _answer_one(cluster, args, console if policy == args.policy else None)
            bursts.append(await _burst(cluster, policy, prompts, args.max_tokens, console))
        console.print(replica_table(bursts[-1]))
        for line in legend(bursts[-1]):
            console.print(f"[dim]{line}[/]")
    console.print(f"\n[bold]The same {len(prompts)} questions, placed differently[/] (times: mean / longest)")
    console.print(policy_table(bursts))
    console.print("[dim]cached: prompt tokens whose KV was there; pages: KV pages kept in the cache[/]")
    if len(bursts) == 2:
        console.print("\n" + verdict(*bursts))
    else:
        console.print(f"\nThis was {BASELINE} alone; run it with --policy e2 to compare.")
    if args.json is not None:
        settings = {
            "model": args.model,
            "requests": args.requests,
            "max_tokens": args.max_tokens,
            **cluster_options(args),
        }
        results = {"settings": settings, "policies": {burst.policy: burst.as_json() for burst in bursts}}
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"Results written to {args.json}")


@asynccontextmanager
async def _serving(args: argparse.Namespace, policy: str, console: Console) -> AsyncIterator[Cluster]:
    """A cluster with this policy; says how long the start took."""
    from preble import Cluster

    engines = "1 replica" if args.replicas == 1 else f"{args.replicas} replicas"
    console.print(f"\n[bold]Starting {engines} of {args.model}, requests placed by {policy}[/] …")
    began = time.perf_counter()
    async with Cluster(args.model, **{**cluster_options(args), "policy": policy}) as cluster:
        console.print(f"ready after {time.perf_counter() - began:.1f} s")
        yield cluster


async def _answer_one(cluster: Cluster, args: argparse.Namespace, console: Console | None) -> None:
    """One answer, printed as it comes to `console`."""
    async with cluster.stream(GUIDE, max_tokens=args.max_tokens, temperature=0.7, seed=1) as stream:
        if console is None:
            await stream.finish()
            return
        salad = " (the built-in model speaks word salad)" if args.model == "demo" else ""
        console.print(f"\n[bold]One answer, streamed[/]{salad}\n{GUIDE}", end="")
        out = WordWrap(console.file, column=len(GUIDE.rpartition("\n")[2]))
        async for chunk in stream:
            out.write(chunk.text)
        timing = stream.output.timing
    console.print(f"\n[dim]first token after {timing.ttft * 1000:.0f} ms, then one each {timing.tpot * 1000:.1f} ms[/]")


async def _burst(cluster: Cluster, policy: str, prompts: list[str], max_tokens: int, console: Console) -> Burst:
    """All questions at once."""
    console.print(f"\n[bold]Asking {len(prompts)} questions at once, placed by {policy}[/] …")
    before, began = cluster.stats(), time.perf_counter()
    outputs = await cluster.generate_many(
        prompts, progress=True, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
    )
    return Burst.of(policy, outputs, before, cluster.stats(), time.perf_counter() - began)
