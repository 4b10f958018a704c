"""Continue a prompt and print the text as it comes.

The prompt is an argument or standard input, of which a final newline is dropped. Usage and timing go to standard error.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import anyio

from preble.cli.options import (
    add_cluster_arguments,
    add_sampling_arguments,
    cluster_options,
    not_text,
    note,
    sampling_params,
)
from preble.cli.word_wrap import WordWrap
from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from preble.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("prompt", nargs="?", help="the text to continue (default: standard input)")
    add_cluster_arguments(parser)
    add_sampling_arguments(parser, max_tokens=128)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    params = sampling_params(args)
    prompt = args.prompt if args.prompt is not None else _read_prompt()
    if not prompt:
        raise InvalidRequest("the prompt is empty: give it as an argument or on standard input")
    anyio.run(_generate, args, prompt, params)
    return 0


def _read_prompt() -> str:
    if sys.stdin.isatty():
        note("reading the prompt from the terminal; Ctrl-D on a line of its own ends it")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise not_text(error) from None


async def _generate(args: argparse.Namespace, prompt: str, params: SamplingParams) -> None:
    from preble import Cluster

    async with (
        Cluster(args.model, **cluster_options(args)) as cluster,
        cluster.stream(prompt, sampling=params) as stream,
    ):
        out = WordWrap(sys.stdout)
        async for chunk in stream:
            out.write(chunk.text)
        output = stream.output
    print(flush=True)
    note(
        f"[{output.usage.prompt_tokens} prompt tokens, {output.usage.completion_tokens} generated "
        f"({output.finish_reason}), first after {output.timing.ttft:.2f} s, "
        f"{output.timing.tpot * 1000:.0f} ms each after that]"
    )
