"""Any Python object as any argument: only documented errors, and the cluster goes on serving."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import anyio
from hostile_values import INPUTS, MAKERS, check_brief, fuzz, hostile
from hypothesis import strategies as st

from preble import Cluster, SamplingParams
from preble.errors import PrebleError
from preble.prompts import prompt_tokens
from preble.terms import Terms

GOOD_SAMPLING: dict[str, Any] = {
    "max_tokens": 2,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 5,
    "n": 2,
    "stop": ["a"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "logprobs": 2,
    "logit_bias": {5: 1.0},
}
GOOD_TERMS: dict[str, Any] = {
    "priority": 1,
    "timeout": 30.0,
    "namespace": "tenant",
    "session": "talk",
    "expected_tokens": 4,
}
MESSAGES = [{"role": "user", "content": "Hi"}]
NAMES = st.lists(st.sampled_from([*GOOD_SAMPLING, *GOOD_TERMS]), unique=True, max_size=8)


def arguments(names: list[str], good: dict[str, Any], random: Random) -> dict[str, Any]:
    """Some good arguments, of which one or more are not."""
    chosen = {name: good[name] for name in names if name in good}
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        chosen[random.choice([*good])] = hostile(random)
    return chosen


def test_sampling_params() -> None:
    def attempt(names: list[str], random: Random) -> None:
        given = arguments(names, GOOD_SAMPLING, random)
        if random.random() < 0.02:
            given["maxtokens"] = hostile(random)
        try:
            params = SamplingParams.from_options(hostile(random) if random.random() < 0.1 else None, given)
        except PrebleError as error:
            check_brief(error)
            return
        assert SamplingParams.from_options(params, {}) == params
        assert hash(params) == hash(SamplingParams.from_options(params, {}))

    fuzz("sampling", 50, NAMES, attempt)


def test_terms_and_prompts() -> None:
    def attempt(names: list[str], random: Random) -> None:
        try:
            Terms(**arguments(names, GOOD_TERMS | {"request_id": "a"}, random))
        except PrebleError as error:
            check_brief(error)
        try:
            ids = prompt_tokens(hostile(random))
        except PrebleError as error:
            check_brief(error)
        else:
            assert ids.ndim == 1
            assert ids.dtype == "int32"

    fuzz("terms and prompts", 50, NAMES, attempt)


def test_requests(llama: Path) -> None:
    """Arguments are checked when a request is made; nothing has to run for it."""

    async def main() -> None:
        async with Cluster(llama, replicas=1, devices=["cpu"], kv_memory="1MiB") as cluster:

            def attempt(names: list[str], random: Random) -> None:
                given = arguments(names, GOOD_SAMPLING | GOOD_TERMS | {"request_id": "a", "sampling": None}, random)
                prompt = hostile(random)
                try:
                    if random.random() < 0.5:
                        cluster.stream(prompt, **given).close()
                    else:
                        cluster.stream_chat(prompt, tools=hostile(random), **given).close()
                except PrebleError as error:
                    check_brief(error)

            fuzz("requests", 50, NAMES, attempt)
            assert cluster.stats().pending == 0
            output = await cluster.generate("Hi", max_tokens=3, ignore_eos=True)
            assert len(output.token_ids) == 3

    anyio.run(main)


def test_requests_that_start(llama: Path) -> None:
    """Prompts and messages are read when a request starts: each maker of hostile values serves as each of them."""
    tried = 0

    async def main() -> None:
        nonlocal tried
        random = Random(6)
        async with Cluster(llama, replicas=1, devices=["cpu"], kv_memory="1MiB") as cluster:

            async def attempt(made: Any) -> None:
                given = arguments(["max_tokens"], GOOD_SAMPLING | GOOD_TERMS, random)
                given = (
                    {"max_tokens": 1} if random.random() < 0.6 else given | {"timeout": 20.0, "max_tokens": 1, "n": 1}
                )
                match tried % 5:
                    case 0:
                        await cluster.generate(made, **given)
                    case 1:
                        async for _ in cluster.stream(made, **given):
                            pass
                    case 2:
                        await cluster.chat(made, **given)
                    case 3:
                        message = {"role": "user", "content": made, "tool_calls": hostile(random)}
                        await cluster.chat([*MESSAGES, message], tools=hostile(random), **given)
                    case 4:
                        await cluster.generate_many([made, "ok", hostile(random)], **given)

            while tried < INPUTS["requests that start"]:
                made = MAKERS[tried % len(MAKERS)]() if tried < 10 * len(MAKERS) else hostile(random)
                try:
                    await attempt(made)
                except PrebleError as error:
                    check_brief(error)
                tried += 1
            assert cluster.stats().pending == 0
            output = await cluster.generate("Hi", max_tokens=3, ignore_eos=True)
            assert len(output.token_ids) == 3

    anyio.run(main)
    assert tried == INPUTS["requests that start"]


def test_how_many_inputs_there_are() -> None:
    assert sum(INPUTS.values()) >= 100_000
