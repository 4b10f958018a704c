"""On what terms a request is served: everything about it but its prompt and its sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from preble.errors import InvalidRequest
from preble.prompts import check_name


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
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise InvalidRequest(f"priority must be an integer, not {self.priority!r}")
        check_name("namespace", self.namespace)
        for name, value in (("request_id", self.request_id), ("session", self.session)):
            if value is not None:
                check_name(name, value)
                if not value:
                    raise InvalidRequest(f"{name} must be a non-empty string, or left out")
        timeout = self.timeout
        if timeout is not None and (
            isinstance(timeout, bool)
            or not isinstance(timeout, (int, float))
            or not math.isfinite(timeout)
            or timeout <= 0
        ):
            raise InvalidRequest(f"timeout must be a positive number of seconds, not {timeout!r}")
        expected = self.expected_tokens
        if expected is not None and (isinstance(expected, bool) or not isinstance(expected, int) or expected < 1):
            raise InvalidRequest(f"expected_tokens must be a positive integer, not {expected!r}")
