"""Tables as commands print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(*headings: str) -> Table:
    """Thin, one line a row; a heading that ends in `<` has its column to the left."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        made.add_column(heading.rstrip("<"), justify="left" if heading.endswith("<") else "right", no_wrap=True)
    return made
