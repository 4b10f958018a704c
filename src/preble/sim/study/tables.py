"""A study in words and tables, for a terminal and for a page."""

from __future__ import annotations

from preble.sim.html import Table
from preble.sim.study.distribution import PERCENTILES, Distribution
from preble.sim.study.study import Study

NOT_TOLD = "-"
NOTHING_SHARED = "No two prompts share a block, as far as the trace tells: a prefix cache would hit nothing."


def headline(study: Study) -> str:
    """What was studied, in a sentence."""
    requests = f"{study.requests:,} request{'s' if study.requests > 1 else ''}"
    sessions = f" of {study.sessions:,} session{'s' if study.sessions > 1 else ''}" if study.sessions else ""
    duration = study.arrivals.duration
    if duration:
        return f"{requests}{sessions} in {seconds(duration)}"
    return f"{requests}{sessions}" + (", all at once" if study.requests > 1 else "")


def overview(study: Study) -> Table:
    """The numbers that stand for themselves."""
    arrivals, sharing = study.arrivals, study.sharing
    rows = [
        ("requests per second", NOT_TOLD if arrivals.rate is None else f"{arrivals.rate:,.3g}"),
        ("variation of the gaps between them", NOT_TOLD if arrivals.variation is None else f"{arrivals.variation:.2f}"),
        *((f"dispersion over {seconds(one.window)}", f"{one.index:.2f}") for one in arrivals.dispersion),
        ("prompt tokens per output token", f"{study.prompt_output_ratio:,.3g}"),
        ("prompt tokens shared with another request", percent(sharing.shared)),
        ("ideal hit rate", percent(sharing.ideal_hit_rate)),
        ("distinct prompt tokens", f"{sharing.distinct_tokens:,}"),
        ("key portions", f"{sharing.key_portions.count:,}"),
        ("prompt tokens in the key portion", percent(sharing.key_portions.share)),
    ]
    return Table((), rows)


def distributions(study: Study) -> Table:
    """Lengths of prompts and outputs, and what key portions are like."""
    keys = study.sharing.key_portions
    header = ("", "mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    named = {
        "prompt tokens": study.prompt_tokens,
        "output tokens": study.output_tokens,
        "tokens per key portion": keys.tokens,
        "requests per key portion": keys.requests,
    }
    return Table(header, [(name, *_numbers(distribution)) for name, distribution in named.items()])


def cache_sizes(study: Study) -> Table:
    """The hit rate by the size of a cache: three sizes a decade, and what parts of the ideal take. Without rows where
    nothing is shared."""
    *curve, whole = study.cache.curve
    notes = {one.cache: f"{one.of_ideal:.0%} of the ideal" for one in study.cache.needed}
    notes.setdefault(whole, "all distinct tokens")
    # 10,000, 20,000, 50,000 and so on; the curve has more sizes.
    shown = [one for one in curve if f"{one.tokens:e}"[:3] in ("1.0", "2.0", "5.0")]
    points = sorted({*shown, whole, *notes}, key=lambda one: one.tokens)
    rows = [(f"{one.tokens:,}", percent(one.hit_rate), notes.get(one, "")) for one in points if whole.hit_rate]
    return Table(("cache, tokens", "hit rate", ""), rows, left=0)


def hottest(study: Study) -> Table:
    """The shared runs of the prefix tree with most prompt tokens in them. Without rows where nothing is shared."""
    header = ("from token", "tokens", "requests", "of all prompt tokens", "first in request")
    rows = [
        (f"{run.start:,}", f"{run.tokens:,}", f"{run.requests:,}", percent(run.share), f"{run.first_request:,}")
        for run in study.sharing.hottest
    ]
    return Table(header, rows, left=0)


def percent(share: float) -> str:
    """With one digit behind the point."""
    return f"{share:.1%}"


def seconds(duration: float) -> str:
    """In a unit that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if duration >= length:
            return f"{duration / length:.3g} {unit}"
    return f"{duration:.3g} s"


def _numbers(distribution: Distribution) -> tuple[str, ...]:
    percentiles = [distribution.percentile(percent) for percent in PERCENTILES]
    mean = distribution.mean
    return (
        f"{mean:,.1f}" if mean < 100 else f"{mean:,.0f}",
        *(f"{value:,.0f}" for value in percentiles),
        f"{distribution.max:,}",
    )
