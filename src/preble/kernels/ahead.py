"""Compiles launches for chips that this machine lacks, and says what they would use of them.

What is compiled is what would be compiled at run time: Triton's own launch path runs up to the loading of the binary,
against a driver that only names a chip, so that the specialisation of arguments (divisible by 16, equal to 1, not
specialised) and the options of ptxas are Triton's, of whichever version is installed. Tensors on the device "meta" will
do: their `data_ptr()` is their offset, as if the storage began at an aligned address, as real storage does.

    python -m preble.kernels.ahead [--architecture sm_90] [--only NAME]... [--full] [--jobs N] [--json OUT]

compiles every shipped variant (`preble.kernels.variants`), prints a table and returns 1 if any fails, spills, exceeds
the chip, or is compiled again for another batch size. It needs no GPU, and the environment without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from preble.errors import DeviceError
from preble.kernels.architecture import KIB, SM_80, SM_90, Architecture, assume
from preble.kernels.launch import Launch, recorded_launches
from preble.kernels.variants import Variant

ARCHITECTURES = {architecture.name: architecture for architecture in (SM_80, SM_90)}
SIZES = (1, 2, 3, 16, 48)
"""Batch sizes at which each variant is called: equal to 1, divisible by 16 and neither."""
REGISTERS = 65536
"""32-bit registers of a streaming multiprocessor, on every architecture: a program must fit."""

_PTXAS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack_frame": r"(\d+) bytes stack frame",
}
_WIDE_LOAD = re.compile(r"\bld\.global\S*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b|\bcp\.async\.cg\.shared\.global")
_LOAD = re.compile(r"\bld\.global\b|\bcp\.async\.c[ag]\.shared\.global")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    """32-bit registers per thread."""
    spill_stores: int
    """Bytes of registers that a thread writes to local memory for want of room."""
    spill_loads: int
    """Bytes of them that it reads again."""
    stack_frame: int
    """Bytes of local memory of a thread, spills included."""
    shared_memory: int
    """Bytes per program."""
    wgmma: int
    """Matrix products by a group of four warps, in the PTX."""
    mma: int
    """Matrix products by one warp, in the PTX."""
    wide_loads: int
    """Loads from global memory of 16 bytes per thread, in the PTX."""
    loads: int
    """All loads from global memory, in the PTX."""
    ptx_bytes: int
    """Size of the PTX text."""
    seconds: float
    """What compiling took."""

    def faults(self, architecture: Architecture, warps: int) -> list[str]:
        """Why this should not be shipped, in words; empty when it may be."""
        faults = []
        if self.spill_stores or self.spill_loads:
            faults.append(f"spills {self.spill_stores} bytes and reads {self.spill_loads}")
        elif self.stack_frame:
            faults.append(f"keeps {self.stack_frame} bytes per thread in local memory")
        if self.shared_memory > architecture.shared_memory:
            limit = architecture.shared_memory / KIB
            faults.append(f"needs {self.shared_memory / KIB:.1f} KiB of shared memory, of {limit:g}")
        if self.registers * warps * 32 > REGISTERS:
            faults.append(f"needs {self.registers} registers for each of {warps * 32} threads, of {REGISTERS}")
        return faults


@dataclass(frozen=True, slots=True)
class Compilation:
    """A kernel of a variant, compiled for an architecture."""

    variant: str
    """The first variant that launches it."""
    size: int
    """The batch size at which it does."""
    kernel: str
    architecture: str
    warps: int
    stages: int
    specialisation: str
    """Triton's key: types, constants, divisibility of the arguments, and options."""
    resources: Resources | None
    """None if it could not be compiled."""
    faults: list[str]
    """Why it should not be shipped."""

    def __str__(self) -> str:
        what = "; ".join(self.faults) or "in order"
        return f"{self.variant}: {self.kernel} on {self.architecture} at batch size {self.size}: {what}"


class _Chip:
    """In the place of Triton's driver: there is no device, but it has a name."""

    def __init__(self, architecture: Architecture) -> None:
        capability = int(architecture.name.removeprefix("sm_"))
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """The key of Triton's caches in memory, which no device of this machine has."""
        return f"ahead:{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _on_chip(launch: Launch, architecture: Architecture) -> Iterator[None]:
    """Within it, Triton believes that the chip is there; afterwards it has forgotten what it compiled."""
    if not isinstance(launch.kernel, JITFunction):
        raise DeviceError(
            f"{launch.kernel} is not a compiled kernel: TRITON_INTERPRET is set. Unset it before starting Python"
        )
    chip, actual = _Chip(architecture), driver._active
    driver.set_active(chip)
    try:
        yield
    finally:
        driver.set_active(actual)
        launch.kernel.device_caches.pop(chip.get_current_device(), None)


def _warm_up(launch: Launch) -> Any:
    return launch.kernel.warmup(grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages, **launch.arguments)


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What Triton compiles a kernel for: two launches of a kernel with the same key share the binary."""

    key: str
    """Triton's: types, constants and divisibility of the arguments, and options."""
    arguments: dict[str, tuple[str, ...]]
    """The same by argument: its type, what it is divisible by, its value if that is a constant."""

    def differences(self, other: Specialisation) -> list[str]:
        """The arguments for which another binary is needed."""
        return [name for name, what in self.arguments.items() if what != other.arguments[name]]


def specialisation(launch: Launch, architecture: Architecture) -> Specialisation:
    """What Triton would compile for `launch`.

    Raises `DeviceError` where kernels are interpreted.
    """
    found: list[Specialisation] = []

    def stop(*, key: str, compile: dict[str, Any], **_: object) -> bool:
        (attributes,) = compile["configs"]
        arguments = {
            name: (
                str(kind),
                *(str(about[(index,)]) for about in (attributes, compile["constants"]) if (index,) in about),
            )
            for index, (name, kind) in enumerate(compile["signature"].items())
        }
        found.append(Specialisation(key, arguments))
        return True

    with _on_chip(launch, architecture), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = stop
        _warm_up(launch)
    return found[0]


def compile_launch(launch: Launch, architecture: Architecture) -> Resources:
    """Compile what `launch` would run on `architecture`, whatever any cache holds.

    Raises `DeviceError` where kernels are interpreted, and what Triton raises for a kernel that it cannot compile.
    """
    log = io.StringIO()
    with ExitStack() as scope:
        folder = scope.enter_context(tempfile.TemporaryDirectory())
        for group in (knobs.cache, knobs.nvidia):
            scope.enter_context(group.scope())
        scope.enter_context(_on_chip(launch, architecture))
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True  # printed, and nowhere else to be had
        scope.enter_context(redirect_stdout(log))
        started = time.perf_counter()
        kernel = _warm_up(launch)
        seconds = time.perf_counter() - started
        ptx = kernel.asm["ptx"]
    figures = {name: _figure(pattern, log.getvalue()) for name, pattern in _PTXAS.items()}
    return Resources(
        **figures,
        shared_memory=kernel.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async."),
        mma=len(re.findall(r"\bmma\.sync\.", ptx)),
        wide_loads=len(_WIDE_LOAD.findall(ptx)),
        loads=len(_LOAD.findall(ptx)),
        ptx_bytes=len(ptx),
        seconds=seconds,
    )


def _figure(pattern: str, log: str) -> int:
    """The largest match: functions that were not inlined have lines of their own."""
    matches = re.findall(pattern, log)
    if not matches:
        raise DeviceError(f"ptxas printed nothing like {pattern!r}, but {log!r}; this Triton version is not known")
    return max(map(int, matches))


@dataclass(frozen=True, slots=True)
class _Task:
    """One compilation to be done in another process, to which launches cannot be sent: it records them again."""

    module: str
    variant: str
    size: int
    index: int
    """Among the launches of the call."""
    architecture: str
    kernel: str
    specialisation: str
    faults: tuple[str, ...]


def _launches(variant: Variant, size: int, architecture: Architecture) -> list[Launch]:
    with assume(architecture), recorded_launches() as launches:
        variant.call(size)
    return launches


def _tasks(module: str, variants: Iterable[Variant], architecture: Architecture) -> Iterator[_Task]:
    """What has to be compiled, each specialisation once, with those that should not be there marked."""
    seen: set[tuple[str, str]] = set()
    for variant in variants:
        own: dict[str, dict[str, Specialisation]] = {}
        for size in SIZES:
            for index, launch in enumerate(_launches(variant, size, architecture)):
                found, kernel = specialisation(launch, architecture), launch.kernel.__name__
                known = own.setdefault(kernel, {})
                faults: tuple[str, ...] = ()
                if found.key not in known and len(known) >= variant.specialisations.get(kernel, 1):
                    before = next(reversed(known.values()))
                    faults = (f"is compiled again at this batch size, for {', '.join(found.differences(before))}",)
                known.setdefault(found.key, found)
                if (kernel, found.key) in seen and not faults:
                    continue
                seen.add((kernel, found.key))
                yield _Task(module, variant.name, size, index, architecture.name, kernel, found.key, faults)


def _compile_task(task: _Task, full: bool) -> Compilation:
    architecture = ARCHITECTURES[task.architecture]
    variant = next(v for v in _variants(task.module, full) if v.name == task.variant)
    launch = _launches(variant, task.size, architecture)[task.index]
    resources: Resources | None = None
    faults = list(task.faults)
    try:
        resources = compile_launch(launch, architecture)
    except Exception as error:  # whatever Triton raises is the finding
        faults.append(f"cannot be compiled: {type(error).__name__}: {error}")
    else:
        faults += resources.faults(architecture, launch.warps)
    return Compilation(
        task.variant, task.size, task.kernel, task.architecture, launch.warps, launch.stages, task.specialisation,
        resources, faults,
    )  # fmt: skip


@cache
def _variants(module: str, full: bool) -> Sequence[Variant]:
    """Listed once in a process: to find the pairs of options takes as long as a tenth of compiling a kernel."""
    return tuple(importlib.import_module(module).variants(full))


def check(
    *,
    architectures: Sequence[Architecture] = (SM_80, SM_90),
    only: Sequence[str] = (),
    full: bool = False,
    jobs: int = 2,
    module: str = "preble.kernels.variants",
) -> list[Compilation]:
    """Compile the variants whose names contain any of `only`, each specialisation once, in `jobs` processes; a single
    job is done by this one.

    `full` takes the full product of options. `module` has a function `variants(full)`. Raises `DeviceError` where
    kernels are interpreted.
    """
    chosen = [variant for variant in _variants(module, full) if not only or any(name in variant.name for name in only)]
    tasks = (task for architecture in architectures for task in _tasks(module, chosen, architecture))
    if jobs == 1:
        compilations = [_compile_task(task, full) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            running = [pool.submit(_compile_task, task, full) for task in tasks]
            compilations = [future.result() for future in as_completed(running)]
    return sorted(compilations, key=lambda done: (done.kernel, done.architecture, done.variant, done.size))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if anything should not be shipped."""
    parser = argparse.ArgumentParser("python -m preble.kernels.ahead", description="compile kernels without a GPU")
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="variants whose name contains NAME; repeatable"
    )
    parser.add_argument("--full", action="store_true", help="the full product of options: many minutes")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure there")
    parser.add_argument("--variants", default="preble.kernels.variants", metavar="MODULE", help="whose variants()")
    options = parser.parse_args(arguments)
    chosen = [ARCHITECTURES[name] for name in options.architecture or ARCHITECTURES]
    started = time.perf_counter()
    try:
        compilations = check(
            architectures=chosen, only=options.only, full=options.full, jobs=options.jobs, module=options.variants
        )
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([asdict(compilation) for compilation in compilations], indent=1))
    _print(compilations)
    faulty = [compilation for compilation in compilations if compilation.faults]
    print(f"{len(compilations)} compiled in {time.perf_counter() - started:.0f} s, {len(faulty)} not in order")
    for compilation in faulty:
        print(compilation)
    return 1 if faulty else 0


_COLUMNS = "{:26} {:60} {:6} {:>4} {:>9} {:>6} {:>10} {:>9} {:>9} {:>7}"


def _print(compilations: Iterable[Compilation]) -> None:
    """One line each, the same width on every terminal, so that runs can be compared."""
    print(
        _COLUMNS.format(*"kernel variant target regs warps/stg spills shared/KiB wgmma/mma 16B/loads seconds".split())
    )
    for done in compilations:
        used = done.resources
        if used is None:
            figures = ["-", f"{done.warps}/{done.stages}", *["-"] * 5]
        else:
            figures = [
                str(used.registers), f"{done.warps}/{done.stages}", str(used.spill_stores + used.spill_loads),
                f"{used.shared_memory / KIB:.1f}", f"{used.wgmma}/{used.mma}", f"{used.wide_loads}/{used.loads}",
                f"{used.seconds:.2f}",
            ]  # fmt: skip
        print(_COLUMNS.format(done.kernel, done.variant, done.architecture, *figures))


if __name__ == "__main__":
    # Through the import, so that what the processes exchange is of one module, not of `__main__`.
    from preble.kernels import ahead

    raise SystemExit(ahead.main())
