"""Replicas in processes of their own: they serve like those in threads, and nothing of them outlives anything."""

from __future__ import annotations

import logging
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preble.engine.frames import FrameError, FrameWriter
from preble.engine.messages import Abort, Delta, Launch, Ready, StepReport, Submit
from preble.engine.options import EngineOptions
from preble.engine.source import EngineSource
from preble.errors import CheckpointError
from preble.replica import process, worker_stream
from preble.replica.process import ProcessReplica
from preble.sampling import SamplingParams

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc, which only Linux has")

PATIENCE = 60.0
"""Seconds until a test that waits for something has failed."""
OPTIONS = EngineOptions(dtype="float32", page_size=16, kv_memory="1MiB")


class Heard:
    """A listener that keeps what it is told, in order."""

    def __init__(self) -> None:
        self._told: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.pid = 0

    def ready(self, replica: Any, ready: Ready) -> None:
        self.pid = replica.process_id
        self._told.put(("ready", ready))

    def reported(self, replica: Any, report: StepReport) -> None:
        self._told.put(("reported", report))

    def failed(self, replica: Any, cause: BaseException) -> None:
        self._told.put(("failed", cause))

    def ended(self, replica: Any) -> None:
        self._told.put(("ended", replica))

    def next(self) -> tuple[str, Any]:
        return self._told.get(timeout=PATIENCE)

    def expect(self, kind: str) -> Any:
        told = self.next()
        assert told[0] == kind, told
        return told[1]

    def rest(self) -> list[str]:
        """What else it was told, when nothing more can come."""
        found = []
        while not self._told.empty():
            found.append(self._told.get()[0])
        return found


def launch_of(model: str, **others: Any) -> Launch:
    return Launch(model, 3, "cpu", sharing=1, torch_threads=1, options=OPTIONS, **others)


def submit(request_id: str, tokens: int = 5, **sampling: Any) -> Submit:
    token_ids = np.arange(2, 2 + tokens, dtype=np.int32)
    return Submit(request_id, token_ids, tokens, tokens + 20, SamplingParams(max_tokens=20, **sampling), seed=1)


def belongings() -> tuple[list[str], set[int]]:
    """Open file descriptors (by what they are) and threads of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(found), {thread.ident or 0 for thread in threading.enumerate()}


def nothing_came(before: tuple[list[str], set[int]]) -> None:
    """Nothing is left here. Threads of a pool that was idle before may have gone meanwhile."""
    files, threads = belongings()
    assert files == before[0]
    assert threads <= before[1]


def gone(pid: int) -> bool:
    """Whether no process of that id is left, not even an unburied one."""
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of made_worker.py."""
    monkeypatch.setattr(process, "WORKER_MODULE", "made_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@contextmanager
def running(model: str = "", **others: Any) -> Iterator[tuple[ProcessReplica, Heard]]:
    """A replica that is ready; afterwards nothing of it may be left, however it ended."""
    before = belongings()
    heard = Heard()
    replica = ProcessReplica(launch_of(model, **others), heard)
    try:
        heard.expect("ready")
        yield replica, heard
    finally:
        replica.kill()
        replica.join()
    assert gone(heard.pid)
    nothing_came(before)


def crash(what: str) -> BaseException:
    """Why a worker that was told to do this failed."""
    with running() as (replica, heard):
        replica.send(Abort(what))
        cause = heard.expect("failed")
        replica.send(Abort("too late"))
        heard.expect("ended")
        replica.join()
    assert heard.rest() == []
    assert isinstance(cause, BaseException)
    return cause


# The real worker


def test_a_process_serves_the_same_tokens_as_an_engine_here(llama: Path) -> None:
    requests = [submit("greedy", temperature=0.0), submit("seeded", tokens=40, logprobs=2, stop=("\x00\x00",))]
    engine = EngineSource(str(llama), OPTIONS).engine(3, "cpu", sharing=1)
    expected: list[Delta] = []
    for request in requests:
        engine.submit(request)
        while engine.has_work:
            expected += engine.step().deltas
    got: list[Delta] = []
    with running(str(llama), log_level=logging.INFO) as (replica, heard):
        for request in requests:
            replica.send(request)
            while not got or got[-1].request_id != request.request_id or got[-1].finish_reason is None:
                report = heard.expect("reported")
                assert report.replica == 3
                got += report.deltas
        replica.stop()
        replica.join()
        assert heard.rest() == ["ended"]
    assert [(one.request_id, one.token_ids, one.text, one.finish_reason) for one in got] == [
        (one.request_id, one.token_ids, one.text, one.finish_reason) for one in expected
    ]
    for one, other in zip(got, expected, strict=True):
        assert [logprob.token_id for logprob in one.logprobs] == [logprob.token_id for logprob in other.logprobs]


def test_an_error_in_loading_arrives_as_what_it_was(tmp_path: Path) -> None:
    before, heard = belongings(), Heard()
    replica = ProcessReplica(launch_of(str(tmp_path)), heard)
    cause = heard.expect("failed")
    assert type(cause) is CheckpointError
    assert str(cause).startswith(f"{tmp_path} has no config.json, so it is not a checkpoint as published on the hub")
    heard.expect("ended")
    replica.join()
    nothing_came(before)


# How a worker ends by itself


@pytest.mark.parametrize(
    ("what", "kind", "why"),
    [
        ("raise", RuntimeError, "replica 3: ValueError: the step went wrong"),
        ("exit", RuntimeError, r"replica 3: its process \d+ exited with code 7"),
        ("crash", RuntimeError, r"(?s)its process \d+ was killed by SIGSEGV; it printed last:.*made_worker.py.* in do"),
        ("garbage", FrameError, "the header of frame 1 is damaged"),
        ("nonsense", FrameError, "a frame holds no message"),
    ],
)
def test_what_ends_a_worker_is_told_once(made: None, what: str, kind: type[BaseException], why: str) -> None:
    cause = crash(what)
    assert type(cause) is kind
    assert re.search(why, str(cause))


def test_an_error_in_a_step_arrives_with_its_traceback(made: None, caplog: pytest.LogCaptureFixture) -> None:
    crash("raise")
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "preble.replica"
    assert re.search(r'made_worker.py", line \d+, in do\n    raise ValueError', logging.Formatter().format(record))


def test_a_worker_that_is_killed_is_told_of(made: None) -> None:
    with running() as (_, heard):
        os.kill(heard.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in str(heard.expect("failed"))
        heard.expect("ended")


class OneBitWrong(FrameWriter):
    """Damages every frame but the first."""

    def frame(self, payload: bytes) -> bytes:
        first = self._number == 0
        frame = bytearray(super().frame(payload))
        frame[-1] ^= 0 if first else 1
        return bytes(frame)


def test_a_worker_leaves_when_what_it_is_told_arrives_damaged(made: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_stream, "FrameWriter", OneBitWrong)
    with running() as (replica, heard):
        replica.send(submit("a"))
        assert str(heard.expect("failed")) == (
            "replica 3: preble.engine.frames.FrameError: the payload of frame 1 is damaged"
        )


def test_a_worker_that_cannot_be_started_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    before = belongings()
    for name, value, why in (
        ("WORKER_MODULE", "preble.no_such_module", r"exited with code 1; it printed last:\n .*No module named"),
        ("executable", "/no/such/python", "No such file"),
    ):
        heard = Heard()
        with monkeypatch.context() as patch:
            patch.setattr(sys if name == "executable" else process, name, value)
            replica = ProcessReplica(launch_of("model"), heard)
            cause = heard.expect("failed")
            replica.join()
        assert re.search(why, str(cause))
        assert heard.rest() == ["ended"]
    nothing_came(before)


# How it is ended


@pytest.mark.parametrize("end", [ProcessReplica.stop, ProcessReplica.kill])
@pytest.mark.parametrize("doing", ["nothing", "hang"])
def test_it_ends_when_it_shall_and_that_is_no_failure(
    made: None, monkeypatch: pytest.MonkeyPatch, end: Callable[[ProcessReplica], None], doing: str
) -> None:
    monkeypatch.setattr(process, "STOP_PATIENCE", 10 * PATIENCE)  # it leaves of its own accord
    with running() as (replica, heard):
        replica.send(Abort(doing))
        if doing == "nothing":
            heard.expect("reported")
        end(replica)
        replica.send(submit("too late"))
        end(replica)
        replica._thread.join(PATIENCE)
        assert gone(heard.pid)
        assert heard.rest() == ["ended"]


@pytest.mark.parametrize("end", [ProcessReplica.stop, ProcessReplica.kill])
def test_it_ends_while_it_starts(made: None, end: Callable[[ProcessReplica], None]) -> None:
    before, heard = belongings(), Heard()
    replica = ProcessReplica(launch_of("model"), heard)
    end(replica)
    replica.join()
    assert heard.rest() == ["ended"]
    nothing_came(before)


def test_a_stopped_process_is_killed_when_it_does_not_leave(made: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_PATIENCE", 0.05)
    with running() as (replica, heard):
        os.kill(heard.pid, signal.SIGSTOP)
        replica.stop()
        replica.join()
        assert gone(heard.pid)
        assert heard.rest() == ["ended"]


def test_it_ignores_interrupts_which_are_its_parents_business(made: None) -> None:
    with running() as (replica, heard):
        assert os.getpgid(heard.pid) == heard.pid
        os.kill(heard.pid, signal.SIGINT)
        replica.send(submit("a"))
        assert heard.expect("reported").deltas[0].request_id == "a"


# Between the two


def test_sending_to_a_stopped_process_never_waits(made: None) -> None:
    tokens, count = 1 << 16, 300  # 75 MiB: more than a socket holds, and more than a frame
    with running() as (replica, heard):
        os.kill(heard.pid, signal.SIGSTOP)
        for number in range(count):
            replica.send(submit(str(number), tokens))
        os.kill(heard.pid, signal.SIGCONT)
        deltas: list[Delta] = []
        while len(deltas) < count:
            deltas += heard.expect("reported").deltas
    assert [(delta.request_id, delta.token_ids) for delta in deltas] == [
        (str(number), (tokens,)) for number in range(count)
    ]


def test_what_it_logs_is_logged_here(made: None, caplog: pytest.LogCaptureFixture) -> None:
    with running() as (replica, heard):
        replica.send(Abort("log"))
        heard.expect("reported")
    records = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert ("preble.engine", "WARNING", "replica 3: a word of the engine") in records
    (error,) = [text for name, level, text in records if (name, level) == ("preble", "ERROR")]
    assert error.startswith("replica 3: an error that is no failure\nTraceback")
    assert error.endswith("KeyError: 'lost'")
    assert ("preble.worker", "WARNING", "replica 3: printed, as nobody else handles it") in records
    assert "too quiet" not in caplog.text


def test_what_it_prints_is_logged_here_in_lines_of_bounded_length(made: None, caplog: pytest.LogCaptureFixture) -> None:
    def printed() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "preble.worker"]
        assert all(line.startswith("replica 3: ") for line in lines)
        return [line.removeprefix("replica 3: ") for line in lines]

    with running() as (replica, heard):
        replica.send(Abort("print"))
        heard.expect("reported")
        assert "y" * 2000 in printed()  # its line has not ended yet
        replica.stop()
        replica.join()
    texts = printed()
    assert texts[0] == "on stdout"
    assert "".join(texts[1:]) == "on stderr, and long: " + "x" * 5000 + "y" * 5000
    assert max(map(len, texts)) <= 2000


# When the parent goes

PARENT = """
import os, sys
from preble.engine.messages import Launch
from preble.engine.options import EngineOptions
from preble.replica import process

process.WORKER_MODULE = "made_worker"

class Listener:
    def ready(self, replica, ready):
        print(replica.process_id, flush=True)
    def reported(self, replica, report):
        print("reported", flush=True)
    def failed(self, replica, cause):
        print("failed", cause, flush=True)
    def ended(self, replica):
        pass

replica = process.ProcessReplica(Launch("", 3, "cpu", 1, 1, EngineOptions()), Listener())
"""
FORKS = """
from preble.engine.messages import Abort

input()
child = os.fork()
if child == 0:
    sys.exit()  # at which it ends what it takes for its replicas
os.waitpid(child, 0)
replica.send(Abort("nothing"))
"""


@contextmanager
def parent(rest: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program with a replica that is ready, and a handle of the replica's process."""
    paths = [Path(process.__file__).parents[2], Path(__file__).parent]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT + rest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    ) as program:
        assert program.stdout is not None
        worker = os.pidfd_open(int(program.stdout.readline()))
        try:
            yield program, worker
        finally:
            program.kill()
            os.close(worker)


def ended(pidfd: int, *, patience: float = PATIENCE) -> bool:
    """Whether the process ends; waits for it."""
    return bool(select.select([pidfd], [], [], patience)[0])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_dies_with_a_parent_that_is_killed(stopped: bool) -> None:
    with parent("input()") as (program, worker):
        if stopped:
            signal.pidfd_send_signal(worker, signal.SIGSTOP)
        program.kill()
        assert ended(worker)


def test_a_process_dies_with_its_parent_even_where_a_fork_holds_the_parents_end() -> None:
    with parent("input()\nif os.fork(): print('forked', flush=True)\ninput()") as (program, worker):
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "forked\n"
        program.kill()
        assert ended(worker)


@pytest.mark.parametrize("rest", ["input()", "import asyncio; asyncio.run(asyncio.sleep(0)); input()"])
def test_a_program_that_just_ends_leaves_no_process_and_no_noise(rest: str) -> None:
    with parent(rest) as (program, worker):
        assert program.communicate("\n", timeout=PATIENCE) == ("", "")
        assert program.returncode == 0
        assert ended(worker, patience=0)


def test_a_program_that_ends_without_a_word_leaves_no_process() -> None:
    with parent("input(); os._exit(0)") as (program, worker):
        assert program.communicate("\n", timeout=PATIENCE) == ("", "")
        assert ended(worker)


def test_a_fork_of_the_parent_does_not_disturb_its_replicas() -> None:
    with parent(FORKS + "input()") as (program, worker):
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "reported\n"
        assert program.communicate("\n", timeout=PATIENCE) == ("", "")
        assert ended(worker)
