"""Every mistake of docs/mistakes.md is made for real, and the message is the one that the page shows."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from huggingface_hub import constants

import preble
import preble.sched
from preble.cli import main, make_parser
from preble.cli.examples import EXAMPLES
from preble.keywords import ELSEWHERE, INSTEAD
from preble.request_options import RequestOptions, SamplingOptions
from preble.sampling import REQUEST_OPTIONS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "mistakes.md"


@dataclass(frozen=True)
class Mistake:
    """A section of the page."""

    title: str
    kind: str
    """`python`, `script` or `console`."""
    source: str
    """What is done; for a script its name before it, in the first line."""
    shown: tuple[str, ...]
    """What the page says one sees; several where it depends on the machine."""

    @property
    def needs_cluster(self) -> bool:
        """Whether it stands inside the page's `async with`."""
        return self.kind == "python" and "cluster." in self.source and "Cluster(" not in self.source

    def must_be(self, told: str) -> None:
        """Assert that this is what the page shows, but for line breaks and what `…` stands for."""
        patterns = [re.escape(" ".join(text.split())).replace("…", ".*?") for text in self.shown]
        said = " ".join(told.split())
        assert any(re.fullmatch(pattern, said) for pattern in patterns), f"{self.title} really says:\n{told}"


def sections() -> Iterator[Mistake]:
    """The mistakes of the page, in its order."""
    text = PAGE.read_text().partition("## What shows no message")[0]
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        blocks = re.findall(r"^```\{code-block\} (\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert blocks, f"{title}: there is no mistake in it"
        (kind, source), answers = blocks[0], [answer for _, answer in blocks[1:]]
        if kind == "console":
            command, _, answer = source.partition("\n")
            source, answers = command.removeprefix("$ "), [answer]
        elif source.startswith(":caption: "):
            kind, source = "script", source.removeprefix(":caption: ")
        assert answers, f"{title}: it shows no message"
        yield Mistake(title, kind, source, tuple(answers))


MISTAKES = list(sections())


def of(*kinds: str) -> Any:
    """The mistakes of these kinds, as parameters."""
    return pytest.mark.parametrize("mistake", [pytest.param(m, id=m.title) for m in MISTAKES if m.kind in kinds])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A working directory with all that the mistakes are made with."""
    place = tmp_path_factory.mktemp("mistakes")
    models = place / "models"

    def model(name: str, *without: str) -> Path:
        return Path(shutil.copytree(llama, models / name, ignore=shutil.ignore_patterns(*without)))

    def config(folder: Path, **changes: Any) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    weights, tokenizer = "model.safetensors", ("tokenizer.json", "chat_template.jinja")
    model("llama")
    model("cached/snapshots/0a1b2c")
    model("no-weights", weights)
    (model("bin-only", weights) / "pytorch_model.bin").touch()
    (models / "model.Q4_K_M.gguf").touch()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1000\n"
    (model("cloned", weights) / weights).write_text(pointer)
    (model("cut", weights) / weights).write_bytes((llama / weights).read_bytes()[:-1000])
    model("no-tokenizer", *tokenizer)
    (models / "adapter").mkdir()
    (models / "adapter" / "adapter_config.json").write_text("{}")
    config(model("quantized"), quantization_config={"quant_method": "gptq", "bits": 4})
    config(model("bert"), architectures=["BertForMaskedLM"], model_type="bert")
    model("base", "chat_template.jinja")
    rows, columns = 2**20, 2**21
    tensor = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with (model("huge", weights) / weights).open("wb") as file:  # a hole of 4 TiB, which takes no room on the disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * columns * 2)
    lines = [{"t": n, "text": text, "output_tokens": 8} for n, text in enumerate(("Hello", "Good morning"))]
    (place / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    lines[1]["text"] = 7
    (place / "broken.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return place


@pytest.fixture(autouse=True)
def _there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that directory, with no hub and an empty cache of it, and no matplotlib."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


async def make(mistake: Mistake, names: dict[str, Any]) -> str:
    """What Python prints last about a mistake, with the warnings that it gives."""
    code = compile(mistake.source, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = {"preble": preble, "asyncio": asyncio, **names}
        try:
            value = eval(code, scope)
            if code.co_flags & inspect.CO_COROUTINE:
                await value
        except Exception as error:
            told += traceback.format_exception_only(error)
            traceback.clear_frames(error.__traceback__)
            del error
        scope.clear()
        gc.collect()  # what was never awaited says so when it is collected
    return "".join([*told, *(f"{one.category.__name__}: {one.message}\n" for one in caught)])


@pytest.fixture(scope="module")
def told_inside() -> dict[str, str]:
    """What each of the mistakes says that stand inside one cluster's block, by their titles."""

    async def all_of_them() -> dict[str, str]:
        async with preble.Cluster("demo", devices=["cpu"], kv_memory="64MiB") as cluster:
            return {m.title: await make(m, {"cluster": cluster}) for m in MISTAKES if m.needs_cluster}

    return asyncio.run(all_of_them())


def test_there_are_mistakes_of_every_kind() -> None:
    assert len(MISTAKES) >= 20
    assert {mistake.kind for mistake in MISTAKES} == {"python", "script", "console"}
    assert len({mistake.title for mistake in MISTAKES}) == len(MISTAKES)
    assert sum(mistake.needs_cluster for mistake in MISTAKES) >= 10
    # Nothing on the page is in a block that is not read here.
    assert PAGE.read_text().count("```{code-block}") == PAGE.read_text().count("```") / 2


@of("python")
def test_a_mistake_in_python(mistake: Mistake, request: pytest.FixtureRequest) -> None:
    if mistake.needs_cluster:
        mistake.must_be(request.getfixturevalue("told_inside")[mistake.title])
    else:
        mistake.must_be(asyncio.run(make(mistake, {})))


@of("script")
def test_a_mistake_in_a_script(mistake: Mistake, tmp_path: Path) -> None:
    name, _, source = mistake.source.partition("\n")
    (tmp_path / name).write_text(source)
    done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    mistake.must_be(done.stderr.splitlines()[-1])


@of("console")
def test_a_mistake_on_the_command_line(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = shlex.split(mistake.source)
    if program == "make":
        # A program that fails stands for a Python that is too old.
        old = [f"{argument.partition('=')[0]}=false" if "=" in argument else argument for argument in arguments]
        shutil.copy(ROOT / "Makefile", tmp_path)
        for needed in ("pyproject.toml", "constraints.txt"):
            (tmp_path / needed).touch()
        for name in ("MAKEFLAGS", "MAKELEVEL"):  # the tests are run by make themselves
            monkeypatch.delenv(name, raising=False)
        done = subprocess.run(["make", *old], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        mistake.must_be(done.stdout)
        return
    assert [program, *arguments[:2]] == ["python", "-m", "preble"]
    with pytest.raises(SystemExit) as left:
        sys.exit(main(arguments[2:]))
    assert left.value.code in (1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    mistake.must_be(printed.err)


def test_an_error_on_entering_is_short() -> None:
    """The threads that a model is loaded in are none of the caller's business."""

    async def enter(model: str, **options: Any) -> list[str]:
        with pytest.raises(preble.PrebleError) as raised:
            async with preble.Cluster(model, devices=["cpu"], **options):
                pass
        return [Path(frame.filename).name for frame in traceback.extract_tb(raised.value.__traceback__)]

    for model, options in (("models/nowhere", {}), ("Demo", {}), ("demo", {"kv_memory": "1KB"})):
        assert asyncio.run(enter(model, **options)) == ["test_mistakes.py", "cluster.py"]


def test_an_error_on_purpose_is_not_logged_as_well(caplog: pytest.LogCaptureFixture) -> None:
    async def enter() -> None:
        async with preble.Cluster("demo", devices=["cpu"], kv_memory="1KB"):
            pass

    with pytest.raises(preble.DeviceError):
        asyncio.run(enter())
    assert caplog.records == []


# Keywords


def test_an_editor_is_told_the_options_that_there_are() -> None:
    sampling = {field.name: field.default for field in fields(preble.SamplingParams)}
    assert list(get_type_hints(SamplingOptions)) == list(sampling)
    assert set(RequestOptions.__annotations__) - set(SamplingOptions.__annotations__) == REQUEST_OPTIONS
    for name in ("generate", "stream", "chat", "stream_chat"):
        given = inspect.signature(getattr(preble.Cluster, name)).parameters
        assert given["options"].annotation == "Unpack[SamplingOptions]"
        for option in REQUEST_OPTIONS:
            assert given[option].annotation == RequestOptions.__annotations__[option].__forward_arg__, option


def test_what_is_called_otherwise_elsewhere_is_called_so_here() -> None:
    ours = {
        *inspect.signature(preble.Cluster).parameters,
        *(field.name for field in fields(preble.SamplingParams)),
        *REQUEST_OPTIONS,
    }
    assert set(ELSEWHERE.values()) <= ours
    assert not set(ELSEWHERE) & ours
    assert not set(INSTEAD) & (ours - {"model"})


def test_keywords_leave_signatures_as_they_were() -> None:
    assert list(inspect.signature(preble.Cluster).parameters)[:3] == ["model", "replicas", "devices"]
    assert preble.SamplingParams(max_tokens=3) == preble.SamplingParams(max_tokens=3)
    with pytest.raises(TypeError, match="'tempature' of SamplingParams; did you mean 'temperature'"):
        preble.SamplingParams(tempature=3)  # type: ignore[call-arg]
    with pytest.raises(preble.UnknownOption, match="'timeout' of SamplingParams; give it to generate, stream or chat"):
        preble.SamplingParams(timeout=3)  # type: ignore[call-arg]


# The help of commands


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_examples_of_the_help_can_be_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    for example in EXAMPLES[command]:
        assert f"\n  {example}" in shown
        program, *words = shlex.split(example.partition(" < ")[0])
        assert (program, words[: len(command.split())]) == ("preble", command.split())
        assert make_parser().parse_args(words).command == words[0]
