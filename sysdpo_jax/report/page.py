"""A report of an experiment as one HTML file that needs no other: tables, curves, pictures and the graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import write_whole
from sysdpo_jax.report.chart import Figure, html_figures
from sysdpo_jax.report.diagram import draw_system
from sysdpo_jax.report.markup import Markup, element, join
from sysdpo_jax.report.pictures import ImageRow, html_images
from sysdpo_jax.report.samples import ComparedRuns, html_runs
from sysdpo_jax.report.style import STYLE
from sysdpo_jax.report.tables import Table, html_table
from sysdpo_jax.report.texts import TextTable, html_texts

# The page can load nothing: whatever text it shows, it makes no request.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """What the page shows; parts that are empty are left out.

    description: paragraphs, separated by empty lines. configuration: may be nested. made_by: the machine, the date, the
    command line and the like. warnings: texts, such as `run_warnings` of a run. headline: the result, a sentence each,
    on top of the page.
    """

    title: str
    description: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    images: tuple[ImageRow, ...] = ()
    system: CompoundSystem | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[TextTable, ...] = ()
    warnings: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    runs: tuple[ComparedRuns, ...] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write the page; a reader never finds half of one. Raises ValueError for pictures that are not finite."""
    write_whole(Path(path), _page(report))


def _page(report: Report) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", report.title),
        element("style", Markup(STYLE)),
    )
    paragraphs = [element("p", " ".join(text.split())) for text in report.description.split("\n\n") if text.strip()]
    headline = element("div", *(element("p", text) for text in report.headline), class_="headline")
    top = (headline,) if report.headline else ()
    body = element("body", element("h1", report.title), *top, *paragraphs, *_sections(report))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _sections(report: Report) -> Iterator[Markup]:
    if report.warnings:
        yield _section("Warnings", element("ul", *(element("li", text) for text in report.warnings)))
    if report.tables:
        yield _section("Results", *(element("div", html_table(table), class_="wide") for table in report.tables))
    if report.figures:
        yield _section("Learning curves", html_figures(report.figures))
    if report.runs:
        yield _section("Whole runs of the same prompts and seeds", *map(html_runs, report.runs))
    if report.images:
        yield _section("Pictures of the same prompts and seeds", html_images(report.images))
    if report.texts:
        samples = (element("div", html_texts(table), class_="wide") for table in report.texts)
        yield _section("Texts of the same prompts and seeds", *samples)
    if report.system is not None:
        drawing = element("div", draw_system(report.system), class_="wide")
        yield _section("The system", drawing, element("pre", report.system.describe()))
    if report.configuration:
        yield _section("Configuration", _settings(report.configuration))
    if report.made_by:
        yield _section("How this was made", _settings(report.made_by))


def _section(title: str, *content: str) -> Markup:
    return element("section", element("h2", title), *content)


def _settings(values: Mapping[str, Any]) -> Markup:
    rows = [
        element("tr", element("th", name, scope="row"), element("td", element("code", str(value))))
        for name, value in _flat(values)
    ]
    return element("div", element("table", element("tbody", join(*rows)), class_="settings"), class_="wide")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
