"""Values of a line, checked: what is wrong with one is said with the line's number."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from preble.sim.traces.lines import Lines

MISSING: Final = object()
"""Stands for a value that a line does not have."""

MOST_TOKENS = 2**31 - 1
"""A prompt's tokens are counted, and its blocks numbered, in int32."""

LATEST = 1e12
"""Seconds. Beyond that a time is in other units: the seconds since 1970 passed 1.7e9 in 2023."""


def json_object(lines: Lines, line: str) -> dict[str, object]:
    """The JSON object that a line is."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise lines.error(f"this is not JSON ({error}), expected an object like {{...}}") from None
    if not isinstance(value, dict):
        raise lines.error(f"this is {reprlib.repr(value)}, expected a JSON object like {{...}}")
    return value


def csv_rows(lines: Lines, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, by the names that its first line gives to the columns."""
    reader = csv.reader(lines, strict=True)
    try:
        columns = [name.strip() for name in next(reader)]
        for name in needed:
            if name not in columns:
                raise lines.error(f"no column is called {name!r}, expected {', '.join(needed)}")
        for row in reader:
            if len(row) != len(columns):
                raise lines.error(f"there are {len(row)} values, expected {len(columns)}: {', '.join(columns)}")
            yield dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise lines.error(f"this is not CSV: {error}") from None


def integer(lines: Lines, name: str, value: object, *, least: int) -> int:
    """A whole number from `least` to 2^31 - 1: from JSON, or digits from CSV."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = int(value)
    if type(value) is int and least <= value <= MOST_TOKENS:
        return value
    raise lines.error(f"{name} is {_shown(value)}, expected a whole number from {least} to {MOST_TOKENS}")


def seconds(lines: Lines, name: str, value: object, *, per_second: int = 1, least: float = -LATEST) -> float:
    """A time or a duration in seconds: from JSON, or digits from CSV, that count `per_second` to the second."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    # Compared before it is divided, as an int of hundreds of digits has no float. NaN compares as false.
    if type(value) in (int, float) and least * per_second <= value <= LATEST * per_second:  # type: ignore[operator]
        return float(value) / per_second  # type: ignore[arg-type]
    unit = "seconds" if per_second == 1 else "milliseconds"
    bounds = f"{least * per_second:g} to {LATEST * per_second:g}"
    raise lines.error(f"{name} is {_shown(value)}, expected {unit}, a number from {bounds}")


def integers(lines: Lines, name: str, value: object) -> NDArray[np.int64]:
    """int64 [any]: a JSON list of whole numbers."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise lines.error(f"{name} is {_shown(value)}, expected a list of whole numbers")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise lines.error(f"{name} holds a number that does not fit in 64 bits with a sign") from None


def label(lines: Lines, name: str, value: object) -> str | None:
    """What a session is called: a string or a whole number. `None` where it is null or missing."""
    if value is None or value is MISSING:
        return None
    if type(value) in (str, int):
        return str(value)
    raise lines.error(f"{name} is {_shown(value)}, expected a string or a whole number")


def _shown(value: object) -> str:
    return "missing" if value is MISSING else reprlib.repr(value)
