"""The programs in examples/ run as their docstrings say, and their answers are right."""

from __future__ import annotations

import ast
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import pytest

from preble.demo import Handbook

EXAMPLES = Path(__file__).parent.parent / "examples"
HANDBOOK = Handbook.generate(seed=11, facts=40)
QUESTIONS = list(islice(HANDBOOK.questions(seed=1), 20))
MANY = 2500
"""Tokens whose generation takes longer than what is done here meanwhile; the model's context has room for them."""
ENDLESS = {"prompt": HANDBOOK.text, "max_tokens": MANY, "ignore_eos": True}


def commands(name: str) -> list[list[str]]:
    """The commands that a program's docstring gives, with this interpreter and the program's real path."""
    documentation = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())) or ""
    found = [shlex.split(line) for line in re.findall(r"^    python (.*)$", documentation, re.MULTILINE)]
    assert found
    return [[sys.executable, *(word.replace("examples/", f"{EXAMPLES}/") for word in words)] for words in found]


def output_of(command: list[str], folder: Path) -> str:
    """What a command prints if it succeeds without a word on standard error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_the_list_is_complete() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    listed = re.findall(r"^\| \[(.*?)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert programs == set(listed)
    commands_listed = re.findall(r"`python (.*?)`", (EXAMPLES / "README.md").read_text())
    for name in programs:
        documentation = (EXAMPLES / name).read_text()
        assert [command for command in commands_listed if name in command]
        assert all(f"    python {command}\n" in documentation for command in commands_listed if name in command)


def test_agents_call_the_right_tools(tmp_path: Path) -> None:
    *lines, last = output_of(commands("agent.py")[0], tmp_path).splitlines()
    assert lines == [
        "agent 1: price for Rania Blake",
        "  find_order on port 7402: 4117",
        '  load_order on port 5386: {"name": "Rania Blake", "number": "4117", "grams": 1250, "city": "Lisbon"}',
        "  count_parcel on port 4035: 1250",
        "  rank_voucher on port 6619: 4.50",
        "agent 2: text for Otto Finch",
        "  find_order on port 7402: 2096",
        '  load_order on port 5386: {"name": "Otto Finch", "number": "2096", "grams": 300, "city": "Oslo"}',
        "  parse_letter on port 8254: Otto Finch, Oslo",
        "  label_parcel on port 3170: TO: OTTO FINCH, OSLO",
        "agent 3: video for Otto Finch",
        "  no tool leads from a name to video",
    ]
    found = re.fullmatch(r"(\d+) questions, (\d+) prompt tokens, (\d+)% of them cached", last)
    assert found
    assert int(found[1]) == 34
    assert int(found[3]) > 60


def test_a_policy_of_ones_own_serves(tmp_path: Path) -> None:
    own, turns = output_of(commands("custom_policy.py")[0], tmp_path).splitlines()
    rates = []
    for line, name in ((own, "bounded-affinity"), (turns, "round-robin")):
        found = re.fullmatch(name + r": 48 of 48 right, hit rate (\d+)%, (\{.*\})", line)
        assert found, line
        rates.append(int(found[1]))
        assert sum(ast.literal_eval(found[2]).values()) == 48
    assert set(ast.literal_eval(own[own.index("{") :])) <= {"new", "cached there", "cached on a busy one"}
    assert min(rates) > 50


def test_a_policy_of_ones_own_is_tested(tmp_path: Path) -> None:
    command = [*commands("custom_policy.py")[1], "-q", "-p", "no:cacheprovider"]
    assert re.search(r"^2 passed", output_of(command, tmp_path), re.MULTILINE)


def test_tenants_share_nothing(tmp_path: Path) -> None:
    heading, *rows, order = output_of(commands("tenants.py")[0], tmp_path).splitlines()
    columns = re.split(r" {2,}|(?<=priority) |(?<=right) |(?<=refused) |(?<=computed) |(?<=first) ", heading)
    assert columns == ["tenant", "priority", "right", "refused", "computed", "cached first", "cached later"]
    table = {name: list(map(int, cells)) for name, *cells in map(str.split, rows)}
    assert list(table) == ["batch", "trial", "customer"]
    for priority, right, refused, computed, first, later in table.values():
        assert right + refused == 12
        assert first == 0
        assert later >= 448  # whole pages of some 520 tokens
        assert (computed >= 600) == (priority != 0 or refused > 0)
    assert [row[2] > 0 for row in table.values()] == [False, True, False]
    served = order.partition(": ")[2].split()
    assert len(served) == sum(row[1] for row in table.values())
    # Where batch and customer wait together, the customer is first.
    last_of_customer = max(place for place, tenant in enumerate(served) if tenant == "c")
    assert served[last_of_customer:].count("b") > served[:last_of_customer].count("b")


def test_a_batch_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    command = commands("batch.py")[0]
    wrong = ['{"id": 20}', "no JSON", "[1]", '{"prompt": ""}', json.dumps({"prompt": "Handbook\n" * 9000})]
    lines = [json.dumps({"id": id, "prompt": HANDBOOK.prompt(question)}) for id, question in enumerate(QUESTIONS)]
    lines[7:7] = wrong
    assert len(lines) == 25
    endless = [json.dumps({"prompt": HANDBOOK.text, "options": {"ignore_eos": True}})] * 2
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines, *endless]) + "\n")
    answers = tmp_path / "answers.jsonl"

    # With so many tokens to generate for the last lines, Ctrl-C comes before the end.
    with subprocess.Popen(
        [*command, "--max-tokens", str(MANY)], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert re.fullmatch(r"\d+ of 27 lines\n", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.endswith("interrupted: the same command goes on from here\n")
    before = answers.read_text().splitlines()
    assert 0 < len(before) < 27

    # A crash in the middle of a line.
    with answers.open("a") as file:
        file.write('{"text": " 41", "finish_rea')
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    after = answers.read_text().splitlines()
    assert after[: len(before)] == before
    found = sorted((json.loads(line) for line in after), key=lambda answer: answer["line"])
    assert [answer["line"] for answer in found] == list(range(1, 28))
    failed = [answer for answer in found if "error" in answer]
    assert [answer["line"] for answer in failed] == [8, 9, 10, 11, 12]
    for answer, reason in zip(failed, ("no prompt", "not a JSON", "not a JSON", "empty", "too long"), strict=True):
        assert reason in answer["error"]
    answered = [answer for answer in found if "id" in answer and "text" in answer]
    assert len(answered) == 20
    for answer in answered:
        assert QUESTIONS[answer["id"]].is_answered_by(answer["text"])
    assert done.stdout.startswith(f"{27 - len(before)} lines answered, ")
    assert done.stdout.endswith(f"; {len(before)} were done before\n")


@contextmanager
def web_app(folder: Path, *arguments: str) -> Iterator[httpx2.Client]:
    """The web app on a free port, and a client of it. Ctrl-C ends it, without an error in its log."""
    command = [*commands("web_app.py")[0], *arguments]
    command[command.index("--port") + 1] = "0"
    with (
        (folder / "access.log").open("w") as log,
        subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=log, text=True) as process,
    ):
        try:
            assert process.stderr is not None
            started = []
            for line in process.stderr:
                started.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                pytest.fail("".join(started))
            with httpx2.Client(base_url=found[1], timeout=None, trust_env=False) as client:
                yield client
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
            assert "Traceback" not in errors
            assert "Application shutdown complete" in errors
        finally:
            process.kill()


def events_of(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


def stats_when(client: httpx2.Client, pending: int, running: int) -> dict[str, Any]:
    """The statistics as soon as so many requests are in flight and run. Needs no time limit: a hang is the failure."""
    while True:
        stats: dict[str, Any] = client.get("/stats").json()
        (replica,) = stats["replicas"]
        if (stats["pending"], replica["running"]) == (pending, running):
            return stats


@contextmanager
def cancelled(client: httpx2.Client) -> Iterator[None]:
    """Inside the block a request is given up, and then its pages are free long before it would have ended."""
    (before,) = stats_when(client, pending=0, running=0)["replicas"]
    yield
    (after,) = stats_when(client, pending=0, running=0)["replicas"]
    assert after["generated_tokens"] - before["generated_tokens"] < MANY
    assert after["pages_in_use"] == 0


def test_a_web_app_serves(tmp_path: Path) -> None:
    with web_app(tmp_path, "--max-pending", "1") as client:
        assert client.get("/health").json()["status"] == "ok"
        for question in QUESTIONS[:4]:
            answer = client.post("/generate", json={"prompt": HANDBOOK.prompt(question)})
            assert answer.status_code == 200
            assert question.is_answered_by(answer.json()["text"])
            assert answer.json()["finish_reason"] == "stop"

            body = {"prompt": HANDBOOK.prompt(question), "stream": True}
            with client.stream("POST", "/generate", json=body) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                *pieces, last = events_of(response)
            assert question.is_answered_by("".join(piece["text"] for piece in pieces))
            assert last["finish_reason"] == "stop"
            assert last["usage"]["cached_tokens"] > 0

        for wrong, why in (
            ({}, "missing required field `prompt`"),
            ({"prompt": ""}, "the prompt is empty"),
            ({"prompt": "Q", "max_tokens": 0}, "max_tokens must be at least 1"),
            ({"prompt": "Q", "max_token": 1}, "unknown field `max_token`"),
            ({"prompt": "Q", "timeout": 61}, "Expected `float` <= 60"),
            ({"prompt": "Handbook\n" * 9000}, "too long"),
        ):
            for stream in (False, True):
                refused = client.post("/generate", json={**wrong, "stream": stream})
                assert refused.status_code == 400
                assert why in refused.json()["error"]
        assert client.post("/generate", content=b"{").status_code == 400

        with cancelled(client):
            late = client.post("/generate", json={**ENDLESS, "timeout": 0.05})
            assert late.status_code == 504

        # A stream holds the only slot until its client leaves.
        with cancelled(client), client.stream("POST", "/generate", json={**ENDLESS, "stream": True}) as response:
            events = events_of(response)  # kept, since dropping it closes the response
            assert "text" in next(events)
            overloaded = client.post("/generate", json={"prompt": "Q"})
            assert overloaded.status_code == 503
            assert int(overloaded.headers["retry-after"]) >= 1
            assert stats_when(client, pending=1, running=1)["replicas"][0]["pages_in_use"] > 0

        # A client that waits for a whole answer leaves too.
        port = client.base_url.port
        assert port is not None
        content = json.dumps(ENDLESS).encode()
        with cancelled(client), socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            stats_when(client, pending=1, running=1)
        assert client.post("/generate", json={"prompt": HANDBOOK.prompt(QUESTIONS[0])}).status_code == 200
