"""The benchmark itself: rates, ratios, goals, and one whole run on a tiny model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from preble.bench import cases, engine
from preble.bench.cases import EIGHT, ONE, SHARED, Case, Measure, decode_rate, end_to_end_rate
from preble.bench.overhead import step_overhead
from preble.bench.peers.process import PeerFailed, PeerProcess
from preble.bench.peers.worker import Trace
from preble.bench.report import Result
from preble.bench.shapes import SHAPES, Shape, write_checkpoint
from preble.errors import InvalidRequest

TINY = Shape("tiny", 64, 2, heads=4, kv_heads=2, intermediate=96, vocabulary=3000, tied=True)


def test_decoding_counts_only_while_all_requests_decode() -> None:
    # The second request starts at 3 and the first ends at 5: four tokens in those two seconds.
    trace = Trace(0.0, arrivals=[[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0]])
    assert decode_rate(trace) == 4 / 2
    assert end_to_end_rate(trace) == 10 / 7


def test_decoding_needs_a_common_time() -> None:
    with pytest.raises(ValueError, match="too few tokens"):
        decode_rate(Trace(0.0, arrivals=[[1.0, 2.0], [3.0, 4.0]]))


@pytest.mark.parametrize("case", [ONE, EIGHT, SHARED, SHARED.smaller()])
def test_prompts_share_what_the_case_says_and_nothing_more(case: Case) -> None:
    work = case.work(30_000, "a")
    assert work == case.work(30_000, "a")
    assert {len(prompt) for prompt in work.prompts} == {case.shared + case.own}
    assert len({tuple(prompt[: case.shared]) for prompt in work.prompts}) == 1
    assert len({tuple(prompt[: case.shared + 3]) for prompt in work.prompts}) == case.requests
    assert case.work(30_000, "b").prompts[0][:3] != work.prompts[0][:3]


def test_a_ratio_compares_within_a_round() -> None:
    measure = Measure("m", ONE, True, {"hf": 2.0, "llama.cpp": 1.0})
    # A round in which the whole machine was slow does not count against anybody.
    result = Result("s", measure, {"preble": [100.0, 10.0, 90.0], "hf": [40.0, 4.0, 45.0]})
    assert result.ratio("hf") == 2.5
    assert result.met is True
    result.rates["llama.cpp"] = [101.0, 11.0, 80.0]
    assert result.met is False
    assert Result("s", measure, {"preble": [1.0]}).met is None


def test_the_goals_of_the_project() -> None:
    goals = {
        (shape, measure.label): measure.goals for shape in SHAPES for measure in cases.measures(shape) if measure.goals
    }
    assert goals[("2048x6", "32 requests share 2,000 tokens, end to end")] == {"hf": 6.0}
    assert goals[("0.5b", "8 requests, decode")] == {"llama.cpp": 1.1}


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(words)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    out = tmp_path / "results" / "engine.json"
    words = ("--shape", "tiny", "--quick", "--peers", "hf,llama.cpp", "--llama-python", "no-such-python")
    assert engine.run(arguments(*words, "--json", str(out))) == 0
    document = json.loads(out.read_text())
    assert list(document["skipped"]) == ["llama.cpp"]
    assert len(document["results"]) == len(cases.measures("tiny"))
    for result in document["results"]:
        (preble,), (hf,) = result["tokens_per_second"]["preble"], result["tokens_per_second"]["hf"]
        assert result["ratios"] == {"hf": preble / hf}
    assert document["first_token_agreement"]["tiny"]["preble"] > engine.SAME_MODEL
    assert {limit["measure"] for limit in document["limits"]} >= {"import preble"}
    printed = capsys.readouterr().out
    assert "left out: llama.cpp" in printed
    assert "8 requests, end to end" in printed


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match=r"preble ended: .*config\.json"):
        PeerProcess("preble", sys.executable, tmp_path, tmp_path, threads=1)


@pytest.mark.parametrize("words", [("--peers", "hf,vllm"), ("--threads", "0")])
def test_bad_arguments(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match=words[0]):
        engine.run(arguments(*words))


def test_step_overhead_is_a_positive_time(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path)
    assert 0 < step_overhead(tmp_path, requests=3, steps=5, context=70) < 60
