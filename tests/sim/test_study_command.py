"""`preble study` from end to end: what it prints and writes, and what it says about a newcomer's mistakes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preble.cli import main
from preble.demo import CHECKPOINT
from preble.engine.tokenizer import Tokenizer
from preble.sim import html

Lines = Callable[..., Path]


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Writes JSON lines into a file of a name."""

    def write(*rows: object, name: str = "mine.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def documents(count: int = 40) -> list[dict[str, object]]:
    """Questions on two documents of 90 tokens behind a system prompt of 30."""
    return [
        {
            "tokens": [*range(30), *[100 + n % 2] * 90, 1000 + n],
            "t": 0.5 * n,
            "output_tokens": 5 + n,
            "session": str(n % 4),
        }
        for n in range(count)
    ]


def test_the_terminal_shows_every_table(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(lines(*documents()))]) == 0
    shown, notes = capsys.readouterr()
    assert notes == ""
    assert shown.splitlines()[0] == "mine: 40 requests of 4 sessions in 19.5 s"
    rows = {
        "prompt tokens": "121 121 121 121 121 121",
        "output tokens": "24.5 24 40 42 44 44",
        "requests per second": "2",
        "prompt tokens shared with another request": f"{120 / 121:.1%}",
        "ideal hit rate": f"{(40 * 120 - 210) / (40 * 121):.1%}",
        "distinct prompt tokens": "250",
        "key portions": "2",
        "prompt tokens in the key portion": f"{90 / 121:.1%}",
        "tokens per key portion": "90.0 90 90 90 90 90",
        "requests per key portion": "20.0 20 20 20 20 20",
    }
    for name, values in rows.items():
        assert re.search(rf"^{name} +{' +'.join(map(re.escape, values.split()))}$", shown, re.MULTILINE), name
    assert re.search(r"^ +30 +90 +20 +37\.2% +1$", shown, re.MULTILINE), "the first document is the hottest"
    sizes = dict(re.findall(r"^ +(\d+) +[\d.]+% +(all distinct tokens|\d+% of the ideal|)$", shown, re.MULTILINE))
    assert {"10", "20", "50", "100", "200"} <= {size for size, note in sizes.items() if not note}
    assert sizes["250"] == "all distinct tokens"
    assert {"50% of the ideal", "90% of the ideal", "99% of the ideal"} <= set(sizes.values())
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_what_nobody_shares_is_said(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(lines({"tokens": [1, 2]}, {"tokens": [3]}))]) == 0
    shown = capsys.readouterr().out
    assert "No two prompts share a block" in shown
    assert "cache, tokens" not in shown
    assert main(["study", str(lines({"text": "once"}))]) == 0
    assert capsys.readouterr().out.startswith("mine: 1 request\n")


def test_the_json_has_every_number_and_setting(lines: Lines, tmp_path: Path) -> None:
    trace, out = lines(*documents()), tmp_path / "made" / "study.json"
    assert main(["study", str(trace), "--requests", "30", "--format", "prompts", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["settings"] == {"file": str(trace), "format": "prompts", "tokenizer": None, "requests": 30}
    assert document["file"] == {"left_out": 0, "without_output": 0}
    assert list(document) == [
        "settings",
        "file",
        "trace",
        "requests",
        "sessions",
        "arrivals",
        "prompt_tokens",
        "output_tokens",
        "prompt_output_ratio",
        "sharing",
        "cache",
    ]
    assert document["requests"] == 30
    assert document["sharing"]["key_portions"]["count"] == 2


def test_the_same_trace_gives_the_same_files(lines: Lines, tmp_path: Path) -> None:
    trace = lines(*documents())
    written = []
    for number in range(2):
        outs = [tmp_path / f"{number}.json", tmp_path / f"{number}.html"]
        arguments = ["study", str(trace), "--json", str(outs[0]), "--html", str(outs[1])]
        if number:
            assert main(arguments) == 0
        else:  # in an interpreter of its own, where hashes differ
            subprocess.run([sys.executable, "-m", "preble", *arguments], check=True, capture_output=True)
        written.append([out.read_bytes() for out in outs])
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "rows",
    [
        documents(),
        documents(1),
        [{"tokens": [1, 2, 3], "t": 5.0}] * 3,
        [{"tokens": [n + 1] * 3} for n in range(3)],
        [{"tokens": [1, *[2] * n]} for n in (1, 10, 10**2, 10**3, 10**4, 10**5)],
    ],
    ids=["usual", "one request", "all at once", "nothing shared", "lengths of five decades"],
)
def test_the_page_shows_plots_and_tables_and_loads_nothing(
    rows: list[dict[str, object]], lines: Lines, tmp_path: Path
) -> None:
    out = tmp_path / "study.html"
    assert main(["study", str(lines(*rows, name="<mine>.jsonl")), "--html", str(out)]) == 0
    page = out.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<h1>&lt;mine&gt;</h1>" in page
    titles = ["Prompt tokens", "Output tokens", "Arrivals", "Requests per key portion"]
    if "No two prompts share a block" not in page:
        titles.append("Hit rate by cache size")
        assert "hottest" in page
    assert re.findall(r"<figcaption><strong>(.+)\.</strong>", page) == titles
    assert page.count("<svg ") == len(titles)
    assert not re.search(r"<script|<link|<img|@import|src=", page)
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_texts_are_bytes_unless_a_tokenizer_is_given(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, texts = tmp_path / "study.json", ("badge of Rania Blake: 9074", "badge of Rania Blake: 9075")
    first, second = map(Tokenizer(CHECKPOINT).encode, texts)
    same = int(np.argmin(first == second))
    assert 5 < same < len(first) == len(second) < len(texts[0])
    trace = lines(*({"text": text} for text in texts))
    totals = []
    for options in ([], ["--tokenizer", str(CHECKPOINT)]):
        assert main(["study", str(trace), "--json", str(out), *options]) == 0
        document = json.loads(out.read_text())
        totals.append((document["prompt_tokens"]["total"], document["sharing"]["distinct_tokens"]))
        assert document["settings"]["tokenizer"] == (str(CHECKPOINT) if options else None)
    assert totals[0] == (2 * 26, 26 + 1), "the last byte differs"
    assert totals[1] == (2 * len(first), 2 * len(first) - same)


def test_a_compressed_file_of_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blocks.jsonl.gz"
    rows = [{"t": n, "in": 20, "out": 3, "block": 16, "blocks": [0, n + 1]} for n in range(4)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert main(["study", str(path)]) == 0
    assert re.search(r"ideal hit rate +60\.0%", capsys.readouterr().out)


def test_requests_that_the_file_does_not_serve_are_counted(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(lines({"text": "once", "output_tokens": 0}, {"text": "twice"}))]) == 0
    assert "generated nothing and count as generating one token: 1\n" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "nonsense\n", '{"neither": 1}\n', '{"text": ""}\n'])
def test_a_file_that_is_no_trace(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["study", str(path)]) == 1
    shown, error = capsys.readouterr()
    assert shown == ""
    assert error.startswith("preble study: ")
    assert str(path) in error


def test_a_folder_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--format", "moonpie"], ["--requests", "0"], ["--requests", "few"], []])
def test_wrong_arguments(options: list[str], lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["study", *([str(lines({"text": "once"}))] if options else []), *options])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert (options[-1] if options else "FILE") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_an_output_that_cannot_be_written_fails_before_the_reading(
    option: str, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unread = str(tmp_path / "absent.jsonl")
    file = lines({"text": "once"}, name="file")
    for out in (tmp_path, file / "below"):
        assert main(["study", unread, option, str(out)]) == 1
        error = capsys.readouterr().err
        assert f"{out} cannot be written" in error
        assert "absent" not in error


def test_no_file_is_overwritten_by_mistake(lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = lines({"text": "once"})
    before = trace.read_bytes()
    assert main(["study", str(trace), "--json", str(tmp_path / "." / trace.name)]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert main(["study", str(trace), "--json", str(tmp_path / "out"), "--html", str(tmp_path / "out")]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert trace.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_study_that_fails_leaves_earlier_results_and_no_empty_files(tmp_path: Path) -> None:
    earlier, new = tmp_path / "earlier.json", tmp_path / "new.html"
    earlier.write_text("precious")
    assert main(["study", str(tmp_path / "absent.jsonl"), "--json", str(earlier), "--html", str(new)]) == 1
    assert earlier.read_text() == "precious"
    assert not new.exists()


def test_a_reader_that_stops_early_does_not_stop_the_files(lines: Lines, tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    command = [sys.executable, "-m", "preble", "study", str(lines({"text": "once"})), "--json", str(out)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b""
    assert json.loads(out.read_text())["requests"] == 1


def test_without_matplotlib_only_the_page_is_refused_and_at_once(
    lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    out = tmp_path / "study.json"
    assert main(["study", str(lines({"text": "once"})), "--json", str(out)]) == 0
    assert out.exists()
    capsys.readouterr()
    assert main(["study", str(tmp_path / "absent.jsonl"), "--html", str(tmp_path / "study.html")]) == 1
    shown, error = capsys.readouterr()
    assert "preble[report]" in error
    assert shown == ""


@pytest.mark.parametrize("written", [False, True])
def test_a_tokenizer_that_is_none(
    written: bool, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if written:
        folder.mkdir()
    assert main(["study", str(lines({"text": "once"})), "--tokenizer", str(folder)]) == 1
    error = capsys.readouterr().err
    assert str(folder) in error
    assert error.count("\n") == 1


def test_a_study_loads_nothing_heavy() -> None:
    code = (
        "import sys, preble.sim.study, preble.sim.html, preble.sim.study.report, preble.cli.study; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "matplotlib", "transformers", "jinja2", "rich"} & set(done.stdout.split())
