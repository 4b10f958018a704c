"""What the commands show: tables that fit 80 columns, a sentence that is true either way, words that stay whole."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import termios
from contextlib import suppress

import pytest
from rich.console import Console

from preble.cli.burst import Burst, ReplicaShare, Spread, legend, policy_table, replica_table, verdict
from preble.cli.word_wrap import WordWrap


def burst(policy: str = "e2", *, computed: int = 400_000, seconds: float = 100.0, replicas: int = 2) -> Burst:
    """A long one, so that the numbers are wide."""
    shares = [
        ReplicaShare(
            replica=number,
            requests=5_000 // replicas,
            reasons={"exploit": 2_100, "explore": 300, "rebalance": 100},
            prompt_tokens=10_000_000,
            cached_tokens=10_000_000,
            computed_tokens=computed // replicas,
            pages_cached=40_000,
        )
        for number in range(replicas)
    ]
    return Burst(policy, tuple(shares), Spread(100.5, 300.25), Spread(200.5, 450.75), seconds)


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_fit_80_columns_one_line_a_row(terminal: bool) -> None:
    bursts = [burst("prefix-affinity"), burst("round-robin")]
    for table, rows in ((replica_table(burst(replicas=12)), 12), (policy_table(bursts), 2)):
        out = io.StringIO()
        Console(file=out, width=80, force_terminal=terminal, color_system=None, highlight=False).print(table)
        lines = out.getvalue().splitlines()
        assert len(lines) == 2 + rows
        assert "…" not in out.getvalue()
        assert "rebalance" in out.getvalue() or rows == 2


@pytest.mark.parametrize(
    ("ours", "seconds", "said"),
    [
        (200_000, 50.0, "e2 computed 50% fewer tokens than round-robin and answered 2.0 times as many"),
        (200_000, 200.0, "e2 computed 50% fewer tokens than round-robin but answered 0.5 times as many"),
        (600_000, 50.0, "e2 computed 50% more tokens than round-robin but answered 2.0 times as many"),
        (600_000, 200.0, "e2 computed 50% more tokens than round-robin and answered 0.5 times as many"),
        (400_000, 100.0, "e2 computed as many tokens as round-robin and answered 1.0 times as many"),
    ],
)
def test_the_verdict_follows_the_figures(ours: int, seconds: float, said: str) -> None:
    sentence = verdict(burst(computed=ours, seconds=seconds), burst("round-robin"))
    assert sentence.startswith(said)
    assert sentence.endswith("no gain this time.") == (ours >= 400_000 and seconds >= 100.0)


def test_only_reasons_that_occur_are_explained() -> None:
    assert [line.split(":")[0] for line in legend(burst())] == ["exploit", "explore", "rebalance"]
    plain = ReplicaShare(0, 1, {"round-robin": 1}, 1, 0, 1, 0)
    assert legend(Burst("round-robin", (plain,), Spread(1, 1), Spread(1, 1), 1.0)) == []


TEXT = " one two  three four five six seven\neight nine ten eleven twelve"


def everything(controller: int) -> str:
    """What was written to a terminal that is closed by now; a read gives as much of it as has come through."""
    shown = b""
    with suppress(OSError):  # at the end
        while piece := os.read(controller, 1000):
            shown += piece
    return shown.decode()


def test_words_stay_whole_at_the_edge_of_a_terminal() -> None:
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with os.fdopen(terminal, "w") as out:
        wrap = WordWrap(out, column=8)
        for start in range(0, len(TEXT), 5):  # pieces that end within words
            wrap.write(TEXT[start : start + 5])
    shown = everything(controller).replace("\r\n", "\n")
    os.close(controller)
    while erased := re.search(r"\x1b\[(\d+)D\x1b\[K", shown):  # cursor to the left, clear to the end of the line
        shown = shown[: erased.start() - int(erased[1])] + shown[erased.end() :]
    lines = ("-" * 8 + shown).split("\n")
    assert len(lines) == 5
    assert max(map(len, lines)) <= 20
    assert shown.split() == TEXT.split()


def test_text_in_a_file_is_left_alone() -> None:
    out = io.StringIO()
    wrap = WordWrap(out)
    for start in range(0, len(TEXT * 9), 7):
        wrap.write((TEXT * 9)[start : start + 7])
    assert out.getvalue() == TEXT * 9
