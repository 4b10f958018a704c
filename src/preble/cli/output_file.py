"""Files that a command writes when its work is done: whether it can is known before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from preble.errors import InvalidRequest


def require_writable(*outputs: Path | None, inputs: Sequence[Path] = ()) -> None:
    """Check the files that are to be written; call it before the work. Missing folders are made.

    Args:
        outputs: The files; `None` where none is asked for.
        inputs: Files that are read and must not be overwritten.

    Raises:
        InvalidRequest: one cannot be written, is an input, or is named twice.
    """
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken:
            raise InvalidRequest(f"{path} would be overwritten: give the output a name of its own")
        taken.add(path.resolve())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            exists = path.exists()
            with path.open("a"):
                pass
            if not exists:
                path.unlink()
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None
