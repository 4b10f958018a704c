"""What processes cost beside threads: ratios within a round, and their medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from preble.bench.workers.messages import Costs
from preble.bench.workers.rounds import Measured, Workers

if TYPE_CHECKING:
    from rich.table import Table

LEAST_THROUGHPUT = 0.95
"""Of processes, to that of threads."""
MOST_STEP = 1e-3
"""Seconds that a step of a process may take longer."""
BLOCKED = 10e-3
"""Seconds of processor time that a turn of the event loop may take."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both kinds of workers on one model. Each round is compared within itself; figures are medians over rounds."""

    model: str
    rounds: dict[Workers, list[Measured]]
    messages: Costs

    @property
    def throughput(self) -> float:
        """That of processes, to that of threads."""
        return self._median(lambda threads, processes: processes.throughput / threads.throughput)

    @property
    def step(self) -> float:
        """Seconds by which a step of a process takes longer; negative where it is faster."""
        return self._median(lambda threads, processes: processes.step - threads.step)

    @property
    def ttft(self) -> float:
        """The time to the first token on processes, to that on threads."""
        return self._median(lambda threads, processes: processes.ttft / threads.ttft)

    @property
    def longest_turn(self) -> float:
        """Of the event loop, in seconds of processor time, in any round."""
        return max(one.longest_turn for measured in self.rounds.values() for one in measured)

    @property
    def verdicts(self) -> list[tuple[str, float, float, bool]]:
        """What was measured, its value, the goal, and whether it is met."""
        return [
            ("throughput, processes / threads", self.throughput, LEAST_THROUGHPUT, self.throughput >= LEAST_THROUGHPUT),
            ("a step of a process takes longer by, s", self.step, MOST_STEP, self.step <= MOST_STEP),
            ("longest turn of the event loop, s", self.longest_turn, BLOCKED, self.longest_turn < BLOCKED),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "rounds": {workers: [asdict(one) for one in measured] for workers, measured in self.rounds.items()},
            "message_seconds": self.messages,
            "ratios": {"throughput": self.throughput, "ttft": self.ttft},
            "goals": [
                {"measure": name, "value": value, "goal": goal, "met": met} for name, value, goal, met in self.verdicts
            ],
        }

    def _median(self, compare: Callable[[Measured, Measured], float]) -> float:
        pairs = zip(self.rounds["thread"], self.rounds["process"], strict=True)
        return statistics.median(compare(threads, processes) for threads, processes in pairs)


def table(comparison: Comparison) -> Table:
    """Both side by side: medians over the rounds, from the lowest to the highest."""
    from rich.table import Table

    view = Table(title=f"{comparison.model}: medians over rounds (lowest to highest)")
    for title in ("workers", "tokens/s", "step, ms", "first token, ms", "loop per token, µs", "longest turn, ms"):
        view.add_column(title, justify="left" if title == "workers" else "right", no_wrap=True)
    for workers, measured in comparison.rounds.items():
        view.add_row(
            workers,
            _spread([one.throughput for one in measured], 1),
            _spread([one.step * 1e3 for one in measured], 2),
            _spread([one.ttft * 1e3 for one in measured], 1),
            _spread([one.loop * 1e6 for one in measured], 0),
            _spread([one.longest_turn * 1e3 for one in measured], 1),
        )
    return view


def verdicts(comparison: Comparison) -> Table:
    """The goals, and what messages cost."""
    from rich.table import Table

    view = Table()
    for title in ("", "measured", "goal", "met"):
        view.add_column(title, justify="right" if title in ("measured", "goal") else "left")
    for name, value, goal, met in comparison.verdicts:
        view.add_row(name, f"{value:.5g}", f"{goal:g}", "[green]yes" if met else "[red]no")
    view.add_row("first token, processes / threads", f"{comparison.ttft:.3f}", "", "")
    for name, seconds in comparison.messages.items():
        view.add_row(f"{name}, s", f"{seconds:.2g}", "", "")
    return view


def _spread(values: Sequence[float], digits: int) -> str:
    middle, lowest, highest = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({lowest:.{digits}f} to {highest:.{digits}f})"
