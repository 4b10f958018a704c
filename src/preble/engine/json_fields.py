"""Typed values out of a checkpoint's JSON files, which anybody may have written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from preble.engine.folder_advice import git_pointer, is_git_pointer
from preble.errors import CheckpointError, shown

MAX_BYTES = 64 << 20
"""Of a JSON file. An index of a million tensors has that many; everything else is far smaller."""
_HUGE = 1e30
"""No number in a sensible config is larger, and up to it fp32 arithmetic does not overflow at once."""


class JsonFields:
    """An object of a JSON file. Every accessor raises `CheckpointError` naming the file and the field."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """The object in `path`; `CheckpointError` when it cannot be read or holds anything else."""
        return cls(str(path), read_json(path))

    def with_defaults(self, defaults: Mapping[str, Any]) -> JsonFields:
        """The same fields, and `defaults` for the absent ones (a field that is null is not absent)."""
        return JsonFields(self.source, {**defaults, **self.values})

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error for a field whose value is not what it has to be."""
        if name not in self.values:
            return CheckpointError(f"{self.source} has no {name!r}, which must be {wanted}")
        return CheckpointError(f"{self.source}: {name!r} is {shown(self.values[name])}, but must be {wanted}")

    def integer(self, name: str, *, high: int = 2**31 - 1) -> int:
        """A whole number from 1 to `high`."""
        value = self.values.get(name)
        if type(value) is not int or not 1 <= value <= high:
            raise self.wrong(name, f"an integer from 1 to {high}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Like `integer`, or `None` when absent or null."""
        return None if self.values.get(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """A number above 0, and not huge or NaN."""
        value = self.values.get(name)
        if not _is_positive(value):
            raise self.wrong(name, f"a number above 0 and below {_HUGE:g}")
        return value

    def token_ids(self, name: str) -> list[int]:
        """A token id or a list of them; those below 0, which stand for none, are left out."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if not all(type(token_id) is int and token_id < 2**31 for token_id in ids):
            raise self.wrong(name, "an integer or a list of integers, each below 2**31")
        return [token_id for token_id in ids if token_id >= 0]

    def numbers(self, name: str, length: int) -> list[float]:
        """A list of `length` numbers above 0."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != length or not all(_is_positive(item) for item in value):
            raise self.wrong(name, f"a list of {length} numbers above 0")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false when absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string, or `None` when absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def object(self, name: str) -> JsonFields | None:
        """A nested object, or `None` when absent, null or empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return JsonFields(f"{self.source}: {name}", value) if value else None


def read_json(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes.

    Raises `CheckpointError`, naming the file, when it is anything else: longer, no file, no object, or an object that
    names a field twice, of which every reader would be free to take another one.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise CheckpointError(f"{path} is longer than {most >> 20} MiB, which is more than such files have")
        values = json.loads(content, object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if is_git_pointer(path):
            raise CheckpointError(git_pointer(path)) from None
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"the field {shown(names.most_common(1)[0][0])} is there twice")
    return values


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _HUGE
