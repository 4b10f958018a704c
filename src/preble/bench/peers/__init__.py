"""Engines to measure, each in a process of its own that speaks one JSON line per request and answer."""
