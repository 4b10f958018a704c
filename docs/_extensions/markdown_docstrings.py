"""Docstrings as they are written here, with Markdown and Google's sections in them, made ready for Sphinx.

A name in backticks becomes a link where it is public and code where it is not; a fence becomes a code block.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from typing import Any

from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring

PUBLIC = ("preble", "preble.sched", "preble.sched.testing", "preble.sim", "preble.demo")
"""The modules whose `__all__` is the public surface, the more general first: what is in two is documented there."""

VALUES = {
    "POLICIES": "preble.sched.policies.POLICIES",
    "PRESETS": "preble.sched.cost_presets.PRESETS",
    "Event": "preble.sched.events.Event",
    "CHECKPOINT": "preble.demo.checkpoint.CHECKPOINT",
    "FORMATS": "preble.sim.traces.reading.FORMATS",
    "WORKLOADS": "preble.sim.workloads.make.WORKLOADS",
}
"""Public values that are no class or function, where they are assigned: only there their docstrings are found."""

KEYWORDS = {"SamplingOptions": "preble.SamplingParams", "RequestOptions": "preble.Cluster.generate"}
"""Types that stand for keywords in a signature, and where these are described."""

CODE = re.compile(r"(?<![`:])`([^`]+)`(?!`)")
FENCE = re.compile(r"^(\s*)```(\w*)$")


@cache
def public_names() -> dict[str, str]:
    """What docstrings call things -> where they are documented: `Cluster.abort` -> `preble.Cluster.abort`."""
    names: dict[str, str] = {}
    for module in reversed(PUBLIC):
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            path = VALUES.get(name, f"{module}.{name}")
            names[name] = names[f"{module}.{name}"] = path
            if inspect.isclass(value):
                members = [member for member in dir(value) if not member.startswith("_")]
                names |= {f"{name}.{member}": f"{path}.{member}" for member in members}
                names |= {f"{path}.{member}": f"{path}.{member}" for member in members}
    return names


def as_rest(lines: list[str]) -> list[str]:
    """The lines of a docstring, Markdown's backticks and fences made reStructuredText's."""
    found: list[str] = []
    indent: str | None = None
    for line in lines:
        fence = FENCE.match(line)
        if fence and indent is None:
            indent = fence[1]
            found += ["", f"{indent}.. code-block:: {fence[2] or 'text'}", ""]
        elif fence:
            indent = None
            found.append("")
        elif indent is not None:
            found.append(f"   {line}" if line else line)
        else:
            found.append(CODE.sub(lambda code: _link(code[1]), line))
    return found


def _link(text: str) -> str:
    path = public_names().get(text.removesuffix("()"))
    return f":py:obj:`{text} <{path}>`" if path else f"``{text}``"


def _process(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    # As a method's, whatever it is: napoleon takes what stands before a colon in an attribute's docstring for its type.
    what = what if what in ("class", "exception") else "method"
    lines[:] = GoogleDocstring(as_rest(lines), Config(), app, what, name, value, options).lines()


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement) -> Element | None:
    """A reference by a name without its module, as annotations have it that are imported for type checkers only."""
    names = public_names() | KEYWORDS
    path = names.get(node["reftarget"].rpartition(".")[2]) if node.get("refdomain") == "py" else None
    if path is None:
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, content)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}
