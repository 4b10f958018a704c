"""The parent's side of a peer process."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import preble
from preble.bench.peers.worker import Trace, Work
from preble.errors import PrebleError

MODULES = {"preble": "ours", "hf": "hf", "llama.cpp": "llamacpp"}
"""The module of `preble.bench.peers` that runs each peer."""
SPIN = 10_000
"""`GOMP_SPINCOUNT`: threads spin this often before they sleep. Endless spinning stalls on a busy machine, none at all
costs a third of the decode speed; every peer gets the same."""
PATIENCE = 10.0
"""Seconds a peer may take to leave after its stdin is closed."""


class PeerFailed(PrebleError):
    """A peer's process could not start or ended; the message has the last line that it wrote to stderr."""


class PeerProcess:
    """A running peer; `with` ends it.

    Args:
        name: a key of `MODULES`.
        python: the interpreter that has the peer's packages.
        checkpoint: the model, written by `preble.bench.shapes.write_checkpoint`.
        folder: a scratch folder of the benchmark.

    Raises:
        PeerFailed: the peer did not start: its package is missing, say.
    """

    def __init__(self, name: str, python: str, checkpoint: Path, folder: Path, threads: int) -> None:
        self.name = name
        self._errors = folder / f"{name}.stderr"
        # -P: the current folder must not shadow a peer's packages.
        command = [python, "-P", "-m", f"preble.bench.peers.{MODULES[name]}", str(checkpoint), str(threads)]
        with self._errors.open("wb") as errors:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=_environment(folder, threads),
                )
            except OSError as error:
                raise PeerFailed(f"{name} did not start: {error}") from None
        try:
            hello = self._read()
        except BaseException:
            self._end()
            raise
        self.versions: dict[str, str] = hello["versions"]
        self.settings: dict[str, str] = hello["settings"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, work: Work) -> Trace:
        """Do the work in the peer and wait for it."""
        assert self._process.stdin is not None
        message = {"prompts": work.prompts, "new_tokens": work.new_tokens, "shared": work.shared}
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return Trace(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> PeerFailed:
        self._end()
        lines = [line for line in self._errors.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {self._process.returncode}"
        return PeerFailed(f"{self.name} ended: {reason}")

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _environment(folder: Path, threads: int) -> dict[str, str]:
    """The same for every peer: threads, their waiting, and this very `preble` importable but nothing beside it."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    link = source / "preble"
    if not link.exists():
        link.symlink_to(Path(preble.__file__).parent, target_is_directory=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return environment | {
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": str(SPIN),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
