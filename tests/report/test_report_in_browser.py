"""The report in a headless Chromium, as wide as a phone: it draws what it was given, and only wide boxes scroll.

A page around it holds it in a frame of that width and measures; the report's own policy, which forbids scripts, stays.
"""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from sysdpo_jax import Categorical, CompoundSystem, Node, Tool
from sysdpo_jax.evaluation import Estimate, Interval
from sysdpo_jax.report import (
    Column,
    ComparedRuns,
    ImageRow,
    ImageSequence,
    Report,
    Row,
    ShownRun,
    Table,
    TextTable,
    run_figures,
    write_report,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
PHONE, DESK = 360, 1280

# Boxes may reach beyond the frame inside of one that scrolls, and nowhere else.
MEASURE = """
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, found = {};
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const inside = (e) => e && (scrolls(e) || inside(e.parentElement));
  const all = [...page.body.querySelectorAll("*")];
  const width = (e) => Math.round(e.getBoundingClientRect().width);
  found.width = page.documentElement.scrollWidth;
  const over = all.filter((e) => !inside(e) && e.getBoundingClientRect().right > WIDTH + 0.5);
  found.over = over.map((e) => e.outerHTML.slice(0, 90));
  const scrolling = all.filter((e) => e.scrollWidth > e.clientWidth + 1 && scrolls(e));
  found.scrolling = scrolling.map((e) => [e.className, e.firstElementChild.tagName]);
  found.tables = [...page.querySelectorAll("table.results")].map((e) => [e.rows.length, width(e) > 100]);
  found.charts = [...page.querySelectorAll(".chart svg")].map(width);
  found.curves = [...page.querySelectorAll(".curve.mean > path")].map((e) => e.getTotalLength() > 50);
  found.colours = new Set([...page.querySelectorAll(".curve.mean > path")].map((e) => getComputedStyle(e).stroke)).size;
  const top = page.querySelector(".headline").getBoundingClientRect();
  found.headline = [page.querySelector(".headline p").innerText, top.left >= 0, top.right <= WIDTH, top.bottom < 800];
  const shown = [...page.querySelectorAll("table.results tbody tr")].map((e) => e.cells[1].getBoundingClientRect());
  found.wins = shown.map((e) => e.left >= 0 && e.right <= WIDTH);
  const rows = [...page.querySelectorAll("table.runs tbody tr")].filter((e) => e.cells.length == 2);
  const sides = rows.map((e) => [...e.cells].map((cell) => cell.getBoundingClientRect()));
  found.beside = sides.map(([a, b]) => a.right <= b.left + 1 && b.right <= WIDTH && b.width > 100);
  found.text = Math.min(...[...page.querySelectorAll(".chart svg text")].map((e) => e.getBoundingClientRect().height));
  found.pictures = [...page.images].map((e) => [e.complete, e.naturalWidth, width(e)]);
  found.nodes = [...page.querySelectorAll(".graph .node")].map((e) => [e.dataset.name, width(e) > 30]);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
"""


def report():
    long = "a_name_of_a_component_that_is_longer_than_any_telephone_is_wide_and_has_no_place_to_break_it_at"
    rng = np.random.default_rng(0)
    step = lambda k: {  # noqa: E731
        "step": k, "loss": 0.7 - 0.01 * k, "rewards/accuracies": 0.5 + 0.01 * k, "rewards/margins": 0.1 * k,
        "rewards/margins/answer": 0.06 * k, "rewards/margins/image": 0.04 * k, "grad_norm/lm": 1.0 / (k + 1),
        "eval/win_rate": 0.5 + 0.01 * k, "eval/win_rate/low": 0.4 + 0.01 * k, "eval/win_rate/high": 0.6 + 0.01 * k,
    }  # fmt: skip
    shapes = {"small": (12, 12), "large": (256, 320)}
    system = CompoundSystem(
        ("request",),
        (
            Node("answer", Categorical(2, (2,)), ("request",), params=long),
            Node("captions", Tool(str.split), ("answer",), plate=3),
            Node("image", Categorical(2, (2,)), ("captions",), plate=3),
        ),
    )
    return Report(
        title=f"The alignment of {long}",
        description=f"What was done to {long}.\n\nAnd more.",
        tables=(
            Table(
                "Held-out runs",
                tuple(
                    Column(name) for name in ("preference score", "order consistency", "well-formed answers", "error")
                ),
                tuple(Row(name, (Estimate(0.1, 0.01, 500),) * 4) for name in ("reference", long)),
            ),
            Table(
                "Evaluations",
                (Column("win rate", digits=1, percent=True), Column("score"), Column("change")),
                tuple(
                    Row(f"step {k}, best", (Estimate(0.75, None, 500, Interval(0.7, 0.8)),) * 3) for k in (4000, 8000)
                ),
            ),
        ),
        figures=run_figures([step(k) for k in range(30)]),
        images=tuple(
            ImageRow(
                f"{size} pictures of {long}",
                tuple(ImageSequence(m, rng.random((3, *shape, 3)), ("one", "two", long)) for m in ("reference", long)),
            )
            for size, shape in shapes.items()
        ),
        system=system,
        configuration={"system": {long: long}, "data": "/a/path/" + "very/" * 30 + "long.jsonl"},
        made_by={"command": "python -m sysdpo_jax.cli.train " + "--flag value " * 20},
        texts=(TextTable("Answers", ("request", "reference", "aligned"), (("Why?", "word " * 60, long),)),),
        headline=("Win rate 75.0% [70.0, 80.0] over 125 prompts x 4 samples, best of 12 evaluations at step 8000.",),
        runs=(
            ComparedRuns(
                "run 0-0",
                {"request": long},
                tuple(
                    ShownRun(name, {"answer": "word " * 60 + long, "image": [rng.random((256, 320, 3))]}, "0.1")
                    for name in ("before training", f"after {long}")
                ),
            ),
        ),
        warnings=(f"steps 0 to 9: the node {long!r} carries 97.0% of the margin",),
    )


def opened(path, width, folder):
    """What the page around the report measured, and the lines of the browser's console."""
    frame = f'<iframe srcdoc="{html.escape(path.read_text(encoding="utf-8"))}" width="{width}" height="800"></iframe>'
    around = folder / f"around-{width}.html"
    style = "<style>iframe { border: 0 }</style>"
    script = f"<script>{MEASURE.replace('WIDTH', str(width))}</script>"
    around.write_text(
        f"<!DOCTYPE html><html><head><meta charset=utf-8>{style}{script}</head><body>{frame}</body></html>"
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,900", "--hide-scrollbars", "--virtual-time-budget=10000", "--dump-dom", around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    found = re.search('<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-3000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_report(folder / "report.html", report())
    return folder


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_report_is_whole_and_no_wider_than_its_window(page, width):
    found, console = opened(page / "report.html", width, page)
    assert console == []
    assert found["width"] == width
    assert found["over"] == []
    assert {tuple(box) for box in found["scrolling"]} <= {("wide", "TABLE"), ("wide", "svg")}
    assert found["tables"] == [[3, True], [3, True]]
    assert found["headline"][0].startswith("Win rate 75.0% [70.0, 80.0] over 125 prompts")
    assert found["headline"][1:] == [True] * 3
    assert found["wins"][-2:] == [True, True]
    assert found["beside"] == [True] * 3
    assert len(found["charts"]) == 6
    assert all(250 <= wide <= width for wide in found["charts"])
    assert found["curves"] == [True] * 7
    assert found["colours"] >= 2
    assert found["text"] >= 8
    assert [(done, natural) for done, natural, _ in found["pictures"]] == [
        *[(True, 320)] * 2, *[(True, 12)] * 6, *[(True, 320)] * 6]  # fmt: skip
    assert all(72 <= wide <= width for *_, wide in found["pictures"])
    assert found["nodes"] == [["request", True], ["answer", True], ["captions", True], ["image", True]]


def test_what_the_browser_complains_of_is_seen(page):
    """The test above would see a script or a picture from elsewhere, and a box that is too wide."""
    text = (page / "report.html").read_text(encoding="utf-8")
    worse = '<script>1</script><img src="https://example.invalid/x.png"><div style="width: 500px">wide</div></body>'
    (page / "worse.html").write_text(text.replace("</body>", worse), encoding="utf-8")
    found, console = opened(page / "worse.html", PHONE, page)
    assert len([line for line in console if "Content Security Policy" in line]) >= 2
    assert found["width"] > PHONE
    assert any("width: 500px" in box for box in found["over"])
