"""Ask graded questions about long shared handbooks, and show what placing them well is worth.

Streams a few answers, then asks the same questions twice, many at a time, with a live view of the replicas: once placed
by the policy, once in turn (round-robin). The built-in model was trained to answer them exactly, so each answer is
right or wrong; those of another model are not graded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from preble.cli.burst import Burst, legend, policy_table, replica_table
from preble.cli.demo_answers import SAMPLING, answer_samples
from preble.cli.demo_workload import SHORTENINGS, Workload
from preble.cli.graded_answer import GradedAnswer
from preble.cli.live_view import LiveView
from preble.cli.options import add_cluster_arguments, cluster_options, positive_integer
from preble.cli.start_view import StartView
from preble.cli.verdict import verdict
from preble.cli.watched import watched
from preble.errors import PromptTooLong

if TYPE_CHECKING:
    from rich.console import Console

    from preble.cluster import Cluster
    from preble.outputs import ClusterStats

BUILT_IN = "demo"
BASELINE = "round-robin"
KV_MEMORY = "20MiB"
"""Per replica of the built-in model: two thirds of what its handbooks fill."""
IN_FLIGHT = 8
"""Questions in flight at a time, per replica."""
FILE_WIDTH = 120
"""Columns when the output is not a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--requests", type=positive_integer, default=240, metavar="N", help="questions asked (default: %(default)s)"
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="also write settings and results to this file")
    add_cluster_arguments(
        parser,
        model=BUILT_IN,
        replicas=2,
        kv_memory=f"{KV_MEMORY} with the built-in model, so that one replica cannot keep all handbooks, else a share "
        "of what is free",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    if args.model == BUILT_IN and args.kv_memory is None:
        args.kv_memory = KV_MEMORY
    anyio.run(_demo, args, console)
    return 0


def _writable(text: str) -> Path:
    """An argument type: a file that can be written when the work is done."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: it must be a file in an existing folder")
    return path


async def _demo(args: argparse.Namespace, console: Console) -> None:
    graded = args.model == BUILT_IN
    policies = tuple(dict.fromkeys((args.policy, BASELINE)))
    workload = Workload.generate(args.requests)
    in_flight = min(IN_FLIGHT * args.replicas, args.requests)
    _introduce(args, workload, policies, in_flight, console)
    bursts: list[Burst] = []
    answers: dict[str, list[GradedAnswer]] = {}
    for policy in policies:
        is_first = policy == args.policy
        async with _started(args, policy, console) as cluster:
            if is_first:
                workload = await _fitting(cluster, args.requests, console)
            # The second cluster answers them as well, unseen, so that both start the burst equally warm.
            samples = await answer_samples(cluster, workload, console if is_first else None, graded=graded)
            if is_first:
                console.print("\n" + _room(workload, samples[0], cluster.stats(), args.page_size))
            await cluster.reset_prefix_cache()
            burst, answers[policy] = await _burst(cluster, policy, workload, in_flight, console, graded=graded)
        bursts.append(burst)
        console.print(replica_table(burst))
        for line in legend(burst):
            console.print(f"[dim]{line}[/]")
    console.print(f"\n[bold]The same {args.requests} questions, placed differently[/] (times: mean / p99)\n")
    console.print(policy_table(bursts))
    console.print("[dim]hit rate: prompt tokens found in a cache; computed: tokens that went through the model.[/]")
    console.print("[dim]Times are of this one run and of whatever else the machine did; tokens vary less.[/]")
    if not graded:
        console.print(
            "[dim]No answer is graded: unlike the built-in model, this one was not trained on such questions.[/]"
        )
    if len(bursts) == 2:
        console.print("\n" + verdict(*bursts))
    else:
        console.print(f"\nThis was {BASELINE} alone; run it with --policy e2 to compare.")
    if args.json is not None:
        args.json.write_text(json.dumps(_results(args, workload, in_flight, bursts, answers), indent=2) + "\n")
        console.print(f"Results written to {args.json}", markup=False)


def _introduce(
    args: argparse.Namespace, workload: Workload, policies: Sequence[str], in_flight: int, console: Console
) -> None:
    facts = [len(handbook.facts) for handbook in workload.handbooks]
    title = f"Preble demo: {args.requests} questions about {len(facts)} handbooks, answered by {_replicas(args)}"
    console.print(title, style="bold", markup=False)
    console.print(
        f"Each prompt is a whole handbook of {min(facts)} to {max(facts)} facts and a question about it; some "
        "handbooks are asked about more often. Where a replica still has the handbook in its KV cache, only the "
        "question is left to compute.\n"
    )
    first, *others = policies
    steps = [
        "a few answers, as they are generated",
        f"all questions, {in_flight} in flight at a time, placed by {first}",
        *(f"the same questions, placed by {policy}, and a comparison" for policy in others),
    ]
    for number, step in enumerate(steps, 1):
        console.print(f" {number}. {step}")


@asynccontextmanager
async def _started(args: argparse.Namespace, policy: str, console: Console) -> AsyncIterator[Cluster]:
    """A cluster with this policy; says how long the start took."""
    from preble import Cluster

    cluster = Cluster(args.model, **{**cluster_options(args), "policy": policy})
    what = f"Starting {_replicas(args)}, questions placed by {policy}"
    console.print(f"\n{what} …", style="bold", markup=False)
    began = time.perf_counter()
    async with AsyncExitStack() as stack:
        await watched(console, StartView(), lambda: stack.enter_async_context(cluster))
        console.print(f"ready after {time.perf_counter() - began:.1f} s")
        yield cluster


async def _fitting(cluster: Cluster, requests: int, console: Console) -> Workload:
    """The workload, its handbooks cut until the longest prompt fits.

    Raises:
        PromptTooLong: none fits.
    """
    for shortening in SHORTENINGS:
        workload = Workload.generate(requests, shortening)
        try:
            async with cluster.stream(workload.longest_prompt, **SAMPLING):
                pass  # taken, so it fits: leaving gives it up
        except PromptTooLong:
            if shortening == SHORTENINGS[-1]:
                raise
        else:
            if shortening > 1:
                console.print(f"Handbooks are cut to 1/{shortening} of their facts, as longer prompts do not fit here.")
            break
    return workload


def _room(workload: Workload, sample: GradedAnswer, stats: ClusterStats, page_size: int) -> str:
    """How the handbooks compare to the caches. Tokens are estimated from a prompt whose number is known."""
    density = sample.output.usage.prompt_tokens / len(sample.task.prompt)
    tokens = [round(len(handbook.text) * density) for handbook in workload.handbooks]
    needed = sum(count // page_size for count in tokens)
    each = min(one.pages_total for one in stats.replicas)
    together = sum(one.pages_total for one in stats.replicas)
    handbooks = (
        f"The {len(tokens)} handbooks are about {min(tokens):,} to {max(tokens):,} tokens long and fill {needed:,} KV "
        f"pages of {page_size} tokens."
    )
    if needed <= each:
        return f"{handbooks} Each replica has {each:,}: room for all of them."
    if len(stats.replicas) == 1:
        return f"{handbooks} The replica has {each:,}: too few to keep all of them."
    if needed <= together:
        return f"{handbooks} Each replica has {each:,}: too few to keep all of them, but together they can."
    return f"{handbooks} Each replica has {each:,}: too few to keep all of them, even together."


async def _burst(
    cluster: Cluster, policy: str, workload: Workload, in_flight: int, console: Console, *, graded: bool
) -> tuple[Burst, list[GradedAnswer]]:
    """All questions, so many in flight at a time."""
    console.print(f"\n[bold]Asking {len(workload.tasks)} questions, placed by {policy}[/] …")
    before, began = cluster.stats(), time.perf_counter()
    view = LiveView(len(workload.tasks), cluster.stats)
    todo = iter(enumerate(workload.tasks))
    answers: dict[int, GradedAnswer] = {}

    async def ask() -> None:
        for number, task in todo:
            output = await cluster.generate(task.prompt, **SAMPLING)
            answers[number] = GradedAnswer.of(task, output, graded=graded)
            view.add(answers[number])

    await watched(console, view, *[ask] * in_flight)
    seconds = time.perf_counter() - began
    console.print(f"answered in {seconds:.1f} s")
    in_order = [answers[number] for number in range(len(answers))]
    return Burst.of(policy, in_order, before, cluster.stats(), seconds), in_order


def _results(
    args: argparse.Namespace,
    workload: Workload,
    in_flight: int,
    bursts: Sequence[Burst],
    answers: dict[str, list[GradedAnswer]],
) -> dict[str, Any]:
    """For the file."""
    settings = {
        "model": args.model,
        "requests": args.requests,
        "in_flight": in_flight,
        "facts": [len(handbook.facts) for handbook in workload.handbooks],
        **cluster_options(args),
    }
    policies = {
        burst.policy: {**burst.as_json(), "answers": [answer.as_json() for answer in answers[burst.policy]]}
        for burst in bursts
    }
    return {"settings": settings, "policies": policies}


def _replicas(args: argparse.Namespace) -> str:
    return f"1 replica of {args.model}" if args.replicas == 1 else f"{args.replicas} replicas of {args.model}"
