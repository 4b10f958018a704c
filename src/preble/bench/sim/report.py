"""The report of a tournament: sections that become a page of HTML, or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from preble.bench.sim.comparison import FIGURES, LEVEL, TOLERANCE, Ratio
from preble.bench.sim.standings import GOALS, Contest, Standings
from preble.sim.html import Cell, Section, Table

WORST = 5
"""So many losses are listed per rival and figure."""


def sections(standings: Standings, *, about: str) -> list[Section]:
    """All of the report; `about` says what was run."""
    return [
        Section("What was run", about),
        _overall(standings),
        _losses(standings),
        _winners(standings),
        _bound(standings),
        *_settings(standings),
    ]


def markdown(title: str, parts: Sequence[Section]) -> str:
    """The same as text."""
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", f"## {part.title}", "", part.text]
        for table in part.tables:
            lines += ["", *_rows(table)]
            if table.caption:
                lines += ["", table.caption]
    return "\n".join(lines) + "\n"


def _rows(table: Table) -> list[str]:
    rule = [":--" if column < table.left else "--:" for column in range(len(table.header))]
    rows = [table.header, rule, *table.rows]
    return ["| " + " | ".join(cell.text if isinstance(cell, Cell) else cell for cell in row) + " |" for row in rows]


def _overall(standings: Standings) -> Section:
    rows, ranges = [], []
    for rival in standings.rivals:
        mean = standings.mean(rival)
        if mean is None:
            rows.append([rival, *["not run"] * len(FIGURES), ""])
            continue
        single = np.stack([one.ratios[rival].value for one in standings.contests if rival in one.ratios])
        lows, highs = single.min(axis=0), single.max(axis=0)
        ranges.append([rival, *[f"{low:.2f} to {high:.2f}" for low, high in zip(lows, highs, strict=True)]])
        met = all(mean.value >= GOALS)
        rows.append([rival, *[_with_interval(mean, at) for at in range(len(FIGURES))], "yes" if met else "no"])
    goals = ", ".join(f"{figure} {goal:.2f}" for figure, goal in zip(FIGURES, GOALS, strict=True))
    return Section(
        f"Everybody against {standings.reference}",
        f"Seconds of the rival divided by those of {standings.reference}: above 1, {standings.reference} is better. "
        f"Geometric means over {len(standings.contests)} settings, with {LEVEL:.0%} intervals of a bootstrap over "
        f"settings. The goals are {goals}."
        + (f" {standings.missing} runs have not been made." if standings.missing else ""),
        [
            Table(["rival", *FIGURES, "goals met"], rows),
            Table(["rival", *FIGURES], ranges, "The ratios of single settings, from the lowest to the highest."),
        ],
    )


def _losses(standings: Standings) -> Section:
    counts, worst = [], []
    for rival in standings.rivals:
        lost = [standings.losses(rival, at) for at in range(len(FIGURES))]
        total = sum(rival in one.ratios for one in standings.contests)
        counts.append([rival, *[f"{len(one)} of {total}" for one in lost]])
        worst += [
            [rival, FIGURES[at], contest.setting.name, _with_interval(contest.ratios[rival], at)]
            for at, contests in enumerate(lost)
            for contest in contests[:WORST]
        ]
    tables = [Table(["rival", *FIGURES], counts)]
    if worst:
        tables.append(Table(["rival", "figure", "setting", "ratio"], worst, left=3))
    return Section(
        f"Where {standings.reference} loses",
        f"Settings in which the rival is better by more than {TOLERANCE:g}x beyond the {LEVEL:.0%} interval, "
        "which comes from a bootstrap over blocks of consecutive requests, the same for both. Below, the worst "
        f"{WORST} of each.",
        tables,
    )


def _winners(standings: Standings) -> Section:
    """By each property of settings, who has the least."""

    def by(title: str, key: Callable[[Contest], str]) -> Table:
        groups: dict[str, list[Contest]] = {}
        for contest in standings.contests:
            groups.setdefault(key(contest), []).append(contest)
        return Table(
            [title, *FIGURES],
            [[name, *[_tally(contests, at) for at in range(len(FIGURES))]] for name, contests in groups.items()],
        )

    return Section(
        "Who wins where",
        "Each setting has one winner per figure, however close it is; so many settings each of them won.",
        [
            by("requests", lambda one: one.setting.source.name),
            by("load", lambda one: f"{one.setting.load:g}"),
            by("replicas", lambda one: str(one.setting.replicas)),
            by("cost model", lambda one: one.setting.cost),
            by("condition", lambda one: one.setting.condition),
        ],
    )


def _tally(contests: Sequence[Contest], figure: int) -> str:
    wins: dict[str, int] = {}
    for contest in contests:
        winner = contest.winner(figure)
        wins[winner] = wins.get(winner, 0) + 1
    ordered = sorted(wins.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {count}" for name, count in ordered[:3]) + (", …" if len(ordered) > 3 else "")


def _bound(standings: Standings) -> Section:
    rows = []
    for name in (standings.reference, *standings.rivals):
        above = standings.above_bound(name)
        if above is not None:
            rows.append([name, *[f"{one:.2f}" for one in above]])
    return Section(
        "Distance to the lower bound",
        "Seconds divided by those that no policy can be below, geometric means over settings. The bound has a cache "
        "without end that all replicas share, and work that can be divided at will: it may be out of reach.",
        [Table(["entry", *FIGURES], rows)],
    )


def _settings(standings: Standings) -> list[Section]:
    names = [standings.reference, *standings.rivals]

    def seconds(contest: Contest, name: str, at: int) -> str | Cell:
        if name in contest.lost:
            return f"lost {contest.lost[name]}"
        if name not in contest.figures:
            return ""
        return Cell(_seconds(float(contest.figures[name][at])), best=contest.winner(at) == name)

    tables = []
    for at, figure in enumerate(FIGURES):
        rows: list[list[str | Cell]] = [
            [
                contest.setting.name,
                f"{contest.rate:.3g}",
                *[seconds(contest, name, at) for name in names],
                "" if contest.bound is None else _seconds(float(contest.bound[at])),
            ]
            for contest in standings.contests
        ]
        tables.append(Table(["setting", "requests/s", *names, "bound"], rows, f"{figure}, seconds"))
    hits: list[list[str | Cell]] = [
        [
            contest.setting.name,
            *[f"{contest.hit_rates[name]:.1%}" if name in contest.hit_rates else "" for name in names],
        ]
        for contest in standings.contests
    ]
    return [
        Section("Every setting", "", tables),
        Section("Hit rates", "Cached part of the prompt tokens.", [Table(["setting", *names], hits)]),
    ]


def _with_interval(ratio: Ratio, at: int) -> str:
    return f"{ratio.value[at]:.2f} ({ratio.low[at]:.2f}-{ratio.high[at]:.2f})"


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
