"""The jinja environment of chat templates: transformers' own, in which every loop and operation is metered."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.environment import Environment
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from preble.engine.template_filters import (
    allowed_attribute,
    charge_format,
    charge_method,
    charge_percent,
    contains,
    metered_filters,
    metered_tests,
)
from preble.engine.template_meter import (
    MAX_BITS,
    TemplateTooCostly,
    characters,
    charge,
    charge_made,
    check_integer,
    current,
)

MAX_NODES = 10_000
"""Of a template's syntax tree: statements, expressions and their parts. Published templates have some hundred, a few
have thousands. Jinja's compiler takes time in proportion to the square of it."""

_TICK, _WEIGHED, _CONTAINS, _CONCAT, _SLICE = "(tick)", "(weighed)", "(contains)", "(concat)", "(slice)"
"""Filters that only `_Metering` puts into templates: no name in a template has parentheses."""
_NOT_ARGUMENTS = ("_loop_vars", "_block_vars")
"""What compiled templates pass along with every call in a loop."""
_BINDING = {Macro: 10, LoopContext: 10, BlockReference: 40}
"""Calls of these only give names to their arguments; what their bodies do is charged there. How long a call takes."""


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Renders like `original`, an environment of transformers, until the thread's meter runs out.

    Compiled templates do everything through an environment but loops, comparisons, `~`, slices and the text between
    their tags; `_Metering` adds those to the syntax tree.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, original: Environment) -> None:
        super().__init__(
            trim_blocks=original.trim_blocks,
            lstrip_blocks=original.lstrip_blocks,
            extensions=[type(extension) for extension in original.extensions.values()],
            # Nothing is computed while compiling: a constant expression can be a bomb, too.
            optimized=False,
            finalize=_charge_output,
        )
        ours = {_TICK: _tick, _WEIGHED: _weighed, _CONTAINS: contains, _CONCAT: _concat, _SLICE: _slice}
        self.filters = metered_filters(original.filters) | ours
        self.tests = metered_tests(original.tests)
        self.globals.update(original.globals)
        self.globals.pop("lipsum", None)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metering().metered(source), *args, **kwargs)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Jinja's own would compile a false stack frame for every level of a recursion."""
        raise

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a template or block."""
        kept: list[str] = []
        left = current().output
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise TemplateTooCostly("it writes far more than the conversation holds")
            kept.append(piece)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and allowed_attribute(obj, attr)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def metered_format(*args: Any, **kwargs: Any) -> str:
            charge_format(value.__self__, (args, kwargs))
            return wrapped(*args, **kwargs)

        return metered_format

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is BuiltinMethodType:
            charge_method(__obj.__self__, __obj.__name__, args, _arguments(kwargs))
        elif type(__obj) in _BINDING:
            current().charge(_BINDING[type(__obj)])
        else:
            charge(args, _arguments(kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        charge_made(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            if operator == "+" and isinstance(right, str):
                current().charge(characters(len(left) + len(right)))
            elif operator == "%":
                charge_percent(left, right)
            elif operator == "*" and isinstance(right, int):
                current().charge(characters(len(left) * max(right, 0)))
        elif isinstance(left, list | tuple):
            if operator == "+" and isinstance(right, list | tuple):
                current().charge(len(left) + len(right))
            elif operator == "*" and isinstance(right, int):
                current().charge(len(left) * max(right, 0))
        elif isinstance(left, int):
            check_integer(left)
            if isinstance(right, str):
                current().charge(characters(len(right) * max(left, 0)))
            elif isinstance(right, list | tuple):
                current().charge(len(right) * max(left, 0))
            elif isinstance(right, int):
                check_integer(right)
                if operator == "**" and right > 0 and left.bit_length() * right > MAX_BITS:
                    raise TemplateTooCostly(f"it makes a whole number of more than {MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)


class _Metering(NodeTransformer):
    """Puts charges where compiled templates would do work without asking their environment."""

    def metered(self, template: nodes.Template) -> nodes.Template:
        """`template` with its charges; `TemplateTooCostly` when it is too large to be compiled."""
        count = sum(1 for _ in template.find_all(nodes.Node))
        if count > MAX_NODES:
            raise TemplateTooCostly(f"it has {count} statements and expressions, more than {MAX_NODES}")
        self.visit(template)
        template.body.insert(0, _tick_for(template.body, template.lineno))
        return template

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_tick_expression([node.test], node.lineno), node.test, lineno=node.lineno)
        return _with_tick(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return _with_tick(node)

    visit_CallBlock = visit_Macro
    visit_Block = visit_Macro

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1:
            first, last = node.expr, node.ops[0].expr
            equality = node.ops[0].op in ("eq", "ne")
            if (equality and isinstance(first, nodes.Const)) or (isinstance(last, nodes.Const) and equality):
                return node  # what a template writes out is soon compared
            if node.ops[0].op in ("in", "notin"):
                if _all_constant(last):
                    return node
                found = _filter(first, _CONTAINS, last)
                return found if node.ops[0].op == "in" else nodes.Not(found, lineno=node.lineno)
        node.expr = _filter(node.expr, _WEIGHED)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, _WEIGHED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes[:] = [_filter(node.nodes[0], _CONCAT, *node.nodes[1:])]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Const):
            return node
        if not isinstance(node.arg, nodes.Slice):
            node.arg = _filter(node.arg, _WEIGHED)  # hashed
            return node
        none = nodes.Const(None, lineno=node.lineno)
        return _filter(node.node, _SLICE, node.arg.start or none, node.arg.stop or none, node.arg.step or none)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(node.key, _WEIGHED)  # hashed
        return node


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _NOT_ARGUMENTS}


def _with_tick(node: Any) -> nodes.Node:
    node.body.insert(0, _tick_for(node.body, node.lineno))
    return node  # type: ignore[no-any-return]


def _tick_for(body: Iterable[nodes.Node], lineno: int) -> nodes.Node:
    return nodes.ExprStmt(_tick_expression(body, lineno), lineno=lineno)


def _tick_expression(body: Iterable[nodes.Node], lineno: int) -> nodes.Filter:
    cost = 1
    for part in body:
        cost += 1 + sum(1 for _ in part.find_all(nodes.Node))
        cost += sum(len(text.data) >> 4 for text in part.find_all(nodes.TemplateData))
    return _filter(nodes.Const(cost, lineno=lineno), _TICK)


def _filter(value: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _all_constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)


def _tick(cost: int) -> bool:
    current().charge(cost)
    return True


def _weighed(value: Any) -> Any:
    if type(value) is str or type(value) is int:
        charge_made(value)
    else:
        charge(value)
    return value


def _concat(*values: Any) -> str:
    for value in values:
        _weighed(value)
    return str_join(values)


def _slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = operator.getitem(value, slice(start, stop, step))
    charge_made(part)
    return part


@pass_context  # so that jinja does not call it while compiling
def _charge_output(context: Context, value: Any) -> Any:
    if type(value) is str:
        charge_made(value)
    else:
        charge(value)
    return value
