"""The tables that compare policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from preble.sim.html import Cell, Table
from preble.sim.outcome import Outcome

NOTHING = "-"
TIMES = "\N{MULTIPLICATION SIGN}"


def seconds(value: float) -> str:
    """Four digits, down to a tenth of a millisecond."""
    digits = 3 - floor(log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def share(value: float) -> str:
    return f"{value:.1%}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def decimals(value: float) -> str:
    return f"{value:,.3f}"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of each policy."""

    title: str
    path: tuple[str, ...]
    """Where it is in `Outcome.to_dict`."""
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = min
    """Picks the best one; `None` where neither less nor more is better."""


def _distribution(name: str, path: str) -> list[Column]:
    return [Column(f"{name} {figure}", (path, figure), seconds) for figure in ("mean", "p50", "p90", "p99")]


WORK = [
    Column("completed", ("completed",), count, max),
    Column("hit rate", ("hit_rate",), share, max),
    Column("goodput /s", ("goodput",), decimals, max),
    Column("imbalance", ("imbalance",), decimals),
    Column("utilization", ("utilization",), share, None),
    Column("evicted tokens", ("evicted_tokens",), count),
    Column("recomputed tokens", ("recomputed_tokens",), count),
    Column("preemptions", ("preemptions",), count),
    Column("decisions /s", ("decisions_per_second",), count, max),
]
FIRST_TOKEN = [*_distribution("TTFT", "ttft"), *_distribution("queueing", "queueing")]
WHOLE = [*_distribution("e2e", "e2e"), *_distribution("TPOT", "tpot")]


def policy_tables(runs: Mapping[str, Outcome]) -> list[Table]:
    """What was done, how long the first token took, how long everything did."""
    slo = ", ".join(dict.fromkeys(str(run.slo) for run in runs.values()))
    about_work = (
        f"Goodput: requests per second that kept the SLO ({slo or 'no bounds'}). Imbalance: busy time of the busiest "
        "replica over the mean. Utilization: busy share of the replicas' time. Recomputed: prompt tokens that some "
        "replica had computed before. Decisions: per real second of the global scheduler."
    )
    first = "TTFT: from arrival to the first token. Queueing: until a replica begins to compute the request."
    whole = "e2e: from arrival to the last token. TPOT: per token after the first."
    return [_table(runs, FIRST_TOKEN, first), _table(runs, WHOLE, whole), _table(runs, WORK, about_work)]


def _table(runs: Mapping[str, Outcome], columns: Sequence[Column], caption: str) -> Table:
    figures = [run.to_dict() | {"decisions_per_second": run.decisions_per_second} for run in runs.values()]
    cells = [_cells(column, [_figure(one, column.path) for one in figures]) for column in columns]
    rows = [[label, *row] for label, row in zip(runs, zip(*cells, strict=True), strict=True)]
    return Table(["policy", *(column.title for column in columns)], rows, caption=caption)


def _figure(figures: dict[str, Any], path: Sequence[str]) -> float | None:
    found: Any = figures
    for key in path:
        found = found[key]
    return found  # type: ignore[no-any-return]  # JSON has no types


def _cells(column: Column, values: Sequence[float | None]) -> list[Cell]:
    known = [value for value in values if value is not None]
    first = values[0]
    marked = column.best(known) if column.best and len(set(known)) > 1 else None
    return [
        Cell(
            NOTHING if value is None else column.show(value),
            f"{TIMES}{value / first:.2f}" if first and value is not None and value != first else "",
            best=value is not None and value == marked,
        )
        for value in values
    ]
