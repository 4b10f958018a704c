"""Talk to a model; the history is kept, and its KV is reused from turn to turn.

Each line of input is a turn. Lines of their own: /reset forgets the history, /exit leaves, as do the end of input
(Ctrl-D) and Ctrl-C; while an answer comes, Ctrl-C stops only that. Answers go to standard output, all else to standard
error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING

from preble.cli.options import (
    add_cluster_arguments,
    add_sampling_arguments,
    cluster_options,
    not_text,
    note,
    sampling_params,
)
from preble.cli.word_wrap import WordWrap
from preble.errors import PrebleError

if TYPE_CHECKING:
    from preble.cluster import Cluster
    from preble.outputs import GenerationOutput
    from preble.reception import Message
    from preble.sampling import SamplingParams

PAGE_SIZE = 16
"""Turns are short: with small pages nearly all of the history is found again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_cluster_arguments(parser, page_size=PAGE_SIZE)
    add_sampling_arguments(parser, max_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return asyncio.run(_chat(args, sampling_params(args)))


async def _chat(args: argparse.Namespace, params: SamplingParams) -> int:
    from preble import Cluster

    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and history
        note(f"loading {args.model} …")
    start: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    history = list(start)
    status = 0
    async with Cluster(args.model, **cluster_options(args)) as cluster:
        if on_terminal:
            note("/reset forgets the history, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
        # asyncio's own handler would only cancel this task, which does not wake a blocking `input`.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while (line := _ask()) not in (None, "/exit", "/quit"):
            if line == "/reset":
                history = list(start)
            elif line:
                question: Message = {"role": "user", "content": line}
                try:
                    output = await _answer(cluster, [*history, question], params)
                except PrebleError as error:
                    note(f"preble chat: {error}")
                    status = 0 if on_terminal else 1
                    continue
                _report(output)
                if output.text:
                    history += [question, {"role": "assistant", "content": output.text}]
    return status


def _ask() -> str | None:
    """The next line; `None` when the user leaves.

    Blocks the event loop on purpose: no request is in flight, and a thread that waits in `input` would keep the program
    from ending until another line is typed.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal and not sys.stdout.isatty():  # the prompt does not belong into a file
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input("> " if on_terminal and sys.stdout.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if on_terminal:
            note("")
        return None
    except UnicodeDecodeError as error:
        raise not_text(error) from None


async def _answer(cluster: Cluster, messages: list[Message], params: SamplingParams) -> GenerationOutput:
    """Print the answer as it comes; Ctrl-C ends it early."""
    loop = asyncio.get_running_loop()
    out = WordWrap(sys.stdout)
    async with cluster.stream_chat(messages, sampling=params) as stream:
        loop.add_signal_handler(signal.SIGINT, stream.close)
        try:
            async for chunk in stream:
                out.write(chunk.text)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    print(flush=True)
    return stream.output


def _report(output: GenerationOutput) -> None:
    usage = output.usage
    stopped = ", stopped" if output.finish_reason == "abort" else ""
    note(
        f"[{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached; "
        f"{usage.completion_tokens} generated in {output.timing.total:.2f} s{stopped}]"
    )
