"""Looking up what the user named."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from preble.errors import InvalidRequest

T = TypeVar("T")


def by_name(argument: str, name: object, known: Mapping[str, T], instead: str = "") -> T:
    """`known[name]`.

    Args:
        argument: how the caller's argument is called.
        name: its value.
        known: what has a name.
        instead: what else the argument may be.

    Raises:
        InvalidRequest: nothing has that name; the message lists what does, and the nearest.
    """
    if isinstance(name, str):
        if name in known:
            return known[name]
        close = difflib.get_close_matches(name, known, n=1)
    else:
        close = []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if isinstance(name, type):
        hint = f"; that is a class: make an object of it, {name.__name__}()"
    either = f", or {instead}" if instead else ""
    raise InvalidRequest(f"{argument} must be one of {', '.join(sorted(known))}{either}, not {name!r}{hint}")
