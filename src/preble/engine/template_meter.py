"""How much a chat template may still do: every operation of a rendering is charged here before it happens.

A checkpoint's chat template is a program by somebody unknown, over data by somebody else. Nothing here looks at a
clock: the same template and messages always end the same way. One unit is roughly what the interpreter does in a tenth
of a microsecond, and stands for one value looked at or for 16 characters read or written.
"""

from __future__ import annotations

import threading
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from contextlib import contextmanager
from typing import Any

from jinja2.utils import Namespace

MAX_DEPTH = 100
"""Levels of lists and mappings inside one another. Comparing, hashing and printing all recurse over them in C."""
MAX_BITS = 4096
"""Of a whole number: multiplying and printing longer ones costs more than their length."""
MAX_INPUT = 4_000_000
"""Units that messages, tools and variables may weigh together: 64 million characters, say."""
BASE_UNITS = 2_000_000
UNITS_PER_INPUT = 100
"""A rendering may do `BASE_UNITS`, and this much for each unit that its input weighs: published templates need far
less than a tenth of it, whatever the conversation."""
BASE_OUTPUT = 4_000_000
OUTPUT_PER_INPUT = 128
"""Characters of output, and how many more for each unit of input: eight times the text put in."""

_SHIFT = 4
"""16 characters make a unit."""
_PLAIN = (float, bool, type(None))


class TemplateTooCostly(Exception):
    """A template wants more work or memory than its input justifies."""


class Meter:
    """What one rendering may still do."""

    __slots__ = ("left", "output")

    def __init__(self, left: int = BASE_UNITS, output: int = BASE_OUTPUT) -> None:
        self.left = left
        """Units."""
        self.output = output
        """Characters that the text may have."""

    @classmethod
    def for_input(cls, *values: object) -> Meter:
        """The meter of a rendering of these values; raises `TemplateTooCostly` when they are too large or deep."""
        units = sum(weigh(value, MAX_INPUT) for value in values)
        return cls(BASE_UNITS + UNITS_PER_INPUT * units, BASE_OUTPUT + OUTPUT_PER_INPUT * units)

    def charge(self, units: int) -> None:
        """Take units away; `TemplateTooCostly` when there are not that many left."""
        self.left -= units
        if self.left < 0:
            raise TemplateTooCostly("it does more work than the length of the conversation justifies")


class _Current(threading.local):
    meter: Meter | None = None


_current = _Current()


def current() -> Meter:
    """The meter of the rendering in this thread."""
    meter = _current.meter
    if meter is None:
        raise RuntimeError("chat templates are rendered by preble.engine.chat_template only")
    return meter


@contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    """Charge what this thread renders to `meter`."""
    before, _current.meter = _current.meter, meter
    try:
        yield meter
    finally:
        _current.meter = before


def characters(count: int) -> int:
    """The units of that many characters."""
    return 1 + (count >> _SHIFT)


def charge(*values: object) -> None:
    """Charge for looking through all of `values`, with everything inside them."""
    meter = current()
    for value in values:
        # Most often it is nothing or a word: the call is dearer than the look.
        if value:
            meter.charge(weigh(value, meter.left))


def charge_made(value: object) -> None:
    """Charge for a new value whose parts were there before."""
    if isinstance(value, str):
        current().charge(1 + (len(value) >> _SHIFT))
    elif isinstance(value, list | tuple | dict | range):
        current().charge(len(value))
    elif isinstance(value, int):
        check_integer(value)


def check_integer(value: int) -> None:
    """Refuse a whole number of more than `MAX_BITS`."""
    if value.bit_length() > MAX_BITS:
        raise TemplateTooCostly(f"it makes a whole number of more than {MAX_BITS} bits")


def weigh(value: object, limit: int) -> int:
    """The units of everything in `value`, a part that appears twice counted twice, as recursive code meets it.

    Raises `TemplateTooCostly` when it is more than `limit`, or deeper than `MAX_DEPTH`.
    """
    if type(value) is str:
        return 1 + (len(value) >> _SHIFT)
    if type(value) in _PLAIN:
        return 1
    total = 0
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                total += len(item) >> _SHIFT
            elif isinstance(item, int):
                check_integer(item)
            elif not isinstance(item, _PLAIN):
                below += _parts(item)
                total += 2
                if len(below) > limit:
                    break
        total += len(level)
        if total + len(below) > limit:
            raise TemplateTooCostly(f"a value holds more than {limit} others, counted as often as they appear")
        if not below:
            return total
        level = below
    raise TemplateTooCostly(f"a value is nested more than {MAX_DEPTH} levels deep")


def _parts(value: Any) -> Sequence[object]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        return list(object.__getattribute__(value, "_Namespace__attrs").values())
    if isinstance(value, range):
        return ()  # compared and hashed by its ends; whoever walks over one is charged for its length
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, KeysView | ValuesView | ItemsView | Set):
        return [*value]
    return ()
