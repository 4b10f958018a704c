"""Which sources an outcome depends on: a result of other sources is not taken for one of these."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import preble
from preble.bench.sim.peers import PEERS
from preble.sched.policies import POLICIES

ROOT = Path(preble.__file__).parent
REGISTRY = "preble.sched.policies"
"""It imports every policy. Of these, only the one that runs matters."""
START = ("preble.sim.simulate", "preble.sim.workloads.make", "preble.bench.sim.condition", "preble.bench.sim.source")
BOUND = "bound"
"""In place of a policy: the lower bound."""


@cache
def digest(policy: str) -> str:
    """Of the sources of the schedulers, the simulator, the workloads and this policy (its name, without switches), or
    of `BOUND`: a change of another policy leaves results valid."""
    if policy == BOUND:
        own = "preble.sim.bound"
    else:
        own = f"preble.bench.sim.peers.{PEERS[policy]}" if policy in PEERS else POLICIES[policy].__module__
    found: set[Path] = set()
    for module in (*START, own):
        _collect(module, found)
    whole = hashlib.sha256()
    for path in sorted(found):
        whole.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def _collect(module: str, found: set[Path]) -> None:
    """The module's file, and those of what it imports of Preble, and so on."""
    path = ROOT.parent / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if path in found or module == REGISTRY or not path.exists():
        return
    found.add(path)
    for needed in _imports(path):
        _collect(needed, found)


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """What may be a module of Preble and is named in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("preble."):
            found += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return tuple(found)
