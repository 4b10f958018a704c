"""A progress bar for jobs that a person may be watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, amount: int = 1) -> None:
        """By `amount` items, or bytes."""


@contextmanager
def progress_bar(total: int, *, shown: bool, label: str = "prompts", in_bytes: bool = False) -> Iterator[Advance]:
    """Gives a function to call once per finished item, or with the number of bytes done where `total` is `in_bytes`.

    Draws on standard error, and only on a terminal.
    """

    def nothing(amount: int = 1) -> None: ...

    if not shown:
        yield nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield nothing
        return
    done = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total)

        def advance(amount: int = 1) -> None:
            bar.advance(task, amount)

        yield advance
