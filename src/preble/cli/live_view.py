"""What a cluster is doing right now: each replica's queue, pages and hit rate, and how the answers are so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from preble.cli.graded_answer import GradedAnswer, accuracy
from preble.cli.tables import table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from preble.outputs import ClusterStats, ReplicaStats

PAGES = (("█", "cyan"), ("▒", "green"), ("·", "dim"))
"""How KV pages are drawn: those of running requests, those kept in the cache, those free."""
BAR = 20
"""Width of that, in columns."""


class LiveView:
    """A burst of questions while it is answered.

    Args:
        total: how many there are.
        stats: asks the cluster, which runs where the view is drawn.
    """

    def __init__(self, total: int, stats: Callable[[], ClusterStats]) -> None:
        self._total = total
        self._stats = stats
        self._before = {one.replica: one for one in stats().replicas}
        self._answered: dict[int, int] = {}
        self._right: int | None = None

    def add(self, answer: GradedAnswer) -> None:
        """Count an answer."""
        replica = answer.output.placement.replica
        self._answered[replica] = self._answered.get(replica, 0) + 1
        if answer.right is not None:
            self._right = (self._right or 0) + answer.right

    def frame(self, seconds: float) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        stats = self._stats()
        progress = Table.grid(padding=(0, 1))
        progress.add_row(
            ProgressBar(total=self._total, completed=sum(self._answered.values()), width=BAR),
            self._progress(stats, seconds),
        )
        shown = table("replica", "queued", "running", "KV pages in use, cached, free<", "hit rate", "answered")
        for one in stats.replicas:
            shown.add_row(
                str(one.replica),
                str(one.waiting),
                str(one.running),
                _pages(one),
                self._hit_rate([one]),
                str(self._answered.get(one.replica, 0)),
            )
        return Group(progress, shown)

    def line(self, seconds: float) -> str:
        """For a log."""
        stats = self._stats()

        def each(name: str) -> str:
            return ", ".join(str(getattr(one, name)) for one in stats.replicas)

        return (
            f"  {self._progress(stats, seconds)}; queued {each('waiting')}; running {each('running')}; "
            f"pages in use {each('pages_in_use')}; cached {each('pages_cached')}"
        )

    def _progress(self, stats: ClusterStats, seconds: float) -> str:
        answered = sum(self._answered.values())
        right = "" if self._right is None else f", {accuracy(self._right, answered)} right"
        return (
            f"{seconds:.0f} s: {answered} of {self._total} answered{right}, hit rate {self._hit_rate(stats.replicas)}"
        )

    def _hit_rate(self, replicas: Sequence[ReplicaStats]) -> str:
        """Since the burst began."""
        before = [self._before[one.replica] for one in replicas if one.replica in self._before]
        prompts = sum(one.prompt_tokens for one in replicas) - sum(one.prompt_tokens for one in before)
        cached = sum(one.cached_tokens for one in replicas) - sum(one.cached_tokens for one in before)
        return f"{cached / prompts:.0%}" if prompts > 0 else "-"


def _pages(one: ReplicaStats) -> Text:
    """A bar, and the numbers."""
    from rich.text import Text

    in_use = round(BAR * one.pages_in_use / one.pages_total)
    cached = min(round(BAR * one.pages_cached / one.pages_total), BAR - in_use)
    text = Text()
    for (glyph, style), width in zip(PAGES, (in_use, cached, BAR - in_use - cached), strict=True):
        text.append(glyph * width, style=style)
    return text.append(f" {one.pages_in_use} {one.pages_cached} {one.pages_free}")
