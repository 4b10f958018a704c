"""The demo, run as a user runs it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from preble.cli import INTERRUPTED, main
from preble.cli.demo_workload import FACTS, Workload

REQUESTS = 24
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
"""What has no place in a log, but for the line's end."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a small run printed into a pipe, and what it wrote."""
    file = tmp_path_factory.mktemp("demo") / "demo.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["demo", "--requests", str(REQUESTS), "--json", str(file)]) == 0
    return out.getvalue(), json.loads(file.read_text())


def test_the_output_is_plain_and_in_order(ran: tuple[str, dict[str, Any]]) -> None:
    shown, _ = ran
    assert not CONTROLS.search(shown)
    stages = [
        f"Preble demo: {REQUESTS} questions about 8 handbooks, answered by 2 replicas of demo",
        "Starting 2 replicas of demo, questions placed by e2",
        "ready after",
        "A handbook of 120 facts, shortened",
        *(part for _ in ("lookup", "lookup", "absent", "two facts") for part in ("Q: ", "A: ", " right", "TTFT ")),
        "as a chat",
        " right",
        "Each replica has",
        f"Asking {REQUESTS} questions, placed by e2",
        "answered in",
        "Starting 2 replicas of demo, questions placed by round-robin",
        f"Asking {REQUESTS} questions, placed by round-robin",
        f"The same {REQUESTS} questions, placed differently",
        "round-robin: ",
        "Results written to",
    ]
    found = [shown.index(stages[0])]
    for stage in stages[1:]:
        found.append(shown.index(stage, found[-1]))
    assert "A handbook of" not in shown[shown.index("Starting 2 replicas of demo, questions placed by round-robin") :]
    # The second answer about the same handbook finds all of it but the last page.
    cached = [
        (int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in re.findall(r"([\d,]+) of ([\d,]+) p", shown)
    ]
    assert cached[0][0] == 0
    assert cached[1][0] >= cached[1][1] - 128


def test_the_same_questions_go_to_both_policies(ran: tuple[str, dict[str, Any]]) -> None:
    _, results = ran
    settings = results["settings"]
    assert (settings["model"], settings["requests"], settings["in_flight"]) == ("demo", REQUESTS, 16)
    assert (settings["policy"], settings["replicas"], settings["page_size"]) == ("e2", 2, 64)
    assert settings["facts"] == list(FACTS)
    assert list(results["policies"]) == ["e2", "round-robin"]
    tasks = Workload.generate(REQUESTS).tasks
    for policy in results["policies"].values():
        asked = [(one["handbook"], one["kind"], one["question"], one["expected"]) for one in policy["answers"]]
        assert asked == [(task.rank, task.question.kind, task.question.text, task.question.answer) for task in tasks]


@pytest.mark.parametrize("name", ["e2", "round-robin"])
def test_the_figures_follow_from_the_answers(name: str, ran: tuple[str, dict[str, Any]]) -> None:
    shown, results = ran
    policy = results["policies"][name]
    answers = policy["answers"]
    assert [one["right"] for one in answers] == [one["text"].strip() == one["expected"] for one in answers]
    right = sum(one["right"] for one in answers)
    assert (policy["right"], policy["accuracy"]) == (right, right / REQUESTS)
    assert right >= 0.9 * REQUESTS
    assert policy["requests"] == REQUESTS
    assert policy["ttft"]["p99"] == max(one["ttft"] for one in answers)
    assert policy["latency"]["mean"] == pytest.approx(sum(one["latency"] for one in answers) / REQUESTS)
    assert policy["requests_per_second"] == pytest.approx(REQUESTS / policy["seconds"])
    assert all(0 < one["ttft"] <= one["latency"] <= policy["seconds"] for one in answers)
    prompts, cached = (sum(one[key] for one in answers) for key in ("prompt_tokens", "cached_tokens"))
    assert policy["hit_rate"] == cached / prompts
    # The last token of an answer is never fed to the model.
    fed = sum(one["completion_tokens"] - 1 for one in answers)
    assert policy["computed_tokens"] >= prompts - cached + fed
    for replica in policy["replicas"]:
        mine = [one for one in answers if one["replica"] == replica["replica"]]
        assert replica["requests"] == len(mine)
        assert replica["reasons"] == Counter(one["reason"] for one in mine)
        assert replica["cached_tokens"] == sum(one["cached_tokens"] for one in mine)
    row = next(
        line.split() for line in shown[shown.index("placed differently") :].splitlines() if line.startswith(name)
    )
    assert row[2] == f"{policy['hit_rate']:.0%}"
    assert row[3] == f"{policy['computed_tokens']:,}"


def test_the_policy_finds_what_round_robin_computes_again(ran: tuple[str, dict[str, Any]]) -> None:
    shown, results = ran
    assert "too few to keep all of them, but together they can" in " ".join(shown.split())
    e2, round_robin = (results["policies"][name] for name in ("e2", "round-robin"))
    assert e2["hit_rate"] > round_robin["hit_rate"]
    assert e2["computed_tokens"] < round_robin["computed_tokens"]


def test_round_robin_alone_on_one_replica(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "1", "--policy", "round-robin", "--replicas", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Starting 1 replica of demo") == 1
    assert "round-robin alone" in shown
    assert "The replica has" in shown


def test_a_model_that_was_not_made_for_it(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its context is too short for the handbooks, and nothing that it says is graded."""
    file = tmp_path / "demo.json"
    assert main(["demo", "--requests", "4", "--model", str(llama), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert not CONTROLS.search(shown)
    shown = " ".join(shown.split())
    assert "Handbooks are cut to 1/32 of their facts" in shown
    assert "No answer is graded" in shown
    assert "room for all of them" in shown
    assert "answers not graded" in shown
    assert "right " not in shown.partition("placed differently")[0]
    results = json.loads(file.read_text())
    assert results["settings"]["facts"] == [facts // 32 for facts in FACTS]
    for policy in results["policies"].values():
        assert policy["accuracy"] is None
        assert [one["right"] for one in policy["answers"]] == [None] * 4


def test_a_model_without_a_chat_template(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in llama.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["demo", "--requests", "1", "--model", str(tmp_path), "--policy", "round-robin"]) == 0
    assert "not possible" in capsys.readouterr().out


def test_a_model_too_small_for_any_handbook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=64)
    capsys.readouterr()
    assert main(["demo", "--requests", "1", "--model", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("preble demo: the prompt has ")
    assert "the model's context of 64" in line


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Programs start with Ctrl-C in working order, even where the tests were put into the background by a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_on_a_terminal_it_draws_until_it_is_interrupted() -> None:
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = subprocess.Popen(
        [sys.executable, "-m", "preble", "demo", "--requests", "2000"],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(terminal)
    shown = b""
    interrupted = False
    with contextlib.suppress(OSError):  # at the end
        while piece := os.read(controller, 10_000):
            shown += piece
            if not interrupted and "█".encode() in shown:
                interrupted = True
                program.send_signal(signal.SIGINT)
    os.close(controller)
    assert program.wait() == INTERRUPTED
    text = shown.decode()
    assert "█" in text
    assert re.search(r"of 2000 answered", text)
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor, hidden for each view, is back
    after = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text[text.rindex("\x1b[?25h") :])
    assert after.strip() == ""
