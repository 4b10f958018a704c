"""Results of the GPU benchmark as plain text and plain values."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from preble.bench.gpu.predictions import Prediction, predictions

Results = Mapping[str, Mapping[str, Any]]
"""Part -> what its file holds."""
PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn")
MOST_WRONG = 30
"""Failed checks that are listed."""
HEADER = ("figure", "predicted", "measured (lowest to highest)", "goal", "met")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a prediction with its outcome, either of which may be missing."""

    key: str
    unit: str
    predicted: float | None
    goal: str
    measured: float | None
    spread: tuple[float, float] | None
    met: bool | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """As text."""
        measured = "not measured" if self.measured is None else f"{_number(self.measured)} {self.unit}"
        if self.spread is not None:
            measured += f" ({_number(self.spread[0])} to {_number(self.spread[1])})"
        predicted = "" if self.predicted is None else f"{_number(self.predicted)} {self.unit}"
        return self.key, predicted, measured, self.goal, {True: "yes", False: "NO", None: ""}[self.met]


def rows(results: Results, *, meaningless: bool = False) -> list[Row]:
    """Every prediction beside what was measured, then what was measured without one, or what means nothing."""
    figures = {figure["key"]: figure for result in results.values() for figure in result["figures"]}
    lines = [_row(one, None if meaningless else figures.pop(one.key, None)) for one in predictions()]
    for figure in figures.values():
        lines.append(Row(figure["key"], figure["unit"], None, "", figure["value"], _spread(figure), None))
    return lines


def _row(prediction: Prediction, figure: Mapping[str, Any] | None) -> Row:
    goal = ""
    if prediction.goal is not None:
        goal = f"{'<=' if prediction.at_most else '>='} {_number(prediction.goal)} {prediction.unit}"
    if figure is None:
        return Row(prediction.key, prediction.unit, prediction.value, goal, None, None, None)
    # Without the ceilings a figure has another unit than its prediction, and cannot be judged.
    same = figure["unit"] == prediction.unit
    met = prediction.met(figure["value"]) if same else None
    return Row(
        prediction.key,
        figure["unit"],
        prediction.value if same else None,
        goal,
        figure["value"],
        _spread(figure),
        met,
    )


def _spread(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    spread = figure["spread"]
    return None if spread is None else (spread[0], spread[1])


def checks(results: Results) -> dict[str, Any]:
    """How many were made, which failed, and how near the limit the worst of the others came."""
    made = [check for result in results.values() for check in result["checks"]]
    failed = [check for check in made if not check["passed"]]
    near = [check for check in made if check["passed"] and check["limit"] > 0]
    return {
        "made": len(made),
        "failed": failed,
        "nearest": max(near, key=lambda check: float(check["error"] / check["limit"]), default=None),
    }


def table(lines: Sequence[Row], results: Results, *, meaningless: bool) -> str:
    """All that matters, for a terminal of any kind."""
    text = [_aligned([HEADER, *(line.cells() for line in lines)])]
    made = checks(results)
    text.append(f"checks: {made['made'] - len(made['failed'])} of {made['made']} passed")
    if (nearest := made["nearest"]) is not None:
        text.append(f"nearest to its limit: {nearest['name']}: {nearest['error']:.2g} of {nearest['limit']:g}")
    for check in made["failed"][:MOST_WRONG]:
        text.append(f"WRONG {check['name']}: {check.get('reason') or format(check['error'], '.3g')}")
    for name, result in results.items():
        text.append(f"{name}: {result['state']}, {result['seconds']:.0f} s")
        text += [f"    {reason}" for reason in result["errors"]]
    if meaningless:
        text.append("DRY RUN on the CPU at toy sizes: the figures mean nothing")
    return "\n".join(text)


def predictions_table() -> str:
    """What is expected and why, before anything is measured."""
    return _aligned([("figure", "predicted", "goal"), *((line.key, line.cells()[1], line.goal) for line in rows({}))])


def machine(dry_run: bool) -> dict[str, Any]:
    """Where the figures were taken."""
    facts: dict[str, Any] = {"system": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if not dry_run:
        import torch

        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
