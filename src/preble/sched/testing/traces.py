"""What a scheduler still remembers."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import FunctionType, ModuleType


def leads_to(root: object, targets: Iterable[object]) -> list[str]:
    """How references lead from `root` to any of `targets`: the types on the way, for each one found. Classes, modules
    and functions are not entered, as everything can be reached through them."""
    wanted = {id(target) for target in targets}
    seen = {id(root)}
    todo = [(root, type(root).__name__)]
    found: list[str] = []
    while todo:
        holder, way = todo.pop()
        for value in gc.get_referents(holder):
            if id(value) in seen or isinstance(value, type | ModuleType | FunctionType):
                continue
            seen.add(id(value))
            there = f"{way} > {type(value).__name__}"
            if id(value) in wanted:
                found.append(there)
            todo.append((value, there))
    return found
