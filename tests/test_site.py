"""The pages as a site: Sphinx builds it without a warning, and its reference has everything public."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = ("preble", "preble.sched", "preble.sched.testing", "preble.sim", "preble.demo")
"""The modules whose `__all__` is the public surface."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def described(site: Path) -> set[str]:
    """The names of all Python objects in the reference, from the inventory that Sphinx writes for other sites."""
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    lines = (line.split(" ", 2) for line in zlib.decompress(packed).decode().splitlines())
    return {name for name, kind, _ in lines if kind.startswith("py:")}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str, described: set[str]) -> None:
    names = {name.rpartition(".")[2] for name in described}
    assert [name for name in importlib.import_module(module).__all__ if name not in names | {"__version__"}] == []


@pytest.mark.parametrize("kind", ["preble.Cluster", "preble.Stream", "preble.sched.GlobalScheduler"])
def test_the_reference_has_every_method(kind: str, described: set[str]) -> None:
    module, _, name = kind.rpartition(".")
    members = [member for member in vars(getattr(importlib.import_module(module), name)) if not member.startswith("_")]
    assert len(members) >= 4
    assert [member for member in members if f"{kind}.{member}" not in described] == []


def test_docstrings_keep_their_form(site: Path) -> None:
    """Arguments become a list, fences code, names links."""
    page = (site / "reference" / "cluster.html").read_text()
    assert "Parameters" in page
    assert "Raises" in page
    assert "```" not in page
    assert 'href="#preble.Cluster.generate"' in page
    assert 'href="errors.html#preble.ClusterOverloaded"' in page
