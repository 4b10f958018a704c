"""The documentation is true: its examples run, and its tables name every public thing with its real default."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

import preble
from preble.cli import make_parser
from preble.demo_model import write_demo_model
from preble.sampling import REQUEST_OPTIONS
from preble.sched import POLICIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "api.md").read_text()
README = (ROOT / "README.md").read_text()


def examples() -> list[Any]:
    """Every python block, with the page and line where it begins."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start(1)) + 1
            found.append(pytest.param(page, line, block[1], id=f"{page.name}:{line}"))
    return found


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first column of the first table under a heading -> its other columns, as they are written."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[0].splitlines()[2:]]
    return {first.strip("`"): rest for first, *rest in lines}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for those examples that say `path/to/model`."""
    folder = tmp_path_factory.mktemp("model")
    write_demo_model(folder)
    return folder


def test_there_are_examples() -> None:
    assert len(examples()) >= 8


@pytest.mark.parametrize(("page", "line", "source"), examples())
def test_an_example_runs(page: Path, line: int, source: str, model: Path) -> None:
    # Blank lines in front, so that a traceback shows the page's own line numbers.
    source = "\n" * (line - 1) + source.replace("path/to/model", str(model))
    code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if not code.co_flags & inspect.CO_COROUTINE:
        exec(code, namespace)
        return

    async def run() -> None:
        await eval(code, namespace)

    anyio.run(run)


def test_every_public_name_is_described() -> None:
    names = [*preble.__all__, *POLICIES]
    assert [name for name in names if f"`{name}`" not in API and name != "__version__"] == []


def test_the_arguments_of_a_cluster_are_those_of_the_table() -> None:
    parameters = dict(inspect.signature(preble.Cluster).parameters)
    table = rows(API, "Arguments")
    assert list(table) == list(parameters)
    for name, (default, _) in table.items():
        assert ast.literal_eval(default.strip("`")) == parameters[name].default, name


def test_the_options_of_generate_are_those_of_the_table() -> None:
    parameters = inspect.signature(preble.Cluster.generate).parameters
    assert [name.lstrip("*") for name in rows(API, "generate")] == list(parameters)[1:]


def test_a_misspelt_option_finds_every_option_there_is() -> None:
    parameters = set(inspect.signature(preble.Cluster.generate).parameters)
    assert parameters - {"self", "prompt", "options"} == REQUEST_OPTIONS


@pytest.mark.parametrize("kind", [preble.Cluster, preble.Stream])
def test_every_method_is_described(kind: type) -> None:
    for name in vars(kind):
        if not name.startswith("_"):
            assert re.search(rf"\b(?:cluster|stream)\.{name}\b", API), name


def test_the_sampling_fields_are_those_of_the_table() -> None:
    table = rows(API, "SamplingParams")
    assert list(table) == [field.name for field in fields(preble.SamplingParams)]
    for field in fields(preble.SamplingParams):
        assert ast.literal_eval(table[field.name][0].strip("`")) == field.default, field.name


@pytest.mark.parametrize(("edge", "beyond"), [("low", -1), ("high", 1)])
def test_the_ranges_of_the_sampling_table_are_enforced(edge: str, beyond: int) -> None:
    """Numbers at the edge are taken, the next ones beyond it are not."""
    numbers = r"(?:from )?(?P<low>-?[\d.]+)(?: to (?P<high>2\^63 - 1|-?[\d.]+))?"
    table = rows(API, "SamplingParams")
    tried = 0
    for field in fields(preble.SamplingParams):
        found = re.match(numbers, table[field.name][1])
        text = found and found[edge]
        if text:
            limit = 2**63 - 1 if "^" in text else ast.literal_eval(text)
            over = math.nextafter(limit, beyond * math.inf) if isinstance(field.default, float) else limit + beyond
            preble.SamplingParams(**{field.name: limit})
            with pytest.raises(preble.InvalidRequest, match=field.name):
                preble.SamplingParams(**{field.name: over})
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("kind", [getattr(preble, name) for name in preble.__all__ if name != "__version__"])
def test_every_field_is_described(kind: type) -> None:
    if is_dataclass(kind):
        properties = [name for name, value in vars(kind).items() if isinstance(value, property)]
        for name in [*(field.name for field in fields(kind)), *properties]:
            assert f"`{name}`" in API, name


def test_the_errors_derive_as_the_table_says() -> None:
    errors = {
        name: kind
        for name in preble.__all__
        if isinstance(kind := getattr(preble, name), type) and issubclass(kind, Exception)
    }
    table = rows(API, "Errors")
    assert set(table) == set(errors)
    known: Mapping[str, Any] = {**vars(__import__("builtins")), **errors}
    for name, (parents, _) in table.items():
        for parent in re.findall(r"`(\w+)`", parents):
            assert issubclass(errors[name], known[parent]), (name, parent)


def test_the_policies_are_those_of_the_tables() -> None:
    assert list(rows(API, "Placement policies")) == list(POLICIES)
    assert all(f"`{name}`" in rows(README, "What is supported")["placement policies"][0] for name in POLICIES)


def test_the_methods_of_the_scheduler_are_described() -> None:
    from preble.sched import GlobalScheduler

    section = API.partition("## The scheduler by itself")[2]
    missing = [name for name in vars(GlobalScheduler) if not name.startswith("_") and f"`{name}" not in section]
    assert missing == []


@pytest.mark.parametrize("command", ["demo", "generate", "chat"])
def test_every_option_of_a_command_is_described(command: str) -> None:
    section = API.partition("## Command line")[2]
    (commands,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    for action in commands[command]._actions:
        for option in action.option_strings:
            assert option == "-h" or f"`{option}`" in section, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
