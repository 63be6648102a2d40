"""The report on a phone, in a real browser: nothing is broken, missing, fetched, or wider than the screen."""

import numpy as np
import pytest

from sysdpo_jax.evaluation import ImageRow, ImageSequence, Report, TextTable, learning_figures, write_report
from tests.evaluation.browser import chromium, open_page
from tests.evaluation.test_report import SYSTEM, TABLE, rows

BROWSER = chromium()
PHONE = 360

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    long = "a caption of a good many words, and one_word_without_any_place_to_break_it_" + "x" * 80
    images = np.random.default_rng(0).random((3, 64, 64, 3))
    sequences = tuple(ImageSequence(method, images, ("short", long, "a red ball")) for method in ("before", "aligned"))
    report = Report(
        title="A system of two models, and a title that is long enough to need a second line on a phone",
        description="One paragraph.\n\nAnother one.",
        tables=(TABLE,),
        figures=learning_figures({"run": rows(), "other": rows(2.0)}),
        images=(ImageRow(long, sequences),),
        texts=(TextTable("answers", ("prompt", "before", "after"), ((long, long, long),)),),
        system=SYSTEM,
        configuration={"system": {"nodes": {"a": long}}, "seed": 0},
        made_by={"command": "python -m experiments.train " + "--flag " * 40},
    )
    path = folder / "report.html"
    write_report(path, report)
    with open_page(BROWSER, tmp_path_factory.mktemp("profile")) as opened:
        opened.open(path, PHONE)
        yield opened


def test_it_loads_without_a_complaint_or_a_request(page):
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_it_shows_everything(page):
    """What has a size on the screen, not what is in the text."""
    visible = "[...document.querySelectorAll('{}')].filter(x => x.getBoundingClientRect().width > 20).length"
    assert page.value(visible.format("table.results")) == 1
    assert page.value(visible.format(".chart svg")) == 5
    assert page.value(visible.format(".sequence img")) == 6
    assert page.value(visible.format("svg.graph")) == 1
    assert page.value("[...document.images].every(x => x.complete && x.naturalWidth > 0)")


def test_nothing_is_wider_than_the_screen(page):
    """Wide tables and the graph scroll inside their own boxes."""
    assert page.value("window.innerWidth") == PHONE
    assert page.value("document.documentElement.scrollWidth") == PHONE
    outside = """[...document.body.querySelectorAll('*')].filter(x => {
        for (let p = x; p && p !== document.body; p = p.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
        return !x.closest('svg') && x.getBoundingClientRect().right > window.innerWidth + 0.5;
    }).map(x => x.tagName + '.' + x.className)"""
    assert page.value(outside) == []


def test_text_can_be_read(page):
    """12 pixels at least, except in drawings."""
    sizes = """[...document.body.querySelectorAll('*')].filter(x => !x.closest('svg') && x.innerText)
        .map(x => parseFloat(getComputedStyle(x).fontSize))"""
    assert min(page.value(sizes)) >= 12
