"""Who stands where after a tournament."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from preble.bench.sim.comparison import FIGURES, TOLERANCE, Array, Latencies, Ratio, mean_ratio, ratios_in_setting
from preble.bench.sim.entry import Entry
from preble.bench.sim.job import Job, Row
from preble.bench.sim.setting import Setting
from preble.bench.sim.tournament import Tournament
from preble.errors import InvalidRequest

GOALS = np.array([1.25, 1.10, 1.15, 1.10])
"""How much better than each rival the reference is meant to be, by figure."""


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """One setting, over all its seeds."""

    setting: Setting
    """That of the first seed."""
    rate: float
    figures: dict[str, Array]
    """Entry -> [4] seconds, as in `FIGURES`. Those that lost requests are not here."""
    bound: Array | None
    """[4] seconds that nobody is below, if that is known."""
    ratios: dict[str, Ratio]
    """Rival -> what it has of what the reference has."""
    hit_rates: dict[str, float]
    lost: dict[str, int]
    """Entry -> requests that it did not complete, if there are any."""

    def winner(self, figure: int) -> str:
        """Who has the least."""
        return min(self.figures, key=lambda name: float(self.figures[name][figure]))


@dataclass(frozen=True, slots=True, eq=False)
class Standings:
    """All settings that were run, and what they say together."""

    reference: str
    rivals: list[str]
    contests: list[Contest]
    missing: int
    """Runs that have not been made."""

    def mean(self, rival: str, contests: Sequence[Contest] | None = None) -> Ratio | None:
        """Of a rival to the reference, over the settings that both completed."""
        ratios = [one.ratios[rival].value for one in contests or self.contests if rival in one.ratios]
        return mean_ratio(ratios) if ratios else None

    def above_bound(self, entry: str) -> Array | None:
        """[4]: an entry's seconds to the bound's, the geometric mean over the settings that have one."""
        ratios = [
            np.log(one.figures[entry] / one.bound)
            for one in self.contests
            if one.bound is not None and entry in one.figures
        ]
        if not ratios:
            return None
        mean: Array = np.exp(np.mean(ratios, axis=0))
        return mean

    def losses(self, rival: str, figure: int) -> list[Contest]:
        """Where the reference loses to a rival, beyond the interval; the worst first."""
        lost = [one for one in self.contests if rival in one.ratios and one.ratios[rival].high[figure] < 1 / TOLERANCE]
        return sorted(lost, key=lambda one: float(one.ratios[rival].value[figure]))

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return {
            "reference": self.reference,
            "figures": list(FIGURES),
            "goals": GOALS.tolist(),
            "missing_runs": self.missing,
            "rivals": {rival: None if (mean := self.mean(rival)) is None else _ratio(mean) for rival in self.rivals},
            "above_bound": {
                name: None if (above := self.above_bound(name)) is None else above.tolist()
                for name in (self.reference, *self.rivals)
            },
            "settings": [
                {
                    "name": one.setting.name,
                    **one.setting.to_dict(),
                    "requests_per_second": one.rate,
                    "seconds": {name: figures.tolist() for name, figures in one.figures.items()},
                    "bound": None if one.bound is None else one.bound.tolist(),
                    "ratios": {name: _ratio(ratio) for name, ratio in one.ratios.items()},
                    "hit_rates": one.hit_rates,
                    "lost": one.lost,
                }
                for one in self.contests
            ],
        }


def standings(tournament: Tournament, reference: Entry) -> Standings:
    """What the runs made so far say. A setting counts when all its seeds have been run by the reference.

    Raises:
        InvalidRequest: the reference has completed no setting.
    """
    contests, missing = [], 0
    seeds: dict[Setting, list[Setting]] = {}
    for setting in tournament.settings:
        seeds.setdefault(replace(setting, seed=0), []).append(setting)
    for alike in seeds.values():
        rates = [tournament.rate(setting) for setting in alike]

        def rows_of(entry: Entry | None, alike: list[Setting] = alike, rates: list[float] = rates) -> list[Row] | None:
            found = [
                tournament.results.get(Job(setting, entry, rate)) for setting, rate in zip(alike, rates, strict=True)
            ]
            return [row for row in found if row is not None] if None not in found else None

        rows = {entry.name: found for entry in tournament.entries if (found := rows_of(entry)) is not None}
        missing += len(alike) * (len(tournament.entries) - len(rows))
        if reference.name in rows:
            contest = _contest(alike[0], rates[0], rows, rows_of(None), reference.name)
            if reference.name in contest.figures:
                contests.append(contest)
    if not contests:
        raise InvalidRequest(f"{tournament.results.path}: {reference.name} has completed no setting of this grid")
    rivals = [entry.name for entry in tournament.entries if entry.name != reference.name]
    return Standings(reference.name, rivals, contests, missing)


def _contest(
    setting: Setting, rate: float, rows: dict[str, list[Row]], bounds: list[Row] | None, reference: str
) -> Contest:
    lost, latencies, hit_rates = {}, {}, {}
    for name, found in rows.items():
        figures = [row["figures"] for row in found]
        gone = sum(one["requests"] - one["refused"] - one["completed"] for one in figures)
        if gone:
            lost[name] = gone
        else:
            latencies[name] = Latencies.of(found)
            cached, prompts = (sum(one[key] for one in figures) for key in ("cached_tokens", "prompt_tokens"))
            hit_rates[name] = cached / prompts
    rivals = {name: one for name, one in latencies.items() if name != reference}
    return Contest(
        setting,
        rate,
        {name: one.figures for name, one in latencies.items()},
        _bound(bounds),
        ratios_in_setting(rivals, latencies[reference]) if reference in latencies else {},
        hit_rates,
        lost,
    )


def _bound(rows: list[Row] | None) -> Array | None:
    """Of all seeds together: the mean of the means; a p99 of all is at least the least p99 of one."""
    if not rows or any(row["bound"] is None for row in rows):
        return None
    means = {name: [row["bound"][name] for row in rows] for name in rows[0]["bound"]}
    return np.array(
        [
            np.mean(means["ttft_mean"]),
            min(means["ttft_p99"]),
            np.mean(means["e2e_mean"]),
            min(means["e2e_p99"]),
        ]
    )


def _ratio(ratio: Ratio) -> dict[str, list[float]]:
    return {"ratio": ratio.value.tolist(), "low": ratio.low.tolist(), "high": ratio.high.tolist()}
