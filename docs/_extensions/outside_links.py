"""Links from pages to files outside docs/, which are relative paths, so that they work on a git host as well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([\w./-]+\.md)(#[\w-]+)?\)")


def _mend(app: Sphinx, page: str, source: list[str]) -> None:
    """README.md is the site's first page; another Markdown file outside docs/ is offered as the file that it is. (So
    are files of other kinds, without help.)"""
    folder = (Path(app.srcdir) / page).parent

    def mended(link: re.Match[str]) -> str:
        up, path, _ = link.groups()
        target = (folder / up / path).resolve()
        if target.is_relative_to(Path(app.srcdir)):
            return link[0]
        if target == Path(app.srcdir).parent / "README.md":
            return "](/index.md)"
        return f"](path:{up}{path})"

    source[0] = OUTSIDE.sub(mended, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _mend)
    return {"parallel_read_safe": True}
