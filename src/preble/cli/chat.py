"""Talk to a model; the history is kept, and its KV is reused from turn to turn.

Commands: /reset forgets the history, /exit (or end of input) leaves.
"""

from __future__ import annotations

import argparse
import sys

import anyio
import anyio.to_thread

from preble.cli.options import add_cluster_arguments, add_sampling_arguments, cluster_options, sampling_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--system", help="a system message to begin with")
    add_cluster_arguments(parser)
    add_sampling_arguments(parser, max_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    anyio.run(_chat, args)
    return 0


async def _chat(args: argparse.Namespace) -> None:
    from preble import Cluster, PrebleError

    start = [{"role": "system", "content": args.system}] if args.system else []
    history = list(start)
    async with Cluster(args.model, **cluster_options(args)) as cluster:
        while (line := await anyio.to_thread.run_sync(_ask, abandon_on_cancel=True)) is not None:
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                history = list(start)
                continue
            if not line:
                continue
            history.append({"role": "user", "content": line})
            try:
                async with cluster.stream_chat(history, **sampling_options(args)) as stream:
                    async for chunk in stream:
                        print(chunk.text, end="", flush=True)
                    output = stream.output
            except PrebleError as error:
                history.pop()
                print(f"preble chat: {error}", file=sys.stderr)
                continue
            history.append({"role": "assistant", "content": output.text})
            usage = output.usage
            print(
                f"\n[{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached; "
                f"{usage.completion_tokens} generated in {output.timing.total:.2f} s]",
                file=sys.stderr,
            )


def _ask() -> str | None:
    """The next line; `None` at the end of input."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
