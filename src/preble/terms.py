"""On what terms a request is served: everything about it but its prompt and its sampling."""

from __future__ import annotations

from dataclasses import dataclass

from preble.errors import InvalidRequest, shown
from preble.prompts import check_name
from preble.sampling import MAX_TOKENS

LONGEST_TIMEOUT = 1e9
"""Seconds: thirty years. Event loops refuse to wait much longer."""
_HIGHEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Terms:
    """Arguments that all ways to make a request share; checked when they are put together.

    Raises:
        InvalidRequest: one of them is out of its range; the message names it.
    """

    priority: int = 0
    timeout: float | None = None
    namespace: str = ""
    request_id: str | None = None
    session: str | None = None
    expected_tokens: int | None = None

    def __post_init__(self) -> None:
        if not _is_integer(self.priority) or not -_HIGHEST <= self.priority <= _HIGHEST:
            raise InvalidRequest(f"priority must be an integer of at most 63 bits, not {shown(self.priority)}")
        check_name("namespace", self.namespace)
        for name, value in (("request_id", self.request_id), ("session", self.session)):
            if value is not None:
                check_name(name, value)
                if not value:
                    raise InvalidRequest(f"{name} must be a non-empty string, or left out")
        timeout = self.timeout
        # A comparison, since an integer may be too large for a float.
        if timeout is not None and not (
            (_is_integer(timeout) or isinstance(timeout, float)) and 0 < timeout <= LONGEST_TIMEOUT
        ):
            raise InvalidRequest(f"timeout must be a positive number of seconds, not {shown(timeout)}")
        expected = self.expected_tokens
        if expected is not None and not (_is_integer(expected) and 1 <= expected <= MAX_TOKENS):
            raise InvalidRequest(f"expected_tokens must be a positive integer, not {shown(expected)}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
