"""The page frame and the plots in it: escaped, self-contained, the same every time."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import matplotlib
import pytest
from matplotlib.figure import Figure

from preble.errors import PrebleError
from preble.sim import html
from preble.sim.html import INK, Plot, Section, Table, figure_svg, page, plot_style, require_plots


def figure(label: str = "tokens", slope: float = 1.0) -> Figure:
    with plot_style():
        made = Figure(figsize=(4, 2))
        axes = made.add_subplot()
        axes.plot([1, 10, 100], [0, slope, 2 * slope], marker="o")
        axes.set_xscale("log")
        axes.set_xlabel(label)
    return made


class Outline(HTMLParser):
    """Attributes and text of a page, by tag."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = [""]
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "path", "use", "rect"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))


def test_all_text_is_escaped_and_all_of_it_is_there() -> None:
    nasty = "<script>alert('&')</script>"
    table = Table((f"{nasty} head", "b"), ((f"{nasty} cell", "2"),), caption=f"{nasty} caption")
    plot = Plot(f"{nasty} plot", figure_svg(figure(nasty)), f"{nasty} below")
    document = page(
        f"{nasty} title", Section(f"{nasty} section", f"{nasty} one\n\ntwo", [table], [plot]), subtitle=nasty
    )
    outline = Outline(document)
    assert "script" not in {tag for tag, *_ in outline.attributes} | {tag for tag, _ in outline.texts}
    for text in (
        ("title", f"{nasty} title"),
        ("h1", f"{nasty} title"),
        ("h2", f"{nasty} section"),
        ("p", nasty),
        ("p", f"{nasty} one"),
        ("p", "two"),
        ("caption", f"{nasty} caption"),
        ("th", f"{nasty} head"),
        ("td", f"{nasty} cell"),
        ("strong", f"{nasty} plot."),
        ("figcaption", f"{nasty} below"),
        ("text", nasty),
    ):
        assert text in outline.texts


def test_leading_columns_are_aligned_to_the_left() -> None:
    outline = page("t", Section(tables=[Table(("a", "b", "c"), [("1", "2", "3")], left=2)]))
    assert re.findall(r"<t[hd][^>]*>", outline.split("<tbody>")[1]) == [
        '<td class="left">',
        '<td class="left">',
        "<td>",
    ]


def test_a_page_loads_nothing() -> None:
    one, two = figure_svg(figure()), figure_svg(figure(slope=2.0))
    document = page("t", Section("s", plots=[Plot("one", one), Plot("two", two)]))
    assert set(re.findall(r"""https?://[^"'\s<]+""", document)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    outline = Outline(document)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, *_ in outline.attributes}
    links = [value for _, name, value in outline.attributes if name in ("href", "xlink:href", "src")]
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert links
    assert all(value and value.startswith("#") for value in links)
    clips = re.findall(r"url\((#[^)]+)\)", document)
    assert clips
    assert {value[1:] for value in [*links, *clips] if value} == set(ids)
    assert len(ids) == len(set(ids)), "the figures of a page share one space of ids"


def test_plots_take_the_colour_of_the_text_and_words_in_them_stay_words() -> None:
    svg = figure_svg(figure('id="m1" and href="#x" of url(#y)'))
    assert INK not in svg
    assert "currentColor" in svg
    assert 'id="m1" and href="#x" of url(#y)' in svg
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")


def test_the_same_figure_gives_the_same_bytes_whatever_the_settings_of_matplotlib() -> None:
    before = figure_svg(figure())
    assert figure_svg(figure()) == before
    with matplotlib.rc_context(
        {"svg.hashsalt": "other", "font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}
    ):
        assert figure_svg(figure()) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_plots()
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    with pytest.raises(PrebleError, match=r"pip install 'preble\[report\]'"):
        require_plots()
