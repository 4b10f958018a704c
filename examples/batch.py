"""A batch job: prompts from a file of JSON lines, answers to another, in bounded memory, and it can be interrupted.

    python examples/batch.py prompts.jsonl answers.jsonl
    python examples/batch.py prompts.jsonl answers.jsonl --model path/to/model --at-once 256

A line is `{"prompt": "…", "options": {"max_tokens": 8}}`, with options of `Cluster.generate` if there are any; other
fields are copied to its answer. Answers come in the order in which they are ready, as `{"text": "…", "finish_reason":
"stop", "line": 7}`, or `{"error": "…", "line": 7}` for a line that cannot be served. Ctrl-C, a crash or a full disk
lose nothing that was written: the same command again goes on with the lines that have no answer yet. To try failed
lines again, delete theirs from the answers.

In memory are the prompts in flight (`--at-once` of them) and the numbers of the lines that are done.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import preble


def finished(answers: Path) -> set[int]:
    """The numbers of the lines that have an answer. What a crash left of the last one is cut off."""
    numbers = set()
    answers.touch()
    with answers.open("rb+") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
            numbers.add(msgspec.json.decode(line)["line"])
    return numbers


async def answer(cluster: preble.Cluster, line: bytes, max_tokens: int) -> dict[str, Any]:
    """What to write for a line. An error that is the line's own is its answer; any other one ends the job."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        return {"error": f"not a JSON object: {error}"}
    prompt, options = fields.pop("prompt", None), fields.pop("options", {})
    if prompt is None or not isinstance(options, dict):
        return {**fields, "error": "no prompt, or options that are no object"}
    try:
        output = await cluster.generate(prompt, **{"max_tokens": max_tokens, "temperature": 0, **options})
    except (preble.InvalidRequest, preble.RequestFailed, preble.RequestTimeout) as error:
        return {**fields, "error": str(error)}
    return {**fields, "text": output.text, "finish_reason": output.finish_reason}


class Report:
    """A progress bar on standard error; where that is no terminal, a line for each twentieth of the work."""

    def __init__(self, done: int, total: int) -> None:
        self.done, self.total, self.failed = done, total, 0
        self.console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("lines", total=total, completed=done)

    def advance(self, *, failed: bool) -> None:
        self.done += 1
        self.failed += failed
        self.bar.advance(self.task)
        if not self.console.is_terminal and self.done * 20 // self.total > (self.done - 1) * 20 // self.total:
            print(f"{self.done} of {self.total} lines", file=sys.stderr, flush=True)


async def run(options: argparse.Namespace) -> None:
    """Answer all lines that have no answer yet."""
    done = finished(options.answers)
    with options.prompts.open("rb") as source:
        report = Report(len(done), sum(1 for _ in source))
    if report.done < report.total:
        async with preble.Cluster(options.model, replicas=options.replicas) as cluster:
            with options.prompts.open("rb") as source, options.answers.open("ab") as sink, report.bar:
                todo = ((number, line) for number, line in enumerate(source, start=1) if number not in done)

                async def work() -> None:
                    for number, line in todo:  # all workers take from the same lines
                        result = await answer(cluster, line, options.max_tokens)
                        sink.write(msgspec.json.encode({**result, "line": number}) + b"\n")
                        sink.flush()
                        report.advance(failed="error" in result)

                async with asyncio.TaskGroup() as group:
                    for _ in range(options.at_once):
                        group.create_task(work())
    new = report.done - len(done)
    print(f"{new} lines answered, {report.failed} of them with an error; {len(done)} were done before")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a file of JSON lines, each with a prompt")
    parser.add_argument("answers", type=Path, help="the file to write, or to go on with")
    parser.add_argument("--model", default="demo", help="a checkpoint folder, a hub id, or demo")
    parser.add_argument("--replicas", type=int, help="engines; one per device by default")
    parser.add_argument("--at-once", type=int, default=64, help="lines in flight (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="per answer, at most (%(default)s)")
    options = parser.parse_args()
    try:
        asyncio.run(run(options))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
