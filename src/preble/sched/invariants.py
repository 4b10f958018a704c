"""How `check()` methods complain: an assertion that `python -O` does not remove."""

from __future__ import annotations


def require(condition: bool, complaint: str) -> None:
    """Raise `AssertionError(complaint)` unless the condition holds."""
    if not condition:
        raise AssertionError(complaint)
