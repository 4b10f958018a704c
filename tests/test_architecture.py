"""The walls of the house: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import preble

ROOT = Path(preble.__file__).parent
ROOMS = ("sched", "sim", "engine", "kernels", "replica", "cli", "bench")

MAY_IMPORT = {
    "sched": {"sched", "leaf"},
    "sim": {"sim", "sched", "leaf"},
    "kernels": {"kernels", "leaf"},
    "engine": {"engine", "kernels", "sched", "leaf"},
    "replica": {"replica", "engine", "sched", "leaf"},
    "cluster": {"cluster", "replica", "engine", "sched", "leaf"},
    "cli": {"cli", "bench", "sim", "cluster", "sched", "leaf"},
    "bench": {"bench", "cluster", "engine", "kernels", "replica", "sim", "sched", "leaf"},
}
"""Room -> rooms it may import. `leaf` are the values and errors everybody knows; `cluster` is the async front."""

LEAVES = {
    "errors",
    "keywords",
    "request_options",
    "sampling",
    "outputs",
    "prompts",
    "progress",
    "health",
    "demo",
    "__init__",
}
FORBIDDEN_IN_SCHED = {"torch", "anyio", "asyncio", "trio", "threading", "time", "socket", "os", "random"}


def room_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else "__init__"
    if part in ROOMS:
        return part
    return "leaf" if part in LEAVES else "cluster"


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time; what only a type checker reads does not count."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
        todo.extend(ast.iter_child_nodes(node))
    return found


def sources() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = ".".join(("preble", *path.relative_to(ROOT).with_suffix("").parts))
    room = room_of(module)
    if room == "leaf":
        allowed = {"leaf", "sched"} if module == "preble.outputs" else {"leaf"}
    else:
        allowed = MAY_IMPORT[room]
    for imported in imports(path):
        if imported.split(".")[0] == "preble":
            assert room_of(imported) in allowed, f"{module} ({room}) imports {imported}"
        elif room == "sched":
            assert imported.split(".")[0] not in FORBIDDEN_IN_SCHED, f"{module} imports {imported}"


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import preble; preble.SamplingParams(); preble.Cluster") & {
        "torch",
        "numpy",
        "msgspec",
        "transformers",
        "rich",
    }


def test_the_scheduler_needs_no_torch_and_no_event_loop() -> None:
    assert not loaded_after("import preble.sched; preble.sched.GlobalScheduler; import preble.sched.local") & {
        "torch",
        "anyio",
        "asyncio",
    }


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in preble.__all__:
        value = getattr(preble, name)
        if name != "__version__":
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Clutser'"):
        preble.Clutser  # noqa: B018
