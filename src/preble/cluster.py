"""The cluster: what an application embeds. One engine per replica, one scheduler over them, an async front."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack

import anyio
import anyio.lowlevel
import anyio.to_thread

from preble.admission import Admission
from preble.engine.options import EngineOptions
from preble.errors import ClusterStateError, InvalidRequest, PrebleError, shown
from preble.keywords import REQUESTS, explains_keywords
from preble.outputs import ClusterStats, GenerationOutput
from preble.prompts import Prompt
from preble.reception import Message, Reception
from preble.request_options import RequestOptions, SamplingOptions
from preble.sampling import REQUEST_OPTIONS, SamplingParams
from preble.stream import Stream
from preble.terms import Terms

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from preble.dispatcher import Dispatcher
    from preble.health import ClusterHealth
    from preble.replica.launch import Launcher
    from preble.sched.policies import Policy

STARTED_AT_ONCE = 16
"""Requests that `generate_many` starts in a turn of the event loop."""
TERMS = {field.name for field in fields(Terms)}
"""The options of a request that are no sampling."""


@explains_keywords({REQUESTS: REQUEST_OPTIONS | {field.name for field in fields(SamplingParams)}})
class Cluster:
    """Serves a model on several replicas; `async with` starts and stops them.

    ```python
    async with preble.Cluster("path/to/model", replicas=2) as cluster:
        output = await cluster.generate("Once upon a time", max_tokens=64)
    ```

    Args:
        model: a checkpoint folder, a hub id whose files are in the local cache or can be fetched, or `"demo"`, the
            built-in model.
        replicas: how many engines; one per device by default.
        devices: torch device names, one per replica or fewer (then shared in turn); by default every visible GPU, or
            the CPU where there is none.
        policy: name of a placement policy, or an object of your own (`preble.sched.Policy`).
        local_order: how a replica serves what waits there: `"hrrn"` (short prompts first, with ageing), `"preble"`
            (groups by the share of the prompt that is cached) or `"fcfs"`.
        workers: `"process"` runs each replica in a process of its own, so that a crash of one harms nobody else;
            `"thread"` runs them as threads of this process. `"auto"` takes processes where every replica has a GPU to
            itself, else threads: those of one device share the weights.
        dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`. `"auto"` takes the checkpoint's own type where the
            device computes in it, else float32.
        attention: how a GPU attends: `"triton"` (our kernels), `"flash-attn"` (the package, where it is installed),
            `"torch"` (slow, to compare with); `"auto"` chooses.
        page_size: tokens in a KV page; prefixes are shared in whole pages. On a GPU a power of two from 16 to 256.
        kv_memory: bytes of KV per replica, or a string such as `"2GiB"`. By default, on a GPU what weights, activations
            and CUDA graphs leave of it; on the CPU a quarter of the free memory, at most 4 GiB each. Replicas of one
            device share.
        kv_dtype: `"fp8"` stores K and V in 8 bits (e4m3, a scale per layer and head), on a GPU; `"auto"` stores them
            in `dtype`.
        max_batched_tokens: tokens one step computes at most; prompts are cut into chunks of this. By default 8192 on a
            GPU, 1024 on the CPU.
        max_running: requests that one replica runs at once, at most.
        max_pending: requests in flight, at most, a request counting `n` times. Memory grows with this, however fast
            requests arrive: a prompt is tokenized only when it is the request's turn.
        overload: what happens to requests beyond that. `"wait"`: they wait for their turn, by priority, deadline and
            age. `"refuse"`: `generate` and `stream` raise `ClusterOverloaded`, and only `generate_many` waits.
        hang_timeout: seconds without a step, with requests to work on, after which a replica counts as failed; more
            than the longest step takes.
        restart_timeout: seconds that requests wait for a replica when none is up, and that a restart may take.
        seed: makes placement ties and unseeded sampling repeatable.

    A replica that crashes, is killed, hangs or runs out of memory is taken out, and started again with backoff. Its
    requests go on elsewhere from the tokens delivered, with the same continuation; see `docs/operations.md`.

    Raises:
        CheckpointError: on entering, when the model cannot be loaded.
        DeviceError: on entering, when a device does not exist or has too little memory.
        InvalidRequest: at once, when an argument is out of range; on entering, when there is no such policy or order.
    """

    def __init__(
        self,
        model: str | PathLike[str] = "demo",
        *,
        replicas: int | None = None,
        devices: Sequence[str] | None = None,
        policy: str | Policy = "e2",
        local_order: str = "hrrn",
        workers: Literal["auto", "thread", "process"] = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        page_size: int = 64,
        kv_memory: int | str | None = None,
        kv_dtype: str = "auto",
        max_batched_tokens: int | None = None,
        max_running: int = 256,
        max_pending: int = 4096,
        overload: Literal["wait", "refuse"] = "wait",
        hang_timeout: float = 60.0,
        restart_timeout: float = 300.0,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("replicas", replicas),
            ("page_size", page_size),
            ("max_batched_tokens", max_batched_tokens),
            ("max_running", max_running),
            ("max_pending", max_pending),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidRequest(f"{name} must be a positive integer, not {shown(value)}")
        for name, limit in (("hang_timeout", hang_timeout), ("restart_timeout", restart_timeout)):
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
                raise InvalidRequest(f"{name} must be a positive number of seconds, not {limit!r}")
        if workers not in ("auto", "thread", "process"):
            raise InvalidRequest(f"workers must be 'auto', 'thread' or 'process', not {workers!r}")
        if overload not in ("wait", "refuse"):
            raise InvalidRequest(f"overload must be 'wait' or 'refuse', not {overload!r}")
        if isinstance(devices, str):
            raise InvalidRequest(f"devices must be a sequence of names, such as [{devices!r}]")
        if devices is not None and not isinstance(devices, Sequence):
            raise InvalidRequest(
                f"devices must be a sequence of names, such as ['cuda:0', 'cuda:1'], not {shown(devices)}; replicas=… "
                "says how many engines there are"
            )
        if devices is not None and not devices:
            raise InvalidRequest("devices is empty; leave it out to use every GPU, or the CPU")
        if not isinstance(model, str | os.PathLike):
            raise InvalidRequest(f"model must be a folder, a hub id or 'demo', not {shown(model)}")
        self._model = model
        self._policy = policy
        self._replicas = replicas
        self._devices = devices
        self._workers = workers
        self._hang_timeout = hang_timeout
        self._restart_timeout = restart_timeout
        self._options = EngineOptions(
            dtype=dtype,
            page_size=page_size,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
            attention=attention,
            max_batched_tokens=max_batched_tokens,
            max_running=max_running,
            local_order=local_order,
        )
        self._door = Admission(max_pending, refuses=overload == "refuse")
        self._seed = seed
        self._state: Literal["new", "open", "closed"] = "new"

    # Starting and stopping

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise ClusterStateError("a cluster is entered once; make a new one")
        self._thread, self._loop = threading.get_ident(), anyio.lowlevel.current_token()
        try:
            devices, launcher, dispatcher = await anyio.to_thread.run_sync(self._prepare)
        except PrebleError as error:
            raise _plainly(error) from error.__cause__
        self._dispatcher = dispatcher()
        self._reception = Reception(
            launcher.tokenizer,
            launcher.config,
            self._dispatcher,
            self._door,
            seed=self._seed,
            must_be_open=self._must_be_open,
        )
        try:
            await self._dispatcher.add(devices)
        except BaseException as error:
            self._state = "closed"
            await self._stop()
            if isinstance(error, PrebleError):
                raise _plainly(error) from error.__cause__
            raise
        self._state = "open"
        return self

    def _prepare(self) -> tuple[list[torch.device], Launcher, Callable[[], Dispatcher]]:
        """Everything before the first replica starts that needs no event loop, the imports above all: they take a
        second."""
        from preble.dispatcher import Dispatcher
        from preble.replica.devices import place_replicas
        from preble.replica.launch import Launcher
        from preble.sched import GlobalScheduler
        from preble.sched.orders import find_order
        from preble.sched.policies import make_policy

        policy = make_policy(self._policy)
        find_order(self._options.local_order)
        devices = place_replicas(self._replicas, self._devices)
        launcher = Launcher(os.fspath(self._model), devices, self._workers, self._options)
        scheduler = GlobalScheduler(
            replicas=0,
            capacity_tokens=self._options.page_size,
            page_size=self._options.page_size,
            policy=policy,
            seed=self._seed,
        )
        times = {"hang_timeout": self._hang_timeout, "restart_timeout": self._restart_timeout}
        return devices, launcher, partial(Dispatcher, launcher, scheduler, **times)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "closed"
        await self._stop()

    if not TYPE_CHECKING:  # a type checker finds this mistake before it is made

        def __enter__(self) -> NoReturn:
            raise ClusterStateError("a cluster is entered with `async with`, not `with`, inside an `async def`")

        def __exit__(self, *_: object) -> None:
            raise AssertionError("a `with` block of a cluster is never entered")

    async def shutdown(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those in flight have ended; for `timeout` seconds at most, after which
        the rest fail with `ClusterStateError`, as those do that still wait for their turn. A cluster that is paused
        goes on for that. To be called inside the cluster's block, as its last act."""
        self._must_be_open()
        _check_patience(timeout)
        self._state = "closed"
        with anyio.move_on_after(timeout):
            await self._dispatcher.pause(False)
            await self._dispatcher.finish()
        await self._stop()

    async def _stop(self) -> None:
        self._dispatcher.close(lambda request_id: ClusterStateError(f"request {request_id!r}: the cluster was closed"))
        await self._dispatcher.roster.join()

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
        request_id: str | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationOutput:
        """Generate from a prompt and wait for the whole result.

        Args:
            prompt: text, or a sequence or numpy array of token ids. Text gets the special tokens that the checkpoint's
                tokenizer adds.
            sampling: a `SamplingParams`; `options` are laid over it.
            priority: higher is served first.
            timeout: seconds until `RequestTimeout`, waiting included.
            namespace: prefixes are shared only between requests of one namespace (a tenant, say).
            request_id: your own name for the request, unique among those in flight.
            session: a name for the conversation or agent it belongs to, unique within the namespace; a hint that keeps
                it on one replica where that costs nothing.
            expected_tokens: how many tokens it will probably generate; a hint, learned per prefix where it is left out,
                and never a limit.
            options: any field of `SamplingParams` by keyword.

        Cancelling the task that waits here aborts the request; its pages are free by the engine's next step.

        Raises:
            InvalidRequest: before any work is queued, when an argument is out of range.
            PromptTooLong: … or the prompt leaves no room for a token.
            ClusterOverloaded: `max_pending` requests are in flight, and `overload="refuse"`.
            RequestTimeout: `timeout` passed; what had been generated is in its `partial`.
            RequestFailed: the engine could not continue this one request.
            ReplicaCrashed: replicas failed under it, or none came up for it.
            ClusterStateError: the cluster is not entered, or was left meanwhile.
        """
        stream = self.stream(
            prompt,
            sampling=sampling,
            priority=priority,
            timeout=timeout,
            namespace=namespace,
            request_id=request_id,
            session=session,
            expected_tokens=expected_tokens,
            **options,
        )
        return await stream.finish()

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
        request_id: str | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Like `generate`, in chunks: `async for chunk in cluster.stream(…)`, or `async with` around it.

        Arguments are checked at once; the prompt itself when iteration starts.
        """
        terms = Terms(priority, timeout, namespace, request_id, session, expected_tokens)
        self._must_be_open()
        return self._reception.prompt(prompt, sampling, options, terms)

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
        request_id: str | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationOutput:
        """Answer a conversation, laid out by the checkpoint's chat template.

        Args:
            messages: `{"role": …, "content": …}` mappings, oldest first.
            tools: tool descriptions (JSON schemas), for templates that know them.

        The rest, and what it raises, is as in `generate`.
        """
        stream = self.stream_chat(
            messages,
            tools=tools,
            sampling=sampling,
            priority=priority,
            timeout=timeout,
            namespace=namespace,
            request_id=request_id,
            session=session,
            expected_tokens=expected_tokens,
            **options,
        )
        return await stream.finish()

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
        request_id: str | None = None,
        session: str | None = None,
        expected_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Like `chat`, in chunks."""
        terms = Terms(priority, timeout, namespace, request_id, session, expected_tokens)
        self._must_be_open()
        return self._reception.chat(messages, tools, sampling, options, terms)

    async def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        progress: bool = False,
        return_exceptions: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[Any]:
        """Generate from many prompts at once; results are in the order of the prompts.

        Args:
            prompts: as for `generate`; `options` hold for all of them. They wait for their turn, whatever `overload`.
            progress: show a progress bar when standard error is a terminal.
            return_exceptions: put a failed prompt's error in its place, instead of raising the first one and aborting
                the rest.
        """
        from preble.progress import progress_bar

        if isinstance(prompts, str):
            raise InvalidRequest(f"generate_many takes several prompts; use generate for one, such as {shown(prompts)}")
        if not isinstance(prompts, Iterable):
            raise InvalidRequest(f"generate_many takes several prompts, such as a list of them, not {shown(prompts)}")
        given: dict[str, Any] = {**options}
        shared = {name: given.pop(name) for name in TERMS & given.keys()}
        sampling = given.pop("sampling", None)
        todo = list(prompts)
        outputs: list[Any] = [None] * len(todo)
        pending = iter(enumerate(todo))
        errors: list[BaseException] = []

        async def work() -> None:
            for index, prompt in pending:
                try:
                    self._must_be_open()
                    stream = self._reception.prompt(prompt, sampling, given, Terms(**shared), patient=True)
                    outputs[index] = await stream.finish()
                except PrebleError as error:
                    error.add_note(f"It is prompts[{index}] of the {len(todo)} given to generate_many.")
                    if not return_exceptions:
                        errors.append(error)
                        group.cancel_scope.cancel()
                        return
                    outputs[index] = error
                advance()

        with progress_bar(len(todo), shown=progress) as advance:
            async with anyio.create_task_group() as group:
                for number in range(min(len(todo), self._door.limit)):
                    group.start_soon(work)
                    if number % STARTED_AT_ONCE == 0:
                        await anyio.lowlevel.checkpoint()
        if errors:
            raise errors[0]
        return outputs

    def abort(self, request_id: str) -> bool:
        """End a request; whoever waits for it gets what was generated, with `finish_reason="abort"`.

        Returns:
            Whether a request of this id was in flight.
        """
        self._must_be_open()
        return self._reception.abort(request_id)

    def stats(self) -> ClusterStats:
        """A snapshot of every replica as of its last step, and of the cluster."""
        self._must_be_open()
        return self._dispatcher.stats()

    # Live operation

    def health(self) -> ClusterHealth:
        """How the cluster and its replicas are: what serves, what failed and why, what is started again and when."""
        self._must_be_open()
        return self._dispatcher.health()

    async def add_replica(self, device: str | None = None) -> int:
        """Start one more replica, with as many KV pages as the others, and wait until it serves.

        Args:
            device: where; by default where the first one was placed.

        Returns:
            Its number.

        Raises:
            DeviceError: the device does not exist, or has too little memory.
            CheckpointError: the model cannot be loaded any more.
        """
        from preble.replica.devices import place_replicas

        self._must_be_open()
        devices = self._devices if device is None else [device]
        return (await self._dispatcher.add(place_replicas(1, devices)))[0]

    async def drain_replica(self, replica: int) -> None:
        """Give a replica nothing more, not even after a restart, and wait until it has finished what it works on. What
        waits there goes to others, where there are any.

        Raises:
            InvalidRequest: there is no such replica.
        """
        self._must_be_open()
        await self._dispatcher.drain(replica)

    async def remove_replica(self, replica: int, *, timeout: float | None = None) -> None:
        """Drain a replica and end it. No request is lost by it.

        Args:
            replica: its number, which no other replica will get.
            timeout: seconds after which requests still running there are moved, too: they go on elsewhere from the
                tokens delivered.

        Raises:
            InvalidRequest: there is no such replica, or no other takes requests.
        """
        self._must_be_open()
        _check_patience(timeout)
        await self._dispatcher.remove(replica, timeout)

    async def reset_prefix_cache(self) -> None:
        """Make all replicas forget every cached prefix: no request that comes later uses what was computed before."""
        self._must_be_open()
        await self._dispatcher.reset_prefix_cache()

    async def pause(self) -> None:
        """Stop computing after the current steps; returns when no replica computes any more.

        Requests keep their place and their KV pages, and new ones are taken in; timeouts go on.
        """
        self._must_be_open()
        await self._dispatcher.pause(True)

    async def resume(self) -> None:
        """Go on after `pause`."""
        self._must_be_open()
        await self._dispatcher.pause(False)

    def _must_be_open(self) -> None:
        if self._state == "new":
            raise ClusterStateError(
                "the cluster is not running: enter it with `async with preble.Cluster(…) as cluster:`, and use it "
                "inside that block"
            )
        if self._state == "closed":
            raise ClusterStateError(
                "the cluster was left; requests are served only inside its `async with` block. Move this call into it"
            )
        if not self._is_at_home():
            raise ClusterStateError(
                "the cluster was entered in another event loop or thread, and belongs there. Call asyncio.run once, "
                "around the `async with` block and all that uses the cluster; from threads, go through "
                "anyio.from_thread.run or asyncio.run_coroutine_threadsafe"
            )

    def _is_at_home(self) -> bool:
        if threading.get_ident() != self._thread:
            return False
        try:
            return anyio.lowlevel.current_token() == self._loop
        except RuntimeError:  # no loop runs here now, as between two calls of `run_until_complete`
            return True


def _plainly(error: PrebleError) -> PrebleError:
    """An error without the fifty frames of the threads that it came through: its message says what they would."""
    return error.with_traceback(None)


def _check_patience(timeout: float | None) -> None:
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or math.isnan(timeout) or timeout < 0
    ):
        raise InvalidRequest(f"timeout must be a number of seconds from 0, not {timeout!r}")
