"""The traces of BurstGPT: CSV of times and lengths.

Published with "BurstGPT" (KDD '25, arXiv 2401.17644) at github.com/HPMLL/BurstGPT. Its first two files have six
columns; the third has `Session ID` and `Elapsed time` between them, so columns go by name. Times are in seconds. A
failed request has 0 response tokens, and often 0 request tokens: requests with either are left out, and counted. Only
conversations have a session; where their elapsed time is known, think times follow from it. What prompts share is not
recorded.
"""

from __future__ import annotations

from preble.sim.traces.assembly import Record, separate_trace
from preble.sim.traces.fields import csv_rows, integer, seconds
from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.lines import Lines
from preble.sim.traces.trace_format import ReadingOptions, TraceFormat

NEEDED = ("Timestamp", "Request tokens", "Response tokens")


def _read(lines: Lines, _: ReadingOptions) -> FileTrace:
    records = []
    left_out = 0
    ended: dict[str, float] = {}
    for row in csv_rows(lines, NEEDED):
        prompt = integer(lines, "Request tokens", row["Request tokens"], least=0)
        output = integer(lines, "Response tokens", row["Response tokens"], least=0)
        if prompt == 0 or output == 0:
            left_out += 1
            continue
        time = seconds(lines, "Timestamp", row["Timestamp"])
        session = row.get("Session ID", "").strip() or None
        think = 0.0
        if session is not None and (elapsed := row.get("Elapsed time", "").strip()):
            think = max(0.0, time - ended.get(session, time))
            ended[session] = time + seconds(lines, "Elapsed time", elapsed, least=0)
        records.append(Record(time, prompt, output, session=session, think=think))
    return separate_trace(lines, FORMAT.name, records, left_out)


FORMAT = TraceFormat(
    name="burstgpt",
    example="Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    is_json=False,
    recognises=lambda names: names >= set(NEEDED),
    read=_read,
)
