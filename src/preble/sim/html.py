"""Reports as one HTML file: a page of sections with tables and plots, which loads nothing and runs no script.

Plots are matplotlib figures drawn into the page as SVG. Their text and axes take the colour of the page's text, so that
they read on light and on dark ground; the same figure always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from preble.errors import PrebleError

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

INK = "#010203"
"""Drawn in this colour, a part of a plot takes the colour of the page's text. No palette has it by accident."""
COLOURS = ("#3b6fd4", "#d69500", "#0f8f66", "#d670ab", "#c8471f", "#2fb0d6", INK)
"""Of the lines, in order. They read on white and on near-black, and the colour-blind tell them apart: hues near
those of Okabe and Ito (2008)."""
DASHES = ("-", "--", ":", "-.")
"""… and their strokes, so that neighbours differ in both and no two of 28 lines are the same."""

TAG = re.compile(r"<[^>]+>")
REFERENCE = re.compile(r'(url\(|href=")#([^)"]+)')
"""To an id, in a tag."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a table where there is more to say than a text."""

    text: str
    note: str = ""
    """Below it, small."""
    best: bool = False
    """It is marked as the best of its column."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    """One cell per column; empty for a table without a header."""
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    left: int = 1
    """This many leading columns are aligned to the left, the others to the right."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with the words below it."""

    title: str
    svg: str
    """What `figure_svg` gave. It goes into the page as it is."""
    caption: str = ""
    wide: bool = False
    """It takes the whole width of the page; two others share it."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with text, tables and plots, in this order. A single plot stands beside the tables if there is room."""

    title: str = ""
    text: str = ""
    """Paragraphs, parted by empty lines."""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def page(title: str, *sections: Section, subtitle: str = "") -> str:
    """The HTML document. All text is escaped."""
    return _template().render(title=title, subtitle=subtitle, sections=sections)


def require_plots() -> None:
    """Call it before the work that plots are to show.

    Raises:
        PrebleError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise PrebleError("plots need matplotlib, which is not installed: pip install 'preble[report]'")


@contextmanager
def plot_style() -> Iterator[None]:
    """How figures look; make them inside. No state of matplotlib is changed outside."""
    from matplotlib import rc_context, rcParamsDefault

    # From the defaults, so that somebody's own matplotlibrc does not change the report.
    settings: Any = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    with rc_context(settings | _style()):
        yield


def figure_svg(figure: Figure, name: str = "") -> str:
    """An `<svg>` element of the figure, the same for the same figure.

    Its ids are unlike those of any other figure, as all figures of a page share one space of names. Figures of a page
    that may come out the same need names that differ.
    """
    out = io.BytesIO()
    with plot_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    # A hundredth of a point is enough.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    digest = hashlib.sha256((name + svg).encode()).hexdigest()[:8]
    used = {name for tag in TAG.findall(svg) for _, name in REFERENCE.findall(tag)}

    def with_own_names(tag: re.Match[str]) -> str:
        text = REFERENCE.sub(rf"\g<1>#{digest}-\g<2>", tag[0])
        return re.sub(r' id="([^"]+)"', lambda found: f' id="{digest}-{found[1]}"' if found[1] in used else "", text)

    return TAG.sub(with_own_names, svg).strip()


def _style() -> dict[str, Any]:
    from cycler import cycler

    return {
        "svg.hashsalt": "preble",
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's colour
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # a name with dollars is a name
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=COLOURS * len(DASHES)) + cycler(linestyle=DASHES * len(COLOURS)),
        "grid.color": INK,
        "grid.alpha": 0.13,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
    }


@cache
def _template() -> Template:
    from jinja2 import Environment

    source = resources.files("preble.sim").joinpath("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(source)
