"""Results of the engine benchmark as a table and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from preble.bench.cases import Measure

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {"preble": "preble", "hf": "transformers", "llama.cpp": "llama.cpp"}


@dataclass(slots=True)
class Result:
    """One measure of one shape: tokens per second by engine, one value per round, rounds in the same order."""

    shape: str
    measure: Measure
    rates: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, peer: str) -> float:
        """How many times the peer's rate Preble's is: the median over rounds, each compared within itself."""
        pairs = zip(self.rates["preble"], self.rates[peer], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    @property
    def met(self) -> bool | None:
        """Whether every goal against a peer that ran is met; `None` without such a goal."""
        judged = [self.ratio(peer) >= goal for peer, goal in self.measure.goals.items() if peer in self.rates]
        return all(judged) if judged else None

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        peers = [peer for peer in self.rates if peer != "preble"]
        return {
            "shape": self.shape,
            "measure": self.measure.label,
            "requests": self.measure.case.requests,
            "prompt_tokens": {"shared": self.measure.case.shared, "own": self.measure.case.own},
            "new_tokens": self.measure.case.new_tokens,
            "tokens_per_second": self.rates,
            "ratios": {peer: self.ratio(peer) for peer in peers},
            "goals": dict(self.measure.goals),
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that must stay below a limit, both in seconds."""

    label: str
    seconds: float
    limit: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {"measure": self.label, "seconds": self.seconds, "limit": self.limit, "met": self.seconds < self.limit}


def table(results: Sequence[Result], limits: Sequence[Limit], peers: Sequence[str]) -> Table:
    """Everything in one table: tokens per second, median over rounds and the range."""
    from rich.table import Table

    view = Table(title="generated tokens per second: median (lowest to highest)")
    view.add_column("shape")
    view.add_column("case")
    for name in ("preble", *peers):
        view.add_column(TITLES[name], justify="right", no_wrap=True)
    for peer in peers:
        view.add_column(f"x {TITLES[peer]}", justify="right")
    view.add_column("goal")
    view.add_column("met")
    for result in results:
        view.add_row(
            result.shape,
            result.measure.label,
            *(_rates(result.rates.get(name)) for name in ("preble", *peers)),
            *(f"{result.ratio(peer):.2f}" if peer in result.rates else "-" for peer in peers),
            ", ".join(f"{goal:g}x {TITLES[peer]}" for peer, goal in result.measure.goals.items()),
            _verdict(result.met),
        )
    for limit in limits:
        view.add_row(
            "",
            limit.label,
            _seconds(limit.seconds),
            *[""] * (2 * len(peers)),
            f"< {_seconds(limit.limit)}",
            _verdict(limit.seconds < limit.limit),
        )
    return view


def machine() -> dict[str, object]:
    """Where the numbers were taken."""
    model = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else ""
    return {
        "system": platform.platform(),
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def _rates(values: list[float] | None) -> str:
    if values is None:
        return "-"
    median, lowest, highest = statistics.median(values), min(values), max(values)
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({lowest:.{digits}f} to {highest:.{digits}f})"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms"


def _verdict(met: bool | None) -> str:
    return {True: "[green]yes", False: "[red]no", None: ""}[met]
