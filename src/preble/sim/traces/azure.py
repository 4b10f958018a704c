"""The traces of LLM inference on Azure: CSV of times and lengths.

Published at github.com/Azure/AzurePublicDataset with "Splitwise" (ISCA '24; the files of 2023), "DynamoLLM" (HPCA '25;
the week of 2024) and "ModServe" (SoCC '25; with images, which are not counted here). Times are like
`2023-11-16 18:17:03.9799600` or `2024-05-10 00:00:00.009930+00:00`; digits past the microsecond are dropped. What
prompts share is not recorded.
"""

from __future__ import annotations

from datetime import UTC, datetime

from preble.sim.traces.assembly import Record, separate_trace
from preble.sim.traces.fields import csv_rows, integer
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, TraceFormat

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _read(lines: Lines, _: ReadingOptions) -> FileTrace:
    records: list[Record] = []
    began: datetime | None = None
    for row in csv_rows(lines, COLUMNS):
        when = _time(lines, row["TIMESTAMP"])
        # Counted from the file's first time: since 1970, a float would not hold the microseconds.
        began = began or when
        records.append(
            Record(
                time=(when - began).total_seconds(),
                prompt_tokens=integer(lines, "ContextTokens", row["ContextTokens"], least=1),
                output_tokens=integer(lines, "GeneratedTokens", row["GeneratedTokens"], least=0),
            )
        )
    return separate_trace(lines, FORMAT.name, records)


def _time(lines: Lines, text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise lines.error(f"TIMESTAMP is {text!r}, expected a time like 2024-05-10 00:00:00.009930+00:00") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


FORMAT = TraceFormat(
    name="azure",
    example=",".join(COLUMNS),
    is_json=False,
    recognises=lambda names: names >= set(COLUMNS),
    read=_read,
)
