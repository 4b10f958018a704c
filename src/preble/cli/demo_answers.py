"""The demo's first part: a handbook, and a few questions about it whose answers are shown as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preble.cli.demo_workload import Task
from preble.cli.graded_answer import GradedAnswer
from preble.demo.handbook import lookup, two_facts
from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console

    from preble.cli.demo_workload import Workload
    from preble.cluster import Cluster
    from preble.demo import Fact, Handbook, Question
    from preble.stream import Stream

SAMPLING: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "stop": "\n"}
"""How answers are generated: the likeliest token each time, one line at most. The built-in model's end by themselves,
after a dozen tokens at most; another model may go on."""


async def answer_samples(
    cluster: Cluster, workload: Workload, console: Console | None, *, graded: bool
) -> list[GradedAnswer]:
    """Ask the sample questions one after another, and the first of them again as a chat where the model has a template.

    Args:
        cluster: who answers.
        workload: what is asked.
        console: shows the answers as they come; nothing does where `None`.
        graded: whether to say what is right.
    """
    handbook = workload.sample
    if console is not None:
        _show_handbook(handbook, workload.samples, console)
    answers = []
    for question in workload.samples:
        stream = cluster.stream(handbook.prompt(question), **SAMPLING)
        answers.append(await _answer(stream, Task(0, handbook, question), console, graded=graded))
    if console is not None:
        console.print("\n[bold]The last question once more, as a chat:[/] the handbook is the system's message\n")
    try:
        stream = cluster.stream_chat(handbook.messages(question), **SAMPLING)
        answers.append(await _answer(stream, Task(0, handbook, question), console, graded=graded))
    except InvalidRequest as error:
        if console is not None:
            console.print(f"  not possible: {error}", markup=False)
    return answers


async def _answer(stream: Stream, task: Task, console: Console | None, *, graded: bool) -> GradedAnswer:
    async with stream:
        if console is not None:
            console.print(f"  Q: {task.question.text}\n  A:", end="", markup=False)
        async for chunk in stream:
            if console is not None:
                # An untrained model may say anything, control characters too.
                text = "".join(letter if letter.isprintable() else "\ufffd" for letter in chunk.text)
                console.print(text, end="", markup=False, soft_wrap=True)
    answer = GradedAnswer.of(task, stream.output, graded=graded)
    if console is not None:
        usage = answer.output.usage
        console.print(
            f"  {_mark(answer)}[dim]TTFT {answer.output.timing.ttft * 1000:.0f} ms, "
            f"{usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens cached[/]",
            soft_wrap=True,
        )
    return answer


def _mark(answer: GradedAnswer) -> str:
    question = answer.task.question
    if answer.right is None:
        return ""
    if not answer.right:
        return f"[red]wrong, it is {question.answer}[/]  "
    return f"[green]right[/]{', it is not listed' if question.kind == 'absent' else ''}  "


def _show_handbook(handbook: Handbook, questions: tuple[Question, ...], console: Console) -> None:
    """Its title and the facts that the answers need."""
    wanted = [fact for question in questions for fact in facts_behind(question, handbook)]
    title, *lines = handbook.text.splitlines()
    console.print(f"\n[bold]A handbook of {len(lines)} facts, shortened, and questions about it[/]\n\n  {title}")
    left_out = 0
    for fact, line in zip(handbook.facts, lines, strict=True):
        if fact in wanted:
            _show_gap(left_out, console)
            console.print(f"  {line}", markup=False)
            left_out = 0
        else:
            left_out += 1
    _show_gap(left_out, console)


def _show_gap(facts: int, console: Console) -> None:
    if facts:
        console.print(f"  [dim]… {facts} more[/]")


def facts_behind(question: Question, handbook: Handbook) -> list[Fact]:
    """The facts of a handbook that answer a question: one, two, or none where it is about what is not there."""
    for first in handbook.facts:
        if lookup(first) == question:
            return [first]
        for second in handbook.facts:
            if second.subject == first.value and two_facts(first, second) == question:
                return [first, second]
    return []
