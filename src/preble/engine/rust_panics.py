"""Panics of libraries written in Rust as errors: what those raise is a `BaseException` and would end a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def panics_as(error: Callable[[str], Exception]) -> Iterator[None]:
    """Raise `error(what the panic said)` for a panic of tokenizers or safetensors inside."""
    try:
        yield
    except Exception:
        raise
    except BaseException as panic:
        # Each library has a class of its own by this name, which it does not export.
        if type(panic).__name__ != "PanicException":
            raise
        raise error(str(panic)) from panic
