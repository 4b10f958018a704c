"""Everything that was set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preble.sim.html import Table
from preble.sim.outcome import Outcome


def settings_table(runs: Mapping[str, Outcome]) -> Table:
    """A row per setting. Where runs differ, it says whose the values are."""
    settings = {label: _settings(run) for label, run in runs.items()}
    first = next(iter(settings.values()))
    rows = []
    for name, value in first.items():
        values = {label: one[name] for label, one in settings.items()}
        differ = any(other != value for other in values.values())
        text = ", ".join(f"{label}: {_text(one)}" for label, one in values.items()) if differ else _text(value)
        rows.append((name, text))
    return Table((), rows, left=2)


def _settings(run: Outcome) -> dict[str, Any]:
    failures = [
        f"{one.replica}@{one.at:g}" + (f"+{one.seconds:g}" if one.seconds < float("inf") else "")
        for one in run.settings.failures
    ]
    return {
        "trace": run.trace,
        "requests": run.requests,
        "requests per second": run.rate,
        **run.settings.to_dict(),
        "failures": failures,
        "slo": str(run.slo),
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(_text(one) for one in value) or "none"
    return value or "none"
