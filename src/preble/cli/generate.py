"""Continue a prompt and print the text as it comes.

The prompt is an argument or standard input. Usage and timing go to standard error.
"""

from __future__ import annotations

import argparse
import sys

import anyio

from preble.cli.options import add_cluster_arguments, add_sampling_arguments, cluster_options, sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("prompt", nargs="?", help="the text to continue (default: standard input)")
    add_cluster_arguments(parser)
    add_sampling_arguments(parser, max_tokens=128)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    anyio.run(_generate, args, prompt)
    return 0


async def _generate(args: argparse.Namespace, prompt: str) -> None:
    from preble import Cluster

    async with (
        Cluster(args.model, **cluster_options(args)) as cluster,
        cluster.stream(prompt, **sampling_options(args)) as stream,
    ):
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
        output = stream.output
    print()
    print(
        f"[{output.usage.prompt_tokens} prompt tokens, {output.usage.completion_tokens} generated "
        f"({output.finish_reason}), first after {output.timing.ttft:.2f} s, "
        f"{output.timing.tpot * 1000:.0f} ms each after that]",
        file=sys.stderr,
    )
