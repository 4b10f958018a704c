"""What an editor and `help` show for everything public: docstrings of names, methods, arguments and fields."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import preble

PUBLIC = ("preble", "preble.sched", "preble.sched.testing", "preble.sim", "preble.demo")
"""The modules whose `__all__` is the public surface."""
NOT_BY_USERS = {"Stream", "SchedulerMachine", "E2Machine", "E2PaperMachine"}
"""Classes whose objects users are given, or subclass: nobody calls them, so their arguments need no words."""
ENTERED = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.MULTILINE)


def public() -> dict[str, Any]:
    """Every public class and function, by its path."""
    return {
        f"{module}.{name}": value
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
        if inspect.isroutine(value := getattr(importlib.import_module(module), name)) or inspect.isclass(value)
    }


NAMES = public()
CLASSES = {path: value for path, value in NAMES.items() if inspect.isclass(value)}


def fields_of(kind: type) -> dict[str, str]:
    """The strings that stand under the fields of a class, and under what `__init__` assigns, with inherited ones."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("preble"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            for body in (one.body for one in ast.walk(tree) if isinstance(one, ast.ClassDef | ast.FunctionDef)):
                found |= dict(_documented(body))
    return found


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, after in itertools.pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            for target in targets:
                name = getattr(target, "id", None) or getattr(target, "attr", None)
                if name is not None:
                    yield name, inspect.cleandoc(after.value.value)


def methods_of(kind: type) -> dict[str, Callable[..., Any]]:
    """Its own public methods, properties as the functions behind them."""
    found = {}
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            found[name] = function
    return found


def says(text: str | None) -> bool:
    """Whether it is a sentence rather than nothing, or the signature that dataclasses make up."""
    return text is not None and len(text.split()) >= 2 and text.rstrip().endswith((".", "…", "```"))


@pytest.mark.parametrize("path", NAMES)
def test_a_public_name_says_what_it_is(path: str) -> None:
    value = NAMES[path]
    text = value.__doc__
    assert says(text), path
    assert not text.startswith(f"{value.__name__}("), "made up by dataclasses"


@pytest.mark.parametrize("path", CLASSES)
def test_a_method_says_what_it_does(path: str) -> None:
    kind = CLASSES[path]
    silent = [name for name in methods_of(kind) if not says(inspect.getdoc(getattr(kind, name)))]
    assert silent == []


@pytest.mark.parametrize("path", CLASSES)
def test_a_field_says_what_it_holds(path: str) -> None:
    kind = CLASSES[path]
    names = [one.name for one in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    names += [name for name in inspect.get_annotations(kind) if name not in names]
    known = fields_of(kind)
    assert [name for name in names if not name.startswith("_") and not says(known.get(name))] == []


def sections(text: str) -> dict[str, str]:
    """What stands under `Args:`, `Raises:` and so on."""
    parts = re.split(r"^(Args|Returns|Raises|Yields):\n", text, flags=re.MULTILINE)
    return {name: re.split(r"\n(?=\S)", body)[0] for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def described_arguments(text: str) -> list[str]:
    """The names in the `Args:` of a docstring, in order."""
    return [name for names in ENTERED.findall(sections(text).get("Args", "")) for name in names.split(", ")]


def is_protocol(kind: type) -> bool:
    """Whether nothing is made of it."""
    return bool(getattr(kind, "_is_protocol", False))


def functions() -> Iterator[Any]:
    """All that users call, with its signature's names and its docstring, by path."""
    for path, value in NAMES.items():
        if not inspect.isclass(value):
            yield pytest.param(value, inspect.getdoc(value), id=path)
            continue
        plain = not (dataclasses.is_dataclass(value) or issubclass(value, (Exception, tuple)) or is_protocol(value))
        if plain and value.__name__ not in NOT_BY_USERS and "__init__" in vars(value):
            text = f"{inspect.getdoc(value)}\n\n{inspect.getdoc(value.__init__) or ''}"
            yield pytest.param(value.__init__, text, id=path)
        if value.__name__ not in NOT_BY_USERS:
            for name, function in methods_of(value).items():
                yield pytest.param(function, inspect.getdoc(getattr(value, name)), id=f"{path}.{name}")


@pytest.mark.parametrize(("function", "text"), list(functions()))
def test_arguments_are_described(function: Callable[..., Any], text: str) -> None:
    """Under `Args:`, all in order, or, where they are few, by name in the text."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    listed = described_arguments(text)
    if listed:
        assert [name for name in names if name in listed] == listed, "misspelt, or in another order"
    missing = [name for name in names if name not in listed and not re.search(rf"`{name}\b|\b{name}\b", text)]
    if len(missing) > 1 or (missing and listed):
        assert re.search(r"\b(as\s+in|Like)\s+`", text), missing


def test_a_request_is_described_once() -> None:
    """`generate` has every argument; the others say that it has."""
    for name in ("stream", "chat", "stream_chat", "generate_many"):
        assert re.search(r"`(generate|chat)`", inspect.getdoc(getattr(preble.Cluster, name)) or ""), name
    assert described_arguments(inspect.getdoc(preble.Cluster.generate) or "")[-1] == "options"


@pytest.mark.parametrize("kind", [preble.Cluster, preble.sched.GlobalScheduler])
def test_errors_that_are_raised_are_public(kind: type) -> None:
    errors = {path.removeprefix("preble.") for path, one in CLASSES.items() if issubclass(one, Exception)}
    found = set()
    for text in [kind.__doc__, *(function.__doc__ for function in methods_of(kind).values())]:
        raised = sections(inspect.cleandoc(text or "")).get("Raises", "")
        found |= {name for names in ENTERED.findall(raised) for name in names.split(", ")}
    assert found
    assert found <= errors | {"AssertionError"}


@pytest.mark.parametrize(("edge", "beyond"), [("low", -1), ("high", 1)])
def test_the_ranges_of_sampling_values_are_enforced(edge: str, beyond: int) -> None:
    """Numbers at the edge are taken, the next ones beyond it are not."""
    known = fields_of(preble.SamplingParams)
    tried = 0
    for field in dataclasses.fields(preble.SamplingParams):
        found = re.search(
            r"[Ff]rom (?P<low>-?\d+(?:\.\d+)?)(?: to (?P<high>2\*\*\d+ - 1|-?\d+(?:\.\d+)?))?", known[field.name]
        )
        if found and found[edge]:
            power = re.fullmatch(r"2\*\*(\d+) - 1", found[edge])
            limit = 2 ** int(power[1]) - 1 if power else ast.literal_eval(found[edge])
            over = math.nextafter(limit, beyond * math.inf) if isinstance(field.default, float) else limit + beyond
            preble.SamplingParams(**{field.name: limit})
            with pytest.raises(preble.InvalidRequest, match=field.name):
                preble.SamplingParams(**{field.name: over})
            tried += 1
    assert tried >= 7
