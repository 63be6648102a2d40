"""Texts of several methods side by side, for the same prompts and seeds."""

from dataclasses import dataclass

from sysdpo_jax.report.markup import Markup, element, join


@dataclass(frozen=True)
class TextTable:
    """Cells of plain text under a header. Raises ValueError naming a row with too few or too many cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(f"table {self.title!r}, row {number}: {len(row)} cells for {len(self.header)} columns")


def html_texts(table: TextTable) -> Markup:
    """A <table> with the title as its caption."""
    head = element("tr", *(element("th", name, scope="col") for name in table.header))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in table.rows]
    return element("table", element("caption", table.title), element("thead", head), element("tbody", join(*body)))
