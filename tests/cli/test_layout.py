"""What the commands show: tables that fit 80 columns, a sentence that is true either way, words that stay whole."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import termios
from contextlib import suppress
from typing import Any

import pytest
from rich.console import Console

from preble.cli.burst import Burst, ReplicaShare, Spread, legend, policy_table, replica_table
from preble.cli.graded_answer import accuracy
from preble.cli.verdict import verdict
from preble.cli.word_wrap import WordWrap


def burst(
    policy: str = "e2",
    *,
    computed: int = 400_000,
    seconds: float = 100.0,
    ttft: float = 100.5,
    requests: int = 5_000,
    right: int | None = 4_990,
    replicas: int = 2,
) -> Burst:
    """A long one, so that the numbers are wide."""
    shares = [
        ReplicaShare(
            replica=number,
            requests=requests // replicas,
            reasons={"exploit": 2_100, "explore": 300, "rebalance": 100},
            prompt_tokens=10_000_000,
            cached_tokens=10_000_000,
            computed_tokens=computed // replicas,
            pages_cached=40_000,
        )
        for number in range(replicas)
    ]
    return Burst(policy, tuple(shares), right, Spread(ttft, 300.25), Spread(200.5, 450.75), seconds)


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


def test_a_policy_whose_answers_were_not_graded_has_no_accuracy() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(policy_table([burst(right=None), burst("round-robin")]))
    _, _, ungraded, graded = (line.split() for line in out.getvalue().splitlines())
    assert ungraded[:3] == ["e2", "-", "100%"]
    assert graded[:3] == ["round-robin", "99.8%", "100%"]
    assert burst(right=None).accuracy is None


@pytest.mark.parametrize(
    ("right", "answered", "shown"),
    [(0, 0, "-"), (0, 7, "0.0%"), (7, 7, "100%"), (2, 3, "66.7%"), (99_999, 100_000, "99.9%")],
)
def test_only_all_right_is_100_percent(right: int, answered: int, shown: str) -> None:
    assert accuracy(right, answered) == shown


@pytest.mark.parametrize(("count", "p99"), [(1, 1), (2, 2), (99, 99), (100, 99), (101, 100), (200, 198), (1000, 990)])
def test_at_most_a_hundredth_is_above_the_p99(count: int, p99: int) -> None:
    spread = Spread.of([float(value) for value in range(count, 0, -1)])
    assert spread.p99 == p99
    assert spread.mean == (count + 1) / 2


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (
            burst(computed=100_000, seconds=40.0, ttft=20.1),
            "e2 is ahead of round-robin: 2.50 times as many questions answered per second, 75% fewer tokens computed, "
            "a mean TTFT 80% shorter, 4990 of 5000 answers right with both.",
        ),
        (
            burst(computed=600_000, seconds=90.0, ttft=120.6, right=4_980),
            "e2 is ahead of round-robin: 1.11 times as many questions answered per second, 50% more tokens computed, "
            "a mean TTFT 20% longer, 4980 instead of 4990 of 5000 answers right.",
        ),
        (
            burst(seconds=104.0),
            "e2 and round-robin are level: 0.96 times as many questions answered per second, as many tokens computed, "
            "the same mean TTFT, 4990 of 5000 answers right with both.",
        ),
        (
            burst(computed=200_000, seconds=96.0),
            "e2 and round-robin are level: 1.04 times as many questions answered per second, 50% fewer tokens "
            "computed, the same mean TTFT, 4990 of 5000 answers right with both.",
        ),
        (
            burst(computed=1_200_000, seconds=200.0, ttft=402.0, right=None),
            "e2 is behind round-robin: 0.50 times as many questions answered per second, 3.0 times as many tokens "
            "computed, a mean TTFT 4.0 times as long, answers not graded.",
        ),
    ],
)
def test_the_verdict_follows_the_figures(ours: Burst, said: str) -> None:
    assert verdict(ours, burst("round-robin")) == said


@pytest.mark.parametrize(
    ("seconds", "result"), [(94.0, "is ahead of"), (96.0, "are level"), (104.0, "are level"), (106.0, "is behind")]
)
def test_a_twentieth_is_a_difference(seconds: float, result: str) -> None:
    assert result in verdict(burst(seconds=seconds), burst("round-robin"))


def test_the_verdict_says_when_there_was_little_to_see() -> None:
    ahead: dict[str, Any] = {"seconds": 10.0, "right": 8, "requests": 8}
    assert verdict(burst(**ahead), burst("round-robin", **ahead)).endswith("With so few questions this says little.")
    alone = {**ahead, "replicas": 1}
    assert verdict(burst(**alone), burst("pmc", **alone)).endswith("With one replica no policy has a choice.")


def test_only_reasons_that_occur_are_explained() -> None:
    assert [line.split(":")[0] for line in legend(burst())] == ["exploit", "explore", "rebalance"]
    plain = ReplicaShare(0, 1, {"round-robin": 1}, 1, 0, 1, 0)
    assert legend(Burst("round-robin", (plain,), None, Spread(1, 1), Spread(1, 1), 1.0)) == []


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
