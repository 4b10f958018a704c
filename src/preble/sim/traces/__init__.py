"""Trace files: the public formats and people's own prompts, read into a `Trace`, and written in one schema."""

from preble.sim.traces.file_trace import FileTrace
from preble.sim.traces.reading import FORMATS, read_trace
from preble.sim.traces.trace_format import TraceFormat
from preble.sim.traces.writing import write_trace

__all__ = ["FORMATS", "FileTrace", "TraceFormat", "read_trace", "write_trace"]
