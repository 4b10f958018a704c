"""The file of finished runs: a line of JSON for each. It may be cut off at any time, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from preble.bench.sim.job import Job, Row
from preble.errors import InvalidRequest

NAME = "runs.jsonl"


class Results:
    """Rows by key, in memory and on disk.

    Args:
        folder: where the file is; made if it does not exist.

    Raises:
        InvalidRequest: the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._rows: dict[str, Row] = {}
        self._torn = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._rows = {row["key"]: row for row in self._read()}
        except OSError as error:
            raise InvalidRequest(f"{self.path} cannot be read: {error.strerror}") from None

    def get(self, job: Job) -> Row | None:
        """What came of a job, if it has been run."""
        return self._rows.get(job.key)

    def add(self, row: Row) -> None:
        """Keep a row, at once and on disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(row) + "\n")
        self._torn = False
        self._rows[row["key"]] = row

    def _read(self) -> Iterator[Row]:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        self._torn = bool(lines[-1])
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line else {}
            except ValueError:
                row = {}  # the end of a run that was cut off while it wrote
                if number < len(lines) and not line.startswith('{"key"'):
                    raise InvalidRequest(f"{self.path}, line {number}: this is no row of a tournament") from None
            if "key" in row:
                yield row
