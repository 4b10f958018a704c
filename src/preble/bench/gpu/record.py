"""What a part of the benchmark found out, kept in a file from the first figure on."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preble.bench.gpu.place import Times

TRACE_LINES = 30
"""Of a failed part's traceback."""


class Record:
    """Figures and checks of one task, written to its file whenever there is something new.

    Args:
        name: of the task.
        path: the file; its folder exists.
        say: takes a line of progress.
        ceilings: what was measured of the device in the same run.
    """

    def __init__(
        self, name: str, path: Path, say: Callable[[str], object], ceilings: Mapping[str, float] | None = None
    ) -> None:
        self.ceilings = ceilings or {}
        self._path = path
        self._say = say
        self._began = time.monotonic()
        self._content: dict[str, Any] = {
            "part": name,
            "state": "running",
            "seconds": 0.0,
            "figures": [],
            "checks": [],
            "notes": {},
        }
        self.save()

    def ceiling(self, key: str) -> float | None:
        """A measured ceiling, or None where it is not known."""
        return self.ceilings.get(key)

    def say(self, line: str) -> None:
        """Report progress."""
        self._say(line)

    def note(self, name: str, value: object) -> None:
        """Keep a setting or an observation: plain values."""
        self._content["notes"][name] = value
        self.save()

    def figure(
        self, key: str, value: float, unit: str, *, spread: tuple[float, float] | None = None, **more: Any
    ) -> None:
        """Keep a number under the name that predictions know it by; `spread` is the lowest and the highest of many.

        It takes the place of an earlier one of that name.
        """
        figures = self._content["figures"]
        figures[:] = [figure for figure in figures if figure["key"] != key]
        figures.append({"key": key, "value": value, "unit": unit, "spread": spread, **more})
        self.save()
        between = "" if spread is None else f" ({spread[0]:.4g} to {spread[1]:.4g})"
        self.say(f"{key}: {value:.4g} {unit}{between}")

    def rate(self, key: str, amount: float, times: Times, unit: str, **more: Any) -> float:
        """Keep `amount` per second, in `unit`; returns its median."""
        spread = (amount / times.high, amount / times.low)
        self.figure(key, amount / times.median, unit, spread=spread, seconds=times.median, **more)
        return amount / times.median

    def check(self, name: str, error: float, limit: float, **more: Any) -> None:
        """Keep how wrong something is. NaN is wrong."""
        passed = error <= limit
        self._content["checks"].append({"name": name, "error": error, "limit": limit, "passed": passed, **more})
        self.save()
        if not passed:
            self.say(f"WRONG {name}: {error:.3g} > {limit:.3g} {more or ''}")

    def failed_check(self, name: str, error: BaseException) -> None:
        """Keep that something could not be checked: it counts as wrong."""
        self.check(name, float("inf"), 0.0, reason=_reason(error))

    def end(self, error: BaseException | None = None) -> None:
        """Close the record."""
        self._content["state"] = "done" if error is None else "failed"
        if error is not None:
            self._content["error"] = _reason(error)
            self._content["traceback"] = traceback.format_exception(error)[-TRACE_LINES:]
        self.save()

    def save(self) -> None:
        """Write the file anew; whoever reads it never sees half of it."""
        self._content["seconds"] = time.monotonic() - self._began
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(new, self._path)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
