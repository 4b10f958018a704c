"""Checkpoints that many tests share, written once per run, and both async backends."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread computes these tiny models fastest. Where a test lets torch use more, they must not spin for the cores that
# another test run needs. OpenMP reads both when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "100"
# Whoever asks for a model that is not here hears that at once, wherever the tests run.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU, Triton's interpreter runs the kernels on the CPU. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

import preble

# A shell that runs the tests in the background has them ignore Ctrl-C, which some of them send to programs of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is slow.
settings.register_profile(
    "new", settings.get_profile("default"), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# What `make test` says of a commit depends on the commit alone. `make test-long` looks for new examples.
settings.register_profile("repeatable", settings.get_profile("new"), derandomize=True, print_blob=True)
settings.load_profile("new")


def pytest_collection_finish() -> None:
    """Hypothesis draws constants that it finds in our loaded modules: always all, whichever tests ran here before."""
    if not settings().derandomize:
        return
    for module in pkgutil.walk_packages(preble.__path__, "preble."):
        if not module.name.endswith(".__main__"):
            with contextlib.suppress(ModuleNotFoundError):  # a peer to measure against
                importlib.import_module(module.name)


TOGETHER = {"tests/kernels/test_ahead.py"}
"""Files that one process takes whole, before all others: their tests share what takes minutes to make."""
LONGEST = (
    "tests/kernels/test_ahead.py",
    "tests/chaos/",
    "tests/sched/test_scheduler_machine.py::test_any",
    "tests/test_overload.py::test_overload",
    "tests/test_cancel_storm.py",
    "tests/replica/",
    "tests/bench/",
)
"""How the names of tests begin that take many seconds each: they come first, so that no process waits in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest --numprocesses`. The mark `xdist_group` would do, but pytest 9.2 broke it (pytest-xdist #1386)."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Async tests run under both."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random fp32 checkpoint of a family: `checkpoint("llama")`."""
    from checkpoints import write_checkpoint

    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            write_checkpoint(written[family], family)
        return written[family]

    return folder


@pytest.fixture(scope="session")
def llama(checkpoint: Callable[[str], Path]) -> Path:
    """A tiny Llama."""
    return checkpoint("llama")
