"""Runs the jobs of a tournament side by side, each once.

The rates of a tournament are multiples of saturation. **Saturation** of a fleet on a trace is the rate at which a
router that reuses prefixes well (`pmc`) keeps every replica busy all the time: in a run in which all requests arrive at
once, so that batches are as full as they can be, the requests completed, divided by the mean of the replicas' busy
seconds. So it is a property of trace, cost model and number of replicas. What round robin can do would not serve: where
prompts are long and shared it is a fraction of that, and all of its multiples would be light loads for everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import fmean

from preble.bench.sim.entry import Entry
from preble.bench.sim.job import Job, Row
from preble.bench.sim.results import Results
from preble.bench.sim.setting import Setting
from preble.bench.sim.source import AT_ONCE
from preble.bench.sim.worker import PeerFailed, perform, prepare
from preble.errors import InvalidRequest, PrebleError
from preble.progress import progress_bar

SATURATED_BY = Entry("pmc", "hrrn")


@dataclass(frozen=True, slots=True)
class Tournament:
    """Every entry on every setting."""

    settings: Sequence[Setting]
    entries: Sequence[Entry]
    results: Results
    peer_python: str
    """The interpreter that has the packages of peers."""
    processes: int

    def run(self) -> list[str]:
        """Run what has not been run; what is done stays done whatever happens. Returns what went wrong: a peer that
        does not run here is left out, and a run that fails does not keep the others from being made.

        Raises:
            InvalidRequest: a trace cannot be read, or something named does not exist.
            PrebleError: a process of the pool died.
        """
        with self._pool() as pool:
            wrong = self._run(pool, [self.saturation_job(setting) for setting in self.settings if setting.rate is None])
            return wrong or self._run(pool, list(self.jobs()))

    def jobs(self) -> Iterator[Job]:
        """All of them; the saturations must be known."""
        for setting in self.settings:
            rate = self.rate(setting)
            yield Job(setting, None, rate)
            for entry in self.entries:
                yield Job(setting, entry, rate)

    def rate(self, setting: Setting) -> float:
        """Requests per second.

        Raises:
            InvalidRequest: the saturation has not been measured yet, with these sources.
        """
        return setting.load * (self.saturation(setting) if setting.rate is None else setting.rate)

    def saturation(self, setting: Setting) -> float:
        """Requests per second that saturate the fleet of a setting.

        Raises:
            InvalidRequest: as `rate`.
        """
        row = self.results.get(self.saturation_job(setting))
        if row is None:
            raise InvalidRequest(f"{self.results.path}: no run says yet what saturates {setting.name}")
        figures = row["figures"]
        return float(figures["completed"] / fmean(figures["busy_seconds"]))

    @staticmethod
    def saturation_job(setting: Setting) -> Job:
        """The run that measures it. It is the same for all loads and conditions."""
        return Job(replace(setting, load=1.0, condition="plain"), SATURATED_BY, AT_ONCE)

    def _run(self, pool: ProcessPoolExecutor, jobs: list[Job]) -> list[str]:
        jobs = list({job.key: job for job in jobs if self.results.get(job) is None}.values())
        jobs.reverse()
        running: dict[Future[Row], Job] = {}
        left_out: set[str] = set()
        wrong: list[str] = []
        with progress_bar(len(jobs), shown=True, label="runs") as advance:
            while jobs or running:
                # Few at a time, so that there is little to give up when somebody interrupts.
                while jobs and len(running) < 2 * self.processes:
                    job = jobs.pop()
                    if job.entry is not None and job.entry.peer in left_out:
                        advance()
                    else:
                        running[pool.submit(perform, job, self.peer_python)] = job
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(done)
                    advance()
                    try:
                        row = done.result()
                    except InvalidRequest:
                        raise
                    except BrokenProcessPool:
                        raise PrebleError(
                            f"a process died, perhaps for want of memory, about when it ran {job.name}; what was "
                            f"finished is in {self.results.path}"
                        ) from None
                    except PeerFailed as error:
                        assert job.entry is not None
                        assert job.entry.peer is not None
                        if job.entry.peer not in left_out:
                            left_out.add(job.entry.peer)
                            wrong.append(f"{job.entry.peer} is left out: {error}")
                    except Exception as error:
                        wrong.append(f"{job.name} failed: {error!r}")
                    else:
                        self.results.add(row)
                        if row["key"] != job.key:
                            wrong.append(f"{job.name} is of other sources, which changed meanwhile: run it again")
        return wrong

    @contextmanager
    def _pool(self) -> Iterator[ProcessPoolExecutor]:
        pool = ProcessPoolExecutor(self.processes, get_context("spawn"), prepare)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
