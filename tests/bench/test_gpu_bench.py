"""The GPU benchmark: that it runs, that it notices what is wrong, and that one part's fault is its own."""

from __future__ import annotations

import argparse
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preble.bench.gpu import check_decode, check_sampling, report, suite
from preble.bench.gpu.check_sampling import probabilities
from preble.bench.gpu.exact import exact_attention, relative_error, same_bits, varied
from preble.bench.gpu.idle import idle_of
from preble.bench.gpu.made_kv import make_kv
from preble.bench.gpu.parts import Part, Task, make_parts
from preble.bench.gpu.place import Place, Times
from preble.bench.gpu.predictions import IDLE_AHEAD, Prediction, predictions
from preble.bench.gpu.record import Record
from preble.bench.gpu.suite import Suite
from preble.bench.gpu.traffic import LONG_DOCUMENTS, TOOL_USE, arrivals
from preble.bench.gpu.worker import Order
from preble.sampling import SamplingParams

TASKS = [task for part in make_parts(dry_run=True) for task in part.tasks]
IN_A_PROCESS = ("ceilings", "peer")
"""Tested through the command, as is the way there."""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.fixture
def place() -> Place:
    return Place.make(dry_run=True, quick=True)


def a_record(folder: Path, **ceilings: float) -> Record:
    return Record("task", folder / "task.json", lambda line: None, ceilings)


def kept(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "task.json").read_text())
    return content


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(words)


# Everything once, at toy sizes


@without_gpu
@pytest.mark.parametrize("task", [task for task in TASKS if task.name not in IN_A_PROCESS], ids=lambda task: task.name)
def test_a_task_runs(task: Task, place: Place, tmp_path: Path) -> None:
    with torch.no_grad():
        task.load()(place, a_record(tmp_path), task.shard)
    content = kept(tmp_path)
    assert content["figures"] or content["checks"]
    assert [check for check in content["checks"] if not check["passed"]] == []
    assert all(math.isfinite(figure["value"]) for figure in content["figures"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert suite.run(arguments("--dry-run", "--out", str(out), "--part", "ceilings", "--part", "peer")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {name: part["state"] for name, part in summary["parts"].items()} == {"ceilings": "done", "peer": "done"}
    assert summary["meaningless"] is True
    assert json.loads((out / "peer.json").read_text())["figures"][-1]["value"] > 0
    # No figure of a dry run stands beside a prediction.
    assert all(row["measured"] is None for row in summary["table"] if row["predicted"] is not None)
    assert "the figures mean nothing" in capsys.readouterr().out.splitlines()[-1]


@without_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.run(arguments("--out", str(tmp_path))) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# What is wrong is noticed


@without_gpu
@pytest.mark.parametrize("fault", ["a wrong sum", "an unwritten row", "another answer each time", "an exception"])
def test_a_wrong_kernel_is_noticed(fault: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = check_decode.merge_partials, iter(range(100))

    def wrong(partials: object, out: torch.Tensor, **options: Any) -> None:
        right(partials, out, **options)
        if fault == "a wrong sum":
            out[0] *= 1.1
        elif fault == "an unwritten row":
            out[-1, 0, 0] = float("nan")
        elif fault == "another answer each time":
            out[0, 0, 0] *= 1 + 1e-6 * next(calls)
        else:
            raise RuntimeError("out of resources")

    monkeypatch.setattr(check_decode, "merge_partials", wrong)
    check_decode.run_decode(place, a_record(tmp_path), (0, 1))
    checks = kept(tmp_path)["checks"]
    again = [check for check in checks if check["name"].endswith(", again")]
    first = [check for check in checks if check not in again]
    assert len(first) == 2
    assert not all(check["passed"] for check in (again if fault == "another answer each time" else first))
    if fault == "another answer each time":
        assert all(check["passed"] for check in first)


@without_gpu
def test_a_wrong_sampler_is_noticed(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(logits: torch.Tensor, out: torch.Tensor, last: torch.Tensor, **options: object) -> None:
        out.copy_(logits.argmax(-1))

    monkeypatch.setattr(check_sampling, "sample", greedy)
    check_sampling.run_sampling(place, a_record(tmp_path), (0, 1))
    failed = {check["name"].partition(":")[0] for check in kept(tmp_path)["checks"] if not check["passed"]}
    assert failed == {"sampling", "distribution"}


def test_not_a_number_is_an_infinite_error() -> None:
    exact = torch.ones(3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), exact) == math.inf
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("window", [None, 7])
def test_exact_attention_is_that_of_torch(place: Place, window: int | None) -> None:
    kv = make_kv(place, [30, 0, 12], page_size=16, kv_heads=2, head_dim=8, dtype=torch.float32)
    q = torch.randn(3 + 2 + 12, 4, 8, generator=torch.Generator().manual_seed(0))
    out = exact_attention(q, kv, [3, 2, 12], scale=0.5, window=window)
    assert not out[3:5].any()
    for sequence, rows, length in ((0, slice(0, 3), 30), (2, slice(5, 17), 12)):
        k, v = kv.exact(sequence)
        queries = q[rows].double()
        positions = torch.arange(length - len(queries), length)[:, None]
        seen = torch.arange(length) <= positions
        if window is not None:
            seen &= torch.arange(length) > positions - window
        expected = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=seen,
            scale=0.5,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1))


def test_what_no_sequence_may_read_is_poisoned(place: Place) -> None:
    kv = make_kv(place, [40, 5, 50], page_size=16, kv_heads=1, head_dim=4, dtype=torch.float16, shared_tokens=32)
    assert torch.equal(kv.slots[0][:32], kv.slots[2][:32])
    assert not set(kv.slots[0].tolist()) & set(kv.slots[1].tolist())
    written = torch.zeros(len(kv.keys), dtype=torch.bool)
    written[torch.cat(kv.slots)] = True
    assert torch.equal(kv.keys.isnan().all((1, 2)), ~written)
    assert torch.equal(kv.values.isnan().any((1, 2)), ~written)


def test_probabilities_keep_what_the_rule_keeps() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    for rule, expected in (
        (SamplingParams(top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (SamplingParams(min_p=0.5), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (SamplingParams(temperature=0.5, top_k=2), [25 / 34, 9 / 34, 0, 0]),
    ):
        assert probabilities(logits, rule).tolist() == pytest.approx(expected)


def test_varied_cases_begin_plain_and_leave_nothing_out() -> None:
    options = {"a": (1, 2, 3), "b": (None, "x")}
    cases = varied(options, 7)
    assert cases[0] == {"a": 1, "b": None}
    assert cases == varied(options, 7)
    assert {case["a"] for case in cases} == {1, 2, 3}
    assert len({tuple(case.values()) for case in cases}) > 4


# One part's fault is its own


def fault_part(*names: str, seconds: float = 60.0) -> Part:
    return Part("faults", seconds, tuple(Task(name, f"gpu_faults.{name}") for name in names))


def test_faults_are_reported_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = Suite(tmp_path, dry_run=True, quick=True)
    tried.run(fault_part("fail", "crash", "find_a_wrong_kernel", "succeed"))
    assert not tried.good
    result = json.loads((tmp_path / "faults.json").read_text())
    states = {task["part"]: task["state"] for task in result["tasks"]}
    assert states == {"fail": "failed", "crash": "failed", "find_a_wrong_kernel": "done", "succeed": "done"}
    # What was known before the fault is not lost.
    assert [figure["key"] for figure in result["figures"]] == ["known before", "known before", "a figure"]
    table = tried.finish()
    assert "illegal memory access" in table
    assert f"crash: ended with status {-signal.SIGSEGV}" in table
    assert "WRONG a kernel: 0.5" in table
    assert "a figure" in capsys.readouterr().out


def test_all_is_good_without_faults(tmp_path: Path) -> None:
    tried = Suite(tmp_path, dry_run=True, quick=True)
    tried.run(fault_part("succeed"))
    assert tried.good


def test_a_part_without_time_is_not_started(tmp_path: Path) -> None:
    tried = Suite(tmp_path, dry_run=True, quick=True)
    tried.run(fault_part("hang", seconds=0.0))
    assert not tried.good
    assert "hang: not started in time" in tried.finish()


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    tried = Suite(tmp_path, dry_run=True, quick=True)
    (task,) = fault_part("hang").tasks
    running = tried._start(Order(task, tmp_path / "hang.json", tmp_path / "log.txt", True, True, {}))
    assert running.progress is not None
    assert running.progress.recv() == "hanging"
    suite._end(running.process)
    assert running.process.exitcode == -signal.SIGKILL


# What the results say


def test_the_goals_of_the_project() -> None:
    made = list(predictions())
    assert len({one.key for one in made}) == len(made)
    assert all(one.why for one in made)
    goals = {(one.goal, one.unit, one.at_most) for one in made if one.goal is not None}
    assert goals == {
        (85, "% of copy", False),
        (85, "%", False),
        (400, "TFLOP/s", False),
        (3, "x plain", False),
        (40_000, "tok/s", False),
        (3, "%", True),
        (3, "x", False),
    }


def test_a_row_stands_for_what_was_measured() -> None:
    figures = [
        {"key": IDLE_AHEAD, "value": 2.0, "unit": "%", "spread": None},
        {"key": "extend, 8k", "value": 399.0, "unit": "TFLOP/s", "spread": [390.0, 401.0]},
        # Without the ceilings, in another unit than the goal.
        {"key": "decode attention, 64 x 4k", "value": 2.9, "unit": "TB/s", "spread": None},
        {"key": "something else", "value": 1234.5, "unit": "x", "spread": None},
    ]
    rows = {row.key: row for row in report.rows({"part": {"figures": figures}})}
    assert rows[IDLE_AHEAD].met is True
    assert rows["extend, 8k"].met is False
    assert rows["extend, 8k"].cells()[2] == "399 TFLOP/s (390 to 401)"
    assert rows["decode attention, 64 x 4k"].met is None
    assert rows["something else"].cells() == ("something else", "", "1,234 x", "", "")
    assert rows["extend, 2k"].cells()[2] == "not measured"


def test_met() -> None:
    assert Prediction("", "", 1, "", goal=3).met(3.0) is True
    assert Prediction("", "", 1, "", goal=3, at_most=True).met(3.1) is False
    assert Prediction("", "", 1, "").met(3.0) is None


def test_a_rate_is_that_of_the_median_time(tmp_path: Path) -> None:
    record = a_record(tmp_path)
    assert record.rate("r", 10.0, Times([1.0, 4.0, 2.0]), "x/s") == 5.0
    (figure,) = kept(tmp_path)["figures"]
    assert figure["spread"] == [2.5, 10.0]


def test_idle_time_between_steps() -> None:
    idle = idle_of([(0.0, 10.0), (10.5, 20.0), (22.0, 30.0)])
    assert idle.share == pytest.approx(2.5 / 30)
    assert idle.longest == pytest.approx(2.0)
    assert idle.steps == 3


def test_a_figure_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    record = a_record(tmp_path)
    for value in (1.0, 2.0):
        record.figure("f", value, "x")
        record.figure("g", value, "x")
    assert [(figure["key"], figure["value"]) for figure in kept(tmp_path)["figures"]] == [("f", 2.0), ("g", 2.0)]


def test_workloads_share_texts() -> None:
    for workload, length in ((TOOL_USE, 1830), (LONG_DOCUMENTS, 9075)):
        requests = workload.requests(60, vocabulary=1000, seed=1)
        again = workload.requests(60, vocabulary=1000, seed=1)
        assert all(np.array_equal(one.prompt, other.prompt) for one, other in zip(requests, again, strict=True))
        assert np.mean([len(request.prompt) for request in requests]) == pytest.approx(length, rel=0.05)
        texts = {request.prompt[:64].tobytes() for request in requests}
        others = {request.prompt[:64].tobytes() for request in workload.requests(60, vocabulary=1000, seed=2)}
        assert 5 < len(texts) < 60
        assert texts & others
    times = arrivals(4000, 50.0, seed=1)
    assert times[-1] == pytest.approx(80.0, rel=0.1)
    assert (np.diff(times) > 0).all()
