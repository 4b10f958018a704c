"""What one namespace's requests show of another's: nothing; and what logs show of any request: no text of its."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import preble
from preble.engine.engine import Engine
from preble.engine.messages import StepReport
from preble.errors import PrebleError
from preble.sched import GlobalScheduler, Placement, StepTimed
from preble.sched.local import LocalScheduler
from preble.sched.policies import POLICIES
from preble.sched.sequence import Sequence

PAGE = 2
PAGES = 40
REPLICAS = 2
OTHER_TOKENS = 1000
"""Added to each of tenant A's tokens where its prompts are to be unrelated to tenant B's: lengths, and what A's own
prompts have in common, stay as they are."""

Spaces = dict[str, str]


class TwoTenants:
    """A small cluster of real schedulers under requests of the tenants A and B, whose prompts are alike.

    Args:
        offset: added to each token of A.
        spaces: the namespace of each tenant.
    """

    def __init__(self, seed: int, policy: str, order: str, offset: int, spaces: Spaces) -> None:
        self._random = random.Random(seed)
        self._offset, self._spaces = offset, spaces
        self._scheduler = GlobalScheduler(
            REPLICAS, capacity_tokens=PAGES * PAGE, page_size=PAGE, policy=policy, window=20.0, max_batched_tokens=9
        )
        self._locals = [
            LocalScheduler(
                pages=PAGES, page_size=PAGE, max_batched_tokens=9, replica=number, order=order, max_running=6
            )
            for number in range(REPLICAS)
        ]
        self._requests: dict[str, tuple[list[int], int, str]] = {}
        self._prompts: list[list[int]] = [[0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]]
        self.seen: list[tuple[object, ...]] = []
        """Every decision, in order."""

    def run(self, steps: int) -> list[tuple[object, ...]]:
        """Submit, step and cancel at random; the decisions."""
        for now in range(steps):
            for number in range(self._random.randrange(3)):
                self._submit(f"{now}.{number}", self._random.choice("AB"), float(now))
            if self._random.random() < 0.05 and self._requests:
                self._cancel(self._random.choice(sorted(self._requests)), float(now))
            for replica in range(REPLICAS):
                self._step(replica, float(now))
        self._scheduler.check()
        return self.seen

    def _submit(self, name: str, tenant: str, now: float) -> None:
        rng = self._random
        prompt = rng.choice(self._prompts)[: rng.randrange(1, 24)]
        prompt = prompt + [rng.randrange(2) for _ in range(rng.randrange(6))]
        self._prompts = [*self._prompts[-5:], prompt]
        options = {
            "priority": rng.choice((0, 0, 0, 1)),
            # Sessions of A have the names of B's, or others.
            "session": rng.choice((None, *(f"{name}{self._offset if tenant == 'A' else 0}" for name in "xy"))),
            "expected_tokens": rng.choice((None, 3)),
        }
        tokens = [token + (self._offset if tenant == "A" else 0) for token in prompt]
        self._requests[name] = tokens, rng.randrange(1, 8), tenant
        decision = self._scheduler.submit(
            name, tokens, now=now, max_tokens=8, namespace=self._spaces[tenant], **options
        )
        self.seen.append(("submitted", name, str(decision)))
        if isinstance(decision, Placement):
            self._start(decision, now)

    def _start(self, placement: Placement, now: float) -> None:
        tokens, outputs, tenant = self._requests[placement.request_id]
        self.seen.append(("placed", placement.request_id, placement.replica, str(placement)))
        sequence = Sequence(
            placement.request_id,
            np.array(tokens, np.int32),
            prompt_length=len(tokens),
            max_length=min(len(tokens) + outputs, PAGES * PAGE),
            namespace=self._spaces[tenant],
        )
        self._locals[placement.replica].add(sequence, now=now)

    def _cancel(self, name: str, now: float) -> None:
        for local in self._locals:
            local.abort(name)
        for placement in self._scheduler.cancel(name, now=now):
            self._start(placement, now)

    def _step(self, replica: int, now: float) -> None:
        local = self._locals[replica]
        plan = local.plan(now=now)
        if plan is not None:
            results: list[tuple[int, bool] | None] = []
            pages: dict[str, set[int]] = {"A": set(), "B": set()}
            for chunk in plan.chunks:
                sequence = chunk.sequence
                tenant = self._requests[sequence.request_id][2]
                pages[tenant] |= set(sequence.table.pages)
                # The order of rows in a step, the tokens computed and those found in the cache, and the pages.
                table = tuple(sequence.table.pages)
                self.seen.append(("computed", replica, sequence.request_id, chunk.start, chunk.count, table))
                if chunk.samples:
                    token = self._random.randrange(2) + (self._offset if tenant == "A" else 0)
                    results.append((token, sequence.length + 1 >= sequence.max_length))
            if self._spaces["A"] != self._spaces["B"]:
                assert not pages["A"] & pages["B"], "kernels group rows by the pages that they share"
            local.commit(plan, results)
            self._scheduler.apply(
                StepTimed(replica, plan.tokens, len(plan.chunks), plan.tokens, 0.1, plan.tokens), now=now
            )
        for event in local.take_events():
            name = getattr(event, "request_id", None)
            self.seen.append(("told", replica, type(event).__name__, name))
            if type(event).__name__ == "Finished":
                self._requests.pop(str(name), None)
            for placement in self._scheduler.apply(event, now=now):
                self._start(placement, now)


def decisions(seed: int, policy: str, order: str, offset: int, spaces: Spaces) -> list[tuple[object, ...]]:
    return TwoTenants(seed, policy, order, offset, spaces).run(60)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), order=st.sampled_from(["hrrn", "preble", "fcfs"]))
def test_what_another_tenant_has_in_the_cache_decides_nothing(policy: str, seed: int, order: str) -> None:
    """All the same whether tenant A's prompts are those of tenant B or unrelated ones of the same lengths: where B's
    requests go, in which order they are served, what is computed for them, found for them, evicted from them, and
    which pages they get."""
    spaces = {"A": "a", "B": "b"}
    same, unrelated = (decisions(seed, policy, order, offset, spaces) for offset in (0, OTHER_TOKENS))
    assert same == unrelated


def test_in_one_namespace_the_same_comparison_tells_them_apart() -> None:
    """So that the test above says something."""
    spaces = {"A": "", "B": ""}
    for policy in ("e2", "round-robin"):
        same, unrelated = (decisions(1, policy, "hrrn", offset, spaces) for offset in (0, OTHER_TOKENS))
        assert same != unrelated


@pytest.mark.anyio
async def test_the_same_prompt_is_computed_anew_for_every_namespace(llama: Path) -> None:
    prompt = [5 + number % 90 for number in range(100)]
    async with preble.Cluster(llama, replicas=1, devices=["cpu"], kv_memory="4MiB", page_size=16) as cluster:
        computed = 0
        for namespace in ("", "a", "b", "A", "a "):
            outputs = []
            for cached in (0, 96):  # whole pages, and one token at least is computed
                output = await cluster.generate(
                    prompt, namespace=namespace, session="talk", max_tokens=2, temperature=0, ignore_eos=True
                )
                outputs.append(output)
                assert output.usage.cached_tokens == cached, namespace
                now = cluster.stats().replicas[0].computed_tokens
                assert now - computed == len(prompt) - cached + 1, namespace
                computed = now
            assert outputs[0].token_ids == outputs[1].token_ids


CANARY = "canary"
"""Part of every word that the requests below are made of, and of nothing else."""


async def use(cluster: preble.Cluster) -> None:
    """Requests of all kinds, good and bad."""
    terms = {"namespace": f"{CANARY}-space", "session": f"{CANARY}-session"}
    text = f"the {CANARY} sings " * 3
    message = {"role": "user", "content": text}
    attempts: list[Callable[[], Awaitable[object]]] = [
        lambda: cluster.generate(text, max_tokens=3, stop=f"{CANARY}-stop", request_id=f"{CANARY}-id", **terms),
        lambda: cluster.chat([message], max_tokens=3, **terms),
        lambda: cluster.generate_many([text, text + "\ud800"], max_tokens=3, **terms),
        lambda: cluster.generate(text * 1000, **terms),
        lambda: cluster.chat([{"role": CANARY}], **terms),
        lambda: cluster.chat([{"content": CANARY}], **terms),
        lambda: cluster.chat([message], tools=[CANARY], **terms),
        lambda: cluster.generate(text, timeout=1e-9, **terms),
        lambda: cluster.generate(text, **{f"{CANARY}_option": 1}, **terms),
        lambda: cluster.generate(text, stop=[CANARY, 5], **terms),
        lambda: cluster.generate([CANARY, CANARY], **terms),
    ]
    for attempt in attempts:
        with suppress(PrebleError):
            await attempt()
    async with cluster.stream(text, max_tokens=50, ignore_eos=True, **terms) as stream:
        await anext(stream)
        cluster.abort(stream.request_id)


Logs = Callable[[], str]


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Logs:
    """All that was logged, at any level, and printed."""
    caplog.set_level(logging.DEBUG)

    def read() -> str:
        assert [record for record in caplog.records if record.name.startswith("preble")]
        printed = capfd.readouterr()
        return "\n".join([*map(logging.Formatter().format, caplog.records), printed.out, printed.err])

    return read


@pytest.mark.anyio
async def test_logs_hold_no_word_of_a_request(llama: Path, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the worst of days either: at the lowest level, while requests fail and a replica stops on an error."""
    step, failures = Engine.step, iter([RuntimeError("the device is lost")])

    def fail_once(engine: Engine) -> StepReport:
        if engine.scheduler.running and (failure := next(failures, None)) is not None:
            raise failure
        return step(engine)

    monkeypatch.setattr(Engine, "step", fail_once)
    async with preble.Cluster(llama, replicas=2, devices=["cpu"], kv_memory="1MiB", workers="thread") as cluster:
        await use(cluster)
    text = logs()
    assert "the device is lost" in text
    assert CANARY not in text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_logs_of_a_worker_process_hold_no_word_of_a_request(llama: Path, logs: Logs, anyio_backend: str) -> None:
    async with preble.Cluster(llama, replicas=1, devices=["cpu"], kv_memory="1MiB", workers="process") as cluster:
        await use(cluster)
    assert CANARY not in logs()
