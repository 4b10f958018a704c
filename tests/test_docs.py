"""The pages are true: every example in them runs, and what they name exists.

Links between the pages under docs/ are checked when the site is built (test_site.py), those of a git host here.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from preble.cli import main, make_parser
from preble.demo import CHECKPOINT
from preble.sched import POLICIES

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
README = (ROOT / "README.md").read_text()

SHELL = ("bash", "console", "sh")
DATA = ("json", "toml")
PROSE = {
    ("docs/architecture.md", "app              await cluster.generate("): "a drawing of who does what",
    ("docs/testing-schedulers.md", "explain said"): "what the test above prints",
}
"""Blocks in no language that a test runs or reads, by page and the start of their first line, and why there are any."""
DIRECTIVES = ("{eval-rst}", "{literalinclude}", "{toctree}")
"""What the site's build carries out (test_site.py)."""
CHECKED_ELSEWHERE = {"docs/mistakes.md": "tests/test_mistakes.py"}
"""Pages whose blocks another test runs: mistakes, and what they lead to."""

FEW = {"sim": ["--requests", "40"], "plan": ["--requests", "40"], "study": [], "generate": ["--max-tokens", "4"]}
"""Commands that are run, and what is added to their arguments, so that it is soon done."""
ONLY_PARSED = {
    "demo": "seconds of computing, in tests/cli",
    "chat": "interactive, in tests/cli",
    "bench": "minutes, in tests/bench",
}
"""Commands of which a real run is elsewhere, and where. Here the parser takes their arguments."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Where its first line is."""
    language: str
    source: str

    @property
    def place(self) -> str:
        """For messages and names of tests."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fenced(page: Path) -> list[Block]:
    """Every fenced block of a page, in a list or not."""
    found: list[Block] = []
    fence, start, language, indent = "", 0, "", 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        mark = re.match(r"(\s*)(`{3,}|~{3,})\s*(.*?)\s*$", line)
        if mark and not fence:
            indent, fence, language, start = len(mark[1]), mark[2], mark[3], number + 1
        elif mark and mark[2].startswith(fence) and not mark[3]:
            source = "".join(f"{one[indent:]}\n" for one in lines[start:number])
            found.append(Block(page, start + 1, language, source))
            fence = ""
    assert not fence, f"{page.name}: the block that begins in line {start} has no end"
    return found


BLOCKS = [block for page in PAGES for block in fenced(page)]


def of(*languages: str) -> list[Any]:
    """The blocks in these languages, as parameters."""
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.language in languages]


def shell_lines() -> list[Any]:
    """The commands of all shell blocks. Where some lines begin with `$`, the others are what they print."""
    found = []
    for block in BLOCKS:
        if block.language in SHELL:
            lines = block.source.replace("\\\n", "").splitlines()
            typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            for command in typed or [line for line in lines if line.strip()]:
                found.append(pytest.param(command, id=f"{block.place} {command[:50]}"))
    return found


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first column of the first table under a heading -> its other columns, as they are written."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[0].splitlines()[2:]]
    return {first.strip("`"): rest for first, *rest in lines}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for the files that examples read: a model and two traces."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(CHECKPOINT)
    prompts = [
        {"t": n / 4, "text": f"You are a helpful assistant. Question {n}?", "output_tokens": 8} for n in range(8)
    ]
    hashes = [{"timestamp": n, "input_length": 900, "output_length": 4, "hash_ids": [0, n]} for n in range(1, 9)]
    for name, lines in {"prompts.jsonl": prompts, "mooncake.jsonl": hashes}.items():
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Blocks


def test_there_are_examples() -> None:
    assert len(of("python")) >= 20
    assert len(shell_lines()) >= 8


@pytest.mark.parametrize("block", of("python"))
def test_an_example_runs(block: Block, workplace: Path) -> None:
    # Blank lines in front, so that a traceback shows the page's own line numbers.
    source = "\n" * (block.line - 1) + block.source
    code = compile(source, str(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if not code.co_flags & inspect.CO_COROUTINE:
        exec(code, namespace)
        return

    async def run() -> None:
        await eval(code, namespace)

    anyio.run(run)


@pytest.mark.parametrize("command", shell_lines())
def test_a_command_works(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # environment
        del words[0]
    match words:
        case ["python", "-m", "preble", *arguments] | ["preble", *arguments]:
            run_preble(arguments, monkeypatch)
        case ["make", *targets]:
            for target in targets:
                assert "=" in target or is_target(target), target
        case [("python" | "pip") as program, *arguments] if "install" in arguments:
            assert program == "pip" or arguments[:2] == ["-m", "pip"]
        case ["python", "-m", "pytest", *arguments]:
            paths = [word for word in arguments if word.startswith("tests")]
            assert paths
            assert all((ROOT / path).exists() for path in paths)
        case ["python", script, *_] if script.startswith("examples/"):  # run by tests/test_examples.py
            assert (ROOT / script).exists()
        case ["python", "-m", "asyncio"]:
            pass
        case _:
            pytest.fail(f"nothing here knows how to check this command: {command}")


def run_preble(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of ours with few requests or tokens, or, where `ONLY_PARSED` has it, parse it."""
    if "--help" in arguments or "--version" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(arguments)
        return
    args = make_parser().parse_args(arguments)
    if args.command in ONLY_PARSED:
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    assert main([*arguments, *FEW[args.command]]) in (0, 1 if args.command == "plan" else 0)


@pytest.mark.parametrize("block", of(*DATA))
def test_data_can_be_read(block: Block) -> None:
    if block.language == "toml":
        assert tomllib.loads(block.source)
        return
    try:
        json.loads(block.source)
    except json.JSONDecodeError:  # JSON lines
        for line in block.source.splitlines():
            assert isinstance(json.loads(line), dict)


def test_every_other_block_is_known_to_be_prose() -> None:
    """So that nothing escapes by its language."""
    checked = ("python", *SHELL, *DATA)
    others = [
        block
        for block in BLOCKS
        if block.language not in checked
        and not block.language.startswith(DIRECTIVES)
        and str(block.page.relative_to(ROOT)) not in CHECKED_ELSEWHERE
    ]
    unused = dict(PROSE)
    for block in others:
        page, first = str(block.page.relative_to(ROOT)), block.source.splitlines()[0]
        (known,) = [key for key in PROSE if key[0] == page and first.startswith(key[1])] or [None]
        assert known is not None, f"{block.place} is in no language that is checked: {first!r}"
        unused.pop(known, None)
    assert not unused


# What pages name


def is_target(name: str) -> bool:
    """Whether the Makefile has it."""
    return re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_extras_in_the_text_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = page.read_text()
    for target in re.findall(r"`make ([\w-]+)", text):
        assert is_target(target), target
    for names in re.findall(r"preble\[([\w,-]+)\]", text):
        assert set(names.split(",")) <= set(extras), names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_the_policies_are_those_of_the_tables() -> None:
    reference = (ROOT / "docs" / "reference" / "policies.md").read_text()
    assert list(rows(reference, "Placement policies")) == list(POLICIES)
    assert all(f"`{name}`" in rows(README, "What is supported")["placement policies"][0] for name in POLICIES)


@pytest.mark.parametrize("command", ["demo", "generate", "chat"])
def test_every_option_of_a_command_is_described(command: str) -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    (commands,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    for action in commands[command]._actions:
        for option in action.option_strings:
            assert option == "-h" or f"`{option}`" in page, option
