"""The report of a tournament: a sound page, with the figures of every policy, whatever happened."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_outcomes import made_outcomes, made_trace

from preble.errors import InvalidRequest, PrebleError
from preble.sim import html
from preble.sim.outcome import Outcome
from preble.sim.report import report_page, write_report
from preble.sim.settings import Failure

VOID = {"meta", "br", "hr", "img", "input", "link"}
HEADINGS = [
    "Policies",
    "Latency",
    "Over time",
    "Load of the replicas",
    "Placements",
    "Hottest prefixes",
    "Settings",
]


class Page(HTMLParser):
    """A document, refused if its tags are not balanced."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.document = document
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.best: list[str] = []
        self.notes: list[str] = []
        self._texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert self._open == [], "unclosed"

    def texts(self, tag: str) -> list[str]:
        return self._texts.get(tag, [])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another one"

    def handle_data(self, data: str) -> None:
        text = data.strip()
        if not text:
            return
        self._texts.setdefault(self._open[-1], []).append(text)
        if self._open[-1] == "strong" and "td" in self._open:
            self.best.append(text)
        if self._open[-1] == "small":
            self.notes.append(text)
        elif "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += text


def sound(document: str) -> Page:
    """Balanced, and it loads nothing and runs nothing."""
    page = Page(document)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, *_ in page.attributes}
    loaded = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src", "srcset", "action")]
    assert all(value.startswith("#") for value in loaded)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in document
    used = {value[1:] for value in loaded} | set(re.findall(r"url\(#([^)]+)\)", document))
    assert document.count("url(") == document.count("url(#")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert used == set(ids), "a reference without an end, or an id without use"
    assert len(ids) == len(set(ids))
    return page


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return made_outcomes()


@pytest.fixture(scope="module")
def page(outcomes: list[Outcome]) -> Page:
    return sound(report_page(outcomes))


def figures(page: Page) -> dict[str, dict[str, str]]:
    """The texts of the tables of policies: policy -> column -> text."""
    found: dict[str, dict[str, str]] = {}
    for header, *rows in page.tables[:3]:
        for row in rows:
            found.setdefault(row[0], {}).update(zip(header[1:], row[1:], strict=True))
    return found


def expected(outcome: Outcome) -> dict[str, float]:
    told = outcome.to_dict()
    columns = {
        f"{title} {figure}": told[path][figure]
        for title, path in (("TTFT", "ttft"), ("queueing", "queueing"), ("e2e", "e2e"), ("TPOT", "tpot"))
        for figure in ("mean", "p50", "p90", "p99")
    }
    return columns | {
        "completed": told["completed"],
        "hit rate": told["hit_rate"],
        "goodput /s": told["goodput"],
        "imbalance": told["imbalance"],
        "utilization": told["utilization"],
        "evicted tokens": told["evicted_tokens"],
        "recomputed tokens": told["recomputed_tokens"],
        "preemptions": told["preemptions"],
        "decisions /s": 1000.0,
    }


def number(text: str) -> float:
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


# What it says


def test_the_page_has_all_its_parts_in_order(page: Page) -> None:
    assert page.texts("h2") == HEADINGS
    assert page.texts("h1") == ["made: e2, round-robin"]
    assert "40 requests, 10 per second · 2 replicas · mistral-7b-a6000 · seed 0" in page.texts("p")


def test_the_tables_have_every_figure_of_every_policy(page: Page, outcomes: list[Outcome]) -> None:
    found = figures(page)
    assert list(found) == ["e2", "round-robin"]
    for outcome in outcomes:
        texts, values = found[outcome.policy], expected(outcome)
        assert texts.keys() == values.keys()
        for name, value in values.items():
            assert number(texts[name]) == pytest.approx(
                value, rel=6e-4, abs=5.1e-5 if "%" not in texts[name] else 5e-4
            ), name
    assert {number(found[outcome.policy]["hit rate"]) for outcome in outcomes} != {0.0}


def test_the_best_of_each_column_is_marked_and_others_are_told_relative_to_the_first(outcomes: list[Outcome]) -> None:
    slow, fast = outcomes[0], outcomes[0]
    slow = replace(slow, policy="slow", ttft=slow.ttft * 2, queueing=slow.queueing + 1, evicted_tokens=7)
    fast = replace(fast, policy="fast", decide_seconds=slow.decide_seconds * 4)
    both = sound(report_page([slow, fast]))
    best = set(both.best)
    texts = figures(both)
    for name in ("TTFT mean", "TTFT p99", "queueing mean", "evicted tokens"):
        assert texts["fast"][name] in best
        assert texts["slow"][name] not in best
    assert texts["slow"]["decisions /s"] in best
    assert texts["fast"]["e2e mean"] not in best, "where all are equal none is best"
    assert both.notes[:4] == ["×0.50"] * 4, "of TTFT, to the first policy"  # noqa: RUF001
    assert "×0.25" in both.notes, "of decisions"  # noqa: RUF001
    assert "×1.00" not in both.notes  # noqa: RUF001


def test_the_hottest_prefixes_come_with_the_replicas_that_have_them(page: Page, outcomes: list[Outcome]) -> None:
    shown = page.tables[3:-1]
    assert len(shown) == len(outcomes) == 2
    for table, outcome in zip(shown, outcomes, strict=True):
        assert 3 < len(outcome.hottest) == len(table) - 1
        for row, hot in zip(table[1:], outcome.hottest, strict=True):
            assert row[0] == f"{hot.name:016x}"[:8]
            holders = {int(one) for one in re.findall(r"\d+", row[1].partition(": ")[2].replace("0-1", "0, 1"))}
            assert holders == set(hot.replicas)
            assert row[1].startswith(f"{len(hot.replicas)} of 2: ")
            assert row[2:] == [f"{hot.start:,}-{hot.end:,}", f"{hot.uses}", f"{(hot.uses - 1) * hot.tokens:,}"]


def test_every_setting_is_there(page: Page, outcomes: list[Outcome]) -> None:
    settings = dict(page.tables[-1])
    assert settings.keys() >= outcomes[0].settings.to_dict().keys()
    assert settings["trace"] == "made"
    assert settings["capacity_tokens"] == "198,516"
    assert settings["closed_loop"] == "no"
    assert settings["failures"] == "none"
    assert settings["slo"] == "ttft=2,tpot=0.1"


def test_settings_that_differ_say_whose_they_are(outcomes: list[Outcome]) -> None:
    (more,) = made_outcomes(["e2"], replicas=3, failures=(Failure(1, 1.0, 2.0),))
    settings = dict(sound(report_page([outcomes[0], more])).tables[-1])
    assert settings["replicas"] == "e2: 2, e2 (2): 3"
    assert settings["failures"] == "e2: none, e2 (2): 1@1+2"
    assert settings["page_size"] == "64"


def test_plots_name_every_policy_and_every_rule(page: Page, outcomes: list[Outcome]) -> None:
    words = page.texts("text")
    assert words.count("round-robin") == 4 + 3 + 1 + 1 + 1, "latencies, over time, load, placements and their rule"
    assert {"replica 0", "replica 1", *outcomes[0].reasons} <= set(words)
    assert "100%" in words


# The same every time


def test_the_same_runs_give_the_same_bytes(page: Page, outcomes: list[Outcome]) -> None:
    again = report_page(made_outcomes())
    assert again == page.document
    assert report_page([replace(one, decide_seconds=9.0) for one in outcomes]) != again


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    none = made_outcomes(["e2"], made_trace(0))
    path = tmp_path / "report.html"
    path.write_text("old" * 100_000)
    write_report(none, path)
    assert path.read_text(encoding="utf-8") == report_page(none)


# Whatever happened


def lost_replica() -> list[Outcome]:
    return made_outcomes(failures=(Failure(0, 1.0), Failure(1, 2.0)))


CASES: dict[str, tuple[Callable[[], list[Outcome]], list[str]]] = {
    "one policy and one replica": (lambda: made_outcomes(["e2"], replicas=1), HEADINGS),
    "many replicas": (lambda: made_outcomes(replicas=64), HEADINGS),
    "all replicas lost": (lost_replica, HEADINGS),
    "nothing completed": (
        lambda: made_outcomes(failures=(Failure(0, 0.0), Failure(1, 0.0))),
        ["Policies", "Over time", "Load of the replicas", "Settings"],
    ),
    "everything refused": (lambda: made_outcomes(capacity_tokens=128), ["Policies", "Settings"]),
    "no requests": (lambda: made_outcomes(trace=made_trace(0)), ["Policies", "Settings"]),
    "one request": (lambda: made_outcomes(trace=made_trace(1)), [one for one in HEADINGS if one != HEADINGS[5]]),
    "answers of one token": (lambda: made_outcomes(trace=made_trace(output_tokens=1)), HEADINGS),
    "all at once": (lambda: made_outcomes(trace=made_trace(gap=0.0)), HEADINGS),
}


@pytest.mark.parametrize("case", CASES)
def test_it_copes(case: str) -> None:
    make, headings = CASES[case]
    assert sound(report_page(make())).texts("h2") == headings


def test_what_did_not_end_is_said() -> None:
    outcomes = lost_replica()
    missing = [one.requests - one.completed for one in outcomes]
    text = " ".join(sound(report_page(outcomes)).texts("p"))
    assert f"With e2, {missing[0]} of 40 requests did not end" in text
    assert f"With round-robin, {missing[1]} of 40 requests did not end" in text
    text = " ".join(Page(report_page(made_outcomes(capacity_tokens=128))).texts("p"))
    assert "40 requests are longer" in text
    assert "did not end" not in text, "they were never begun"


def test_answers_of_one_token_have_no_time_per_token() -> None:
    page = sound(report_page(made_outcomes(trace=made_trace(output_tokens=1))))
    assert figures(page)["e2"]["TPOT mean"] == "-"
    assert "Time per token after the first." not in page.texts("strong")
    assert "End-to-end latency." in page.texts("strong")


def test_many_replicas_are_a_band() -> None:
    words = sound(report_page(made_outcomes(replicas=9))).texts("text")
    assert "median replica" in words
    assert not [word for word in words if word.startswith("replica ")]


@pytest.mark.parametrize("name", ["<b>&", "$a$ $b$", "_策略", "x" * 100])
def test_names_may_be_anything(name: str, outcomes: list[Outcome]) -> None:
    page = sound(report_page([replace(outcomes[0], policy=name, trace=name), replace(outcomes[1], policy=name)]))
    assert page.texts("h1") == [f"{name}: {name}, {name} (2)"]
    assert page.texts("text").count(name) == 4 + 3 + 1 + 1
    assert list(figures(page)) == [name, f"{name} (2)"]


def crowd(outcome: Outcome, seed: int, requests: int = 6000) -> Outcome:
    """As if so many requests had been completed, by a rule of its own."""
    draws = np.random.default_rng(seed)
    arrived = np.sort(draws.uniform(0, 4.0, requests))
    ttft = draws.lognormal(size=requests)
    fields: dict[str, Any] = dict.fromkeys(("prompt_tokens", "cached_tokens", "computed_tokens", "replica", "numbers"))
    return replace(
        outcome,
        **{name: np.resize(getattr(outcome, name), requests) for name in fields},
        policy=f"policy {seed}",
        requests=requests,
        arrived=arrived,
        ttft=ttft,
        e2e=ttft + draws.lognormal(size=requests),
        tpot=draws.lognormal(size=requests),
        queueing=ttft / 2,
        reasons={f"rule {seed}": requests // 2, "common": requests // 2},
    )


def test_a_large_tournament_stays_small_and_all_of_it_can_be_told_apart() -> None:
    (outcome,) = made_outcomes(["e2"], replicas=8)
    document = report_page([crowd(outcome, seed) for seed in range(12)])
    assert len(document.encode()) < 2_000_000
    page = sound(document)
    assert page.texts("h1") == ["made: 12 policies"]
    assert {f"rule {number}" for number in range(12)} <= set(page.texts("text"))
    first = document[document.index("<svg") : document.index("</svg>")]
    lines = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; ([^"]*stroke-width: 1.8[^"]*)"', first)
    assert len(lines) == len(set(lines)) == 12, "every line has a look of its own"
    assert document.count("<pattern") == 13 - 7, "there are 7 colours, and more rules are hatched"


# What it needs


def test_without_outcomes_there_is_no_report() -> None:
    with pytest.raises(InvalidRequest, match="at least one outcome"):
        report_page([])


def test_without_matplotlib_the_error_names_the_extra_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome], tmp_path: Path
) -> None:
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(PrebleError, match=r"pip install 'preble\[report\]'"):
        write_report(outcomes, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_loaded_when_a_page_is_made_and_not_before() -> None:
    code = "import sys, preble.sim.report; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
