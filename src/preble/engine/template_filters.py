"""What chat templates may call: jinja's filters and tests, and the methods of strings, lists and mappings, metered.

Whatever takes time or memory in proportion to what it is given is charged for that. What takes more than that, because
of a width or a count among its arguments, is charged for what it is about to make, before it makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import update_wrapper
from string import Formatter
from typing import Any

from jinja2 import pass_environment
from jinja2.environment import Environment
from jinja2.filters import make_attrgetter
from jinja2.utils import _PassArg

from preble.engine.template_meter import (
    MAX_BITS,
    TemplateTooCostly,
    characters,
    charge,
    charge_made,
    check_integer,
    current,
)

MAX_WIDTH = 10_000
"""Of anything padded, indented or printed with so many digits."""

REFUSED = frozenset({"pprint", "striptags", "urlize", "wordwrap"})
"""Filters whose work grows faster than what they are given; web pages use them, chat templates do not."""

METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
        "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
        "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
        "startswith strip swapcase title upper zfill".split()
    ),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    int: frozenset({"bit_count", "bit_length", "denominator", "imag", "is_integer", "numerator", "real"}),
    float: frozenset({"imag", "is_integer", "real"}),
    range: frozenset({"start", "step", "stop"}),
}
"""What a template may use of the values that it handles. Bytes, views of memory and types are out of its reach."""

_CONSTANT_FILTERS = frozenset(
    "attr count d default first items last length map random reject rejectattr select".split()
)
_CONSTANT_FILTERS |= {"selectattr"}
"""Take the same time whatever they are given; those that return iterators are charged item by item."""
_GATHERING_FILTERS = frozenset({"groupby", "join", "max", "min", "sort", "unique"})
"""Look at everything in an iterator at once."""
_COSTLY_TESTS = frozenset(
    "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper divisibleby".split()
)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
_NO_METHODS: frozenset[str] = frozenset()


def allowed_attribute(value: object, name: str) -> bool:
    """Whether a template may read this attribute, as far as it is one of Python's own values."""
    for kind in type(value).__mro__:
        if kind in METHODS:
            return name in METHODS[kind]
    # Jinja's own objects (loops, macros, namespaces) are written for templates.
    return type(value).__module__ != "builtins"


def metered_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The same filters, metered, without those that templates do not get."""
    bounded = {name: _metered_filter(name, function) for name, function in filters.items() if name not in REFUSED}
    return bounded | {"sum": add_up}


def metered_tests(tests: Mapping[str, Any]) -> dict[str, Any]:
    """The same tests, metered."""
    bounded = {name: _charging(function) if name in _COSTLY_TESTS else function for name, function in tests.items()}
    return bounded | {"in": contains}


def charge_method(owner: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Charge for a method of one of Python's own values that is about to be called."""
    if not allowed_attribute(owner, name):
        raise TemplateTooCostly(f"it calls {name!r} of a value of the type {type(owner).__name__}")
    if isinstance(owner, dict):
        charge(args)  # hashed
        return
    if isinstance(owner, str):
        charge_made(owner)
        if name in _BEFORE_METHODS:
            charge(args, kwargs)
            _BEFORE_METHODS[name](owner, *args, **kwargs)
            return
    else:
        charge(owner)
    charge(args, kwargs)


def charge_percent(template: str, values: Any) -> None:
    """Charge for `template % values`."""
    found = _PERCENT.findall(template)
    widths = [part for pair in found for part in pair if part]
    if "*" in widths:
        raise TemplateTooCostly("it formats with a width (*) that is computed")
    _charge_fields(len(template), len(found), widths, values)


def charge_format(template: str, values: Any) -> None:
    """Charge for `template.format(values)`."""
    fields = [(field, spec or "") for _, field, spec, _ in Formatter().parse(template) if field is not None]
    if any("{" in spec for _, spec in fields):
        raise TemplateTooCostly("it formats with a width that is computed")
    _charge_fields(len(template), len(fields), re.findall(r"\d+", " ".join(spec for _, spec in fields)), values)


def ticking(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each of them charged, with what it took to find it."""
    meter = current()
    for item in items:
        meter.charge(4)
        yield item


def contains(value: Any, container: Any) -> bool:
    """`value in container`, charged."""
    container = _gathered(container)
    if isinstance(container, Mapping):
        charge(value)
    else:
        charge(value, container)
    return value in container


@pass_environment
def add_up(environment: Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """The filter `sum`: like Python's, charged for every list that adding lists makes on the way."""
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    get = None if attribute is None else make_attrgetter(environment, attribute)
    total = start
    for item in ticking(iterable):
        total = total + (item if get is None else get(item))
        charge_made(total)
    return total


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 0 if _PassArg.from_obj(function) is None else 1
    constant, gathering, check = name in _CONSTANT_FILTERS, name in _GATHERING_FILTERS, _BEFORE_FILTERS.get(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if gathering:
            args = (*args[:first], *map(_gathered, args[first:]))
            charge(*[args[first:]] * 3)  # each item is compared with several others
        if constant:
            charge(args[first + 1 :], kwargs)
        else:
            charge(args[first:], kwargs)
        if check is not None:
            check(*args[first:], **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return ticking(result)
        if not constant:
            charge_made(result)
        return result

    return update_wrapper(call, function)


def _charging(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        charge(*args)
        return function(*args)

    return update_wrapper(call, function)


def _gathered(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def _charge_fields(length: int, fields: int, widths: Sequence[str], values: Any) -> None:
    for width in widths:
        _width(int(width) if len(width) < 8 else MAX_WIDTH + 1)
    meter = current()
    before = meter.left
    charge(values)
    # Every field may print all of the values.
    meter.charge(characters(length + sum(map(int, widths))) + fields * (before - meter.left))


def _width(value: Any) -> int:
    width = abs(int(value))
    if width > MAX_WIDTH:
        raise TemplateTooCostly(f"it pads to {'so many' if width >= 10**9 else width} characters, over {MAX_WIDTH}")
    return width


def _padding(text: Any, width: Any = 80, *_: Any) -> None:
    current().charge(characters(_width(width)))


def _tabs(text: str, tabsize: Any = 8) -> None:
    current().charge(characters(_width(tabsize) * text.count("\t")))


def _replacing(text: Any, old: Any, new: Any, count: Any = -1) -> None:
    text, old, new = str(text), str(old), str(new)
    current().charge(characters(text.count(old) * len(new)))


def _joining(items: Any, separator: Any = "", attribute: Any = None) -> None:
    if hasattr(items, "__len__"):
        current().charge(characters(len(items) * len(str(separator))))


def _joining_method(separator: str, items: Any) -> None:
    if isinstance(items, Iterator):
        raise TemplateTooCostly("it joins what it has not listed: use the filter 'list' first")
    _joining(items, separator)


def _indenting(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    added = len(width) if isinstance(width, str) else _width(width)
    current().charge(characters((len(str(text).splitlines()) + 2) * added))


def _filling(items: Any, count: Any, fill_with: Any = None) -> None:
    current().charge(_width(count))


def _rounding(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if abs(int(precision)) > 300:
        raise TemplateTooCostly("it rounds to more than 300 digits")


def _to_integer(value: Any, default: Any = 0, base: Any = 10) -> None:
    if isinstance(value, str) and len(value) > MAX_BITS:
        raise TemplateTooCostly(f"it reads a number of more than {MAX_BITS} digits")
    if isinstance(value, int):
        check_integer(value)


def _to_json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> None:
    if indent is None and separators is None:
        return
    added = len(indent) if isinstance(indent, str) else _width(indent or 0)
    added += sum(len(str(separator)) for separator in separators or ())
    meter = current()
    before = meter.left
    charge(value)
    meter.charge((before - meter.left) * _depth(value) * added >> 4)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            part
            for item in level
            if isinstance(item, list | tuple | dict)
            for part in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


_BEFORE_FILTERS: dict[str, Callable[..., None]] = {
    "batch": _filling,
    "center": _padding,
    "format": lambda template, *args, **kwargs: charge_percent(str(template), kwargs or args),
    "indent": _indenting,
    "int": _to_integer,
    "join": _joining,
    "replace": _replacing,
    "round": _rounding,
    "slice": _filling,
    "tojson": _to_json,
}
_BEFORE_METHODS: dict[str, Callable[..., None]] = {
    "center": _padding,
    "expandtabs": _tabs,
    "join": _joining_method,
    "ljust": _padding,
    "replace": _replacing,
    "rjust": _padding,
    "zfill": _padding,
}
