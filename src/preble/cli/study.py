"""Study a workload: lengths, shared prefixes, and what a prefix cache of any size would hit.

FILE is a trace in a public format (Mooncake, Qwen-Bailian, Azure LLM, BurstGPT), in blocks, or your own prompts: JSON
lines with a text or token ids, an output length and a time. It may be compressed by gzip.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from preble.cli.options import note, positive_integer
from preble.cli.output_file import require_writable
from preble.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from preble.sim.html import Table
    from preble.sim.study import Study
    from preble.sim.traces.trace_format import Tokenize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from preble.sim.traces import FORMATS

    parser.add_argument("file", type=Path, metavar="FILE", help="the trace")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        metavar="NAME",
        help="one of %(choices)s (default: told by the first line)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder of a checkpoint whose tokenizer splits texts (default: their bytes count as tokens)",
    )
    parser.add_argument(
        "--requests", type=positive_integer, metavar="N", help="study the first N requests (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every number to this file")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with plots to this file")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from preble.sim.html import require_plots
    from preble.sim.study import study
    from preble.sim.traces import read_trace

    require_writable(args.json, args.html, inputs=(args.file,))
    if args.html is not None:
        require_plots()
    tokenize = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    trace = read_trace(args.file, format=args.format, tokenize=tokenize, progress=True)
    if trace.left_out:
        note(f"requests left out because they failed when they were recorded: {trace.left_out:,}")
    if trace.without_output:
        note(f"requests that generated nothing and count as generating one token: {trace.without_output:,}")
    result = study(trace if args.requests is None else trace.first(args.requests))
    if args.json is not None:
        settings = {
            "file": str(args.file),
            "format": trace.format,
            "tokenizer": None if args.tokenizer is None else str(args.tokenizer),
            "requests": args.requests,
        }
        recorded = {"left_out": trace.left_out, "without_output": trace.without_output}
        document = {"settings": settings, "file": recorded, **result.as_json()}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.html is not None:
        from preble.sim.study.report import html_report

        args.html.write_text(html_report(result), encoding="utf-8")
    # Last, as whoever reads it may stop early: `| head` is no reason to write no file.
    _print(Console(), result)
    return 0


def _tokenizer(path: Path) -> Tokenize:
    """Of a local checkpoint.

    Raises:
        InvalidRequest: there is none.
    """
    if not path.is_dir():
        raise InvalidRequest(f"--tokenizer {path} is no folder: give a checkpoint's, with tokenizer.json in it")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # A text longer than the model's context is no reason to warn: nothing is computed from it.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"no tokenizer can be loaded from {path}: {str(error).splitlines()[0]}") from error
    return lambda text: tokenizer.encode(text)


def _print(console: Console, result: Study) -> None:
    from preble.sim.study import tables

    console.print(f"{result.name}: {tables.headline(result)}", highlight=False, markup=False, soft_wrap=True)
    sections = [
        tables.distributions(result),
        tables.overview(result),
        tables.cache_sizes(result),
        tables.hottest(result),
    ]
    for table in sections:
        if table.rows:
            console.print()
            console.print(_rich(table))
    if not result.sharing.hottest:
        console.print(f"\n{tables.NOTHING_SHARED}", highlight=False, soft_wrap=True)


def _rich(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    style = box.SIMPLE_HEAD if table.header else None
    view = RichTable(box=style, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=bool(table.header))
    for number in range(len(table.rows[0])):
        heading = table.header[number] if table.header else ""
        view.add_column(heading, justify="left" if number < table.left else "right", no_wrap=True)
    for row in table.rows:
        view.add_row(*(cell if isinstance(cell, str) else cell.text for cell in row))
    return view
