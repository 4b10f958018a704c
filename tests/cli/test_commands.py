"""The commands on the built-in model, through `main` and as a program."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import preble
from preble.cli import BROKEN_PIPE, main, make_parser
from preble.demo import Handbook
from preble.demo.handbook import lookup

CACHED = re.compile(r"\[(\d+) prompt tokens, (\d+) of them cached; (\d+) generated")
HANDBOOK = Handbook.generate(0, 40, attribute="badge")
QUESTION = lookup(HANDBOOK.facts[0])
PROMPT = HANDBOOK.prompt(QUESTION)


@pytest.fixture(autouse=True)
def _ordinary_interrupts() -> None:
    """`chat` sets what Ctrl-C does; it is what it was before."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def give(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Text on standard input, which is no terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name, nested ones too."""
    found: dict[str, argparse.ArgumentParser] = {}
    todo = [make_parser()]
    while todo:
        parser = todo.pop()
        parser.format_help()  # a benchmark is loaded when asked
        found[parser.prog] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += action.choices.values()
    return found


def test_the_commands_are_those_of_the_documentation() -> None:
    assert set(commands()) == {
        f"preble{name}"
        for name in (
            "",
            " demo",
            " generate",
            " chat",
            " sim",
            " study",
            " plan",
            " bench",
            " bench engine",
            " bench fidelity",
            " bench gpu",
            " bench sched",
            " bench sim",
            " bench workers",
        )
    }


@pytest.mark.parametrize(
    "name",
    [
        "",
        "demo",
        "generate",
        "chat",
        "sim",
        "study",
        "plan",
        "bench",
        "bench engine",
        "bench fidelity",
        "bench gpu",
        "bench sched",
        "bench sim",
        "bench workers",
    ],
)
def test_help_says_what_everything_means(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*name.split(), "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    parser = commands()[f"preble {name}".strip()]
    assert parser.description
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                assert choice.dest in shown
                assert choice.help
        else:
            assert action.help
            assert all(option in shown for option in action.option_strings)


@pytest.mark.parametrize("name", ["demo", "generate", "chat", "sim", "study", "plan"])
def test_help_tells_every_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for action in commands()[f"preble {name}"]._actions:
        if action.default not in (None, False, argparse.SUPPRESS, []):
            assert f"(default: {action.default})" in shown, action.option_strings


def test_no_benchmark_is_loaded_for_another_command() -> None:
    code = """
import sys
from preble.cli import make_parser
make_parser().parse_args(['study', 'a.jsonl'])
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "preble.cli.bench" in loaded
    assert not {"torch", "transformers", "triton"} & set(loaded)
    assert not [name for name in loaded if name.startswith("preble.bench.")]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"preble {preble.__version__}\n"


def test_as_a_program_between_two_pipes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preble", "generate", "--model", "demo", "--max-tokens", "12"],
        input=f"{PROMPT}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert QUESTION.is_answered_by(done.stdout)
    assert done.stdout.endswith("\n")
    assert re.fullmatch(r"\[\d+ prompt tokens, 3 generated \(stop\), .*\]\n", done.stderr)


def test_a_prompt_may_come_from_either_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "demo", PROMPT]) == 0
    from_argument = capsys.readouterr().out
    give(monkeypatch, f"{PROMPT}\n")
    assert main(["generate", "--model", "demo"]) == 0
    assert capsys.readouterr().out == from_argument
    assert QUESTION.is_answered_by(from_argument)


def test_sampling_values_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", "demo", "--max-tokens", "12", PROMPT]
    hot = ["--temperature", "100", "--seed", "1"]
    texts = []
    for options in (hot, [*hot, "--top-k", "1"], [*hot, "--top-p", "0.0001"], []):
        assert main([*command, *options]) == 0
        texts.append(capsys.readouterr().out.strip())
    drawn, by_top_k, by_top_p, greedy = texts
    assert drawn != greedy
    assert by_top_k == by_top_p == greedy == QUESTION.answer
    assert main([*command, "--stop", greedy[2:]]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == greedy[:2]
    assert "(stop)" in shown.err


def test_a_reader_that_goes_away_is_no_accident(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        monkeypatch.setattr("sys.stdout", nobody_reads)
        assert main(["generate", "--model", "demo", "--max-tokens", "4", "where"]) == BROKEN_PIPE
    assert capsys.readouterr().err == ""


def test_a_chat_finds_its_history_cached(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [lookup(fact) for fact in HANDBOOK.facts[:3]]
    give(monkeypatch, f"{asked[0].text}\n\n{asked[1].text}\n{asked[2].text}\n/reset\n{asked[0].text}\n/exit\nno\n")
    assert main(["chat", "--model", "demo", "--max-tokens", "12", "--system", HANDBOOK.text]) == 0
    shown = capsys.readouterr()
    answers = shown.out.splitlines()
    turns = [tuple(map(int, turn)) for turn in CACHED.findall(shown.err)]
    assert len(turns) == len(answers) == 4
    for question, answer in zip([*asked, asked[0]], answers, strict=True):
        assert question.is_answered_by(answer)
    first, second, third, again = turns
    assert first[1] == 0
    # Prompt and answer of the turn before in whole pages of 16, but for the last token, which was never fed back.
    assert 0 < second[1] == (first[0] + first[2] - 1) // 16 * 16
    assert third[1] == (second[0] + second[2] - 1) // 16 * 16
    assert again[0] == first[0]
    assert answers[3] == answers[0]


def test_a_turn_that_fails_leaves_the_chat_going(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, f"{'where ' * 20_000}\n{QUESTION.text}\n")
    assert main(["chat", "--model", "demo", "--system", HANDBOOK.text]) == 1
    shown = capsys.readouterr()
    error, turn = shown.err.splitlines()
    assert error.startswith("preble chat: the prompt has 1")
    assert CACHED.match(turn)
    assert QUESTION.is_answered_by(shown.out)


class InterruptsAtFirstWord(io.StringIO):
    """Standard output at which someone presses Ctrl-C as soon as there is something to read."""

    def __init__(self) -> None:
        super().__init__()
        self.pressed = False

    def write(self, text: str) -> int:
        if text.strip() and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = InterruptsAtFirstWord()
    monkeypatch.setattr("sys.stdout", out)
    give(monkeypatch, "where is the old house\nand the river\n")
    assert main(["chat", "--model", str(llama), "--max-tokens", "100"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("stopped]")
    assert int(CACHED.match(first)[3]) < 100
    assert not second.endswith("stopped]")
    assert int(CACHED.match(second)[3]) == 100
    assert int(CACHED.match(second)[1]) > int(CACHED.match(first)[1])


def test_an_interrupt_at_the_prompt_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int = -1) -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return "no\n"

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert main(["chat", "--model", "demo"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "COMMAND"),
        ("serve", 2, "invalid choice: 'serve'"),
        ("demo --requests 0", 2, "--requests: must be a positive integer, not '0'"),
        ("demo --requests -3", 2, "--requests: must be a positive integer, not '-3'"),
        ("demo --replicas 0", 2, "--replicas: must be a positive integer"),
        ("demo --replicas two", 2, "--replicas: must be a positive integer, not 'two'"),
        ("demo --policy fastest", 2, "'fastest'"),
        ("demo --json missing/folder/results.json", 2, "missing/folder/results.json"),
        ("demo --json .", 2, "cannot write '.'"),
        ("demo --requests 1 --model missing/folder/model", 1, "missing/folder/model"),
        ("demo --requests 1 --kv-memory 1KiB", 1, "kv_memory"),
        ("generate", 2, "--model"),
        ("generate --model demo --dtype int8 hello", 2, "'int8'"),
        ("generate --model demo --page-size 0 hello", 2, "--page-size"),
        ("generate --model demo --kv-memory much hello", 1, "'much'"),
        ("generate --model demo --devices cuda:99 hello", 1, "cuda:99"),
        ("generate --model demo --temperature -1 hello", 1, "temperature must be at least 0"),
        ("generate --model demo --max-tokens 0 hello", 1, "max_tokens must be at least 1"),
        ("generate --model demo", 1, "the prompt is empty"),
        ("chat --model demo --top-p 2", 1, "top_p must be"),
        ("chat --model missing/folder/model", 1, "missing/folder/model"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(monkeypatch, "")
    try:
        got = main(arguments.split())
    except SystemExit as exit_:
        got = exit_.code
    assert got == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("preble")
    assert message in line


def test_input_that_is_not_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "chat"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
        assert main([command, "--model", "demo"]) == 1
        assert capsys.readouterr().err == (
            f"preble {command}: standard input is not utf-8 text: invalid continuation byte at byte 3\n"
        )
