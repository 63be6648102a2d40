"""The page parsed by html.parser: whole, closed, self-contained, and showing what it was given."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from sysdpo_jax import Categorical, CompoundSystem, Node, Tool
from sysdpo_jax.evaluation import Estimate, Interval
from sysdpo_jax.report import (
    Column,
    ComparedRuns,
    Curve,
    Figure,
    ImageRow,
    ImageSequence,
    Report,
    Row,
    ShownRun,
    Table,
    TextTable,
    console_table,
    learning_figures,
    markdown_table,
    run_figures,
    run_warnings,
    write_report,
)
from sysdpo_jax.report.charts import COLOURS, chart_svg

TABLE = Table(
    "Held-out runs",
    (Column("score"), Column("order", digits=1, percent=True), Column("error", digits=2, best="min")),
    (
        Row("before", (Estimate(-0.108, 0.012, 768), Estimate(0.25, 0.0164, 768), 0.08)),
        Row("joint & <both>", (Estimate(0.076, 0.0111, 768), Estimate(0.445, 0.018, 768), 0.1)),
        Row("x | y", (Estimate(-0.0001, 0.01, 500), None, None)),
    ),
)
BINARY = Categorical(2, (2,))
SYSTEM = CompoundSystem(
    ("request", "context"),
    (
        Node("answer", BINARY, ("request",), params="lm"),
        Node("captions", Tool(str.split), ("answer", "context"), plate=3),
        Node("images", BINARY, ("captions",), params="unet", plate=3, weight=50.0),
        Node("review", Categorical(2, (2, 2, 2)), ("request", "answer", "images"), params="lm"),
    ),
)


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, the values of links and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data)


def rows(scale=1.0):
    """Metrics as read_metrics returns them, one of them null."""
    return [
        {"step": k, "loss": None if k == 3 else 0.7 - 0.01 * k * scale, "rewards/accuracies": 0.5,
         "rewards/margins": 0.1 * k, "rewards/margins/answer": 0.06 * k, "rewards/margins/images": 0.04 * k}
        for k in range(10)
    ]  # fmt: skip


def page_of(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_a_full_page_shows_all_and_loads_nothing(tmp_path):
    images = np.random.default_rng(0).random((3, 12, 12, 3))
    sequences = tuple(ImageSequence(m, images, ("one", "two", "</td>")) for m in ("before", "joint & <both>"))
    report = Report(
        "A <script>alert(1)</script> title",
        "First paragraph.\n\nSecond & last.",
        (TABLE,),
        learning_figures({"seed 0": rows(), "seed 1": rows(2.0)}),
        (ImageRow("a ball getting more bright", sequences),),
        SYSTEM,
        {"align": {"steps": 200, "rate": 3e-4}, "objects": ("ball", "<box>")},
        {"machine": "two cores", "date": "2020-01-02", "command": 'python -m "run" --seeds 0 1'},
    )
    text, page = page_of(report, tmp_path)
    assert len(page.links) == 6
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert "<script" not in text
    identified = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(identified)) == len(identified)
    shown = "\n".join(page.text)
    for expected in (
        "A <script>alert(1)</script> title", "First paragraph.", "Second & last.", "joint & <both>", "</td>",
        "-0.108 ± 0.012", "0.076 ± 0.011", "25.0 ± 1.6", "44.5 ± 1.8", "0.000 ± 0.010", "0.08", "0.10", "768", "500",
        "a ball getting more bright", "seed 0 (1 values not finite)", "margin by node, seed 1", "align.steps", "200",
        "0.0003", "('ball', '<box>')", "two cores", "2020-01-02", 'python -m "run" --seeds 0 1', SYSTEM.describe(),
    ):  # fmt: skip
        assert expected in shown
    # Loss and margin of both runs together, each run's nodes, and the graph; the accuracy is always the same.
    assert [tag for tag, _ in page.tags].count("svg") == 2 + 2 + 1
    assert "accuracy: seed 0 0.5 at all 10 steps; seed 1 0.5 at all 10 steps" in page.text


def test_an_empty_report_is_a_page_of_its_title(tmp_path):
    _, page = page_of(Report("Nothing yet", ""), tmp_path)
    assert not {"svg", "img", "table", "h2", "p"} & {tag for tag, _ in page.tags}
    assert page.text.count("Nothing yet") == 2


def test_the_best_of_each_column_is_marked():
    lines = markdown_table(TABLE).splitlines()
    assert lines[0] == "| method | score | order (%) | error | n |"
    assert lines[2] == "| before | -0.108 ± 0.012 | 25.0 ± 1.6 | **0.08** | 768 |"
    assert lines[3] == r"| joint & \<both> | **0.076 ± 0.011** | **44.5 ± 1.8** | 0.10 | 768 |"
    assert lines[4] == r"| x \| y | 0.000 ± 0.010 | – | – | 500 |"  # noqa: RUF001
    plain = console_table(TABLE).splitlines()
    assert plain[0] == "Held-out runs"
    assert len({len(line) for line in plain[1:]}) == 1
    assert re.findall(r"\*\S+", "\n".join(plain)) == ["*0.08", "*0.076", "*44.5"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 'a': 1 values for 2 columns"):
        Table("t", (Column("x"), Column("y")), (Row("a", (1.0,)),))


def test_texts_are_shown_as_they_are(tmp_path):
    table = TextTable("runs", ("question", "answer, before"), (("2 < 3 & <b>", "yes"), ("", "no\n|")))
    _, page = page_of(Report("t", "", texts=(table,)), tmp_path)
    cells = [text for text in page.text if text not in ("t", "runs", "Texts of the same prompts and seeds")]
    assert cells == ["question", "answer, before", "2 < 3 & <b>", "yes", "no\n|"]
    with pytest.raises(ValueError, match="table 'runs', row 1: 1 cells for 2 columns"):
        TextTable("runs", ("a", "b"), (("1", "2"), ("3",)))


def test_a_table_without_rows_is_its_header(tmp_path):
    _, page = page_of(Report("t", "", (Table("empty", (Column("x"),), ()),)), tmp_path)
    assert [tag for tag, _ in page.tags].count("tr") == 1


def drawn_curves(figure, kind):
    """The lines of this kind, each an array of points, and the places of its dots; x to the right and y down."""
    lines = []
    for group in ET.fromstring(chart_svg(figure)).iter("g"):
        if kind in group.get("class", "").split():
            path = next(group.iter("path")).get("d")
            pieces = [re.findall(r"(-?[\d.]+) (-?[\d.]+)", piece) for piece in path.split("M")[1:]]
            dots = [(float(use.get("x")), float(use.get("y"))) for use in group.iter("use")]
            lines.append(([np.array(piece, float) for piece in pieces], dots))
    return lines


def test_a_curve_is_drawn_to_scale():
    """Ten points are too few to smooth, so both lines are the values; the middle one lies in the middle."""
    figure = Figure("f", (Curve("c", (0, 5, 10), (2.0, 3.0, 4.0)),))
    [([raw], _)], [([mean], _)] = drawn_curves(figure, "raw"), drawn_curves(figure, "mean")
    np.testing.assert_array_equal(raw, mean)
    np.testing.assert_allclose(raw[1], (raw[0] + raw[2]) / 2, atol=0.02)
    (left, bottom), (right, top) = raw[0], raw[2]
    width, height = map(float, ET.fromstring(chart_svg(figure)).get("viewBox").split()[2:])
    assert 0 < left < 0.2 * width < 0.9 * width < right < width
    assert 0 < top < 0.2 * height < 0.7 * height < bottom < height


def test_marks_are_vertical_lines_at_their_steps():
    figure = Figure("f", (Curve("c", (0, 5, 10), (2.0, 3.0, 4.0)),), (0, 5))
    [([curve], _)] = drawn_curves(figure, "raw")
    marks = [line for [line], _ in drawn_curves(figure, "round")]
    for mark, point in zip(marks, curve[:2], strict=True):
        np.testing.assert_allclose(mark[:, 0], point[0], atol=0.02)
    assert drawn_curves(Figure("f", figure.curves), "round") == []
    assert [made.marks for made in run_figures(rows(), [0, 8])] == [(0, 8)] * 4


def test_a_value_that_is_not_finite_breaks_the_line_and_one_alone_is_a_dot():
    figure = Figure("f", (Curve("c", tuple(range(6)), (1.0, 2.0, None, float("nan"), 3.0, float("inf"))),))
    assert "nan" not in chart_svg(figure)
    for kind in ("raw", "mean"):
        [(pieces, dots)] = drawn_curves(figure, kind)
        assert [len(np.unique(piece, axis=0)) for piece in pieces] == [2, 1]
        np.testing.assert_allclose(dots, pieces[1][:1], atol=0.02)


def test_the_strong_line_is_the_moving_average():
    """60 steps of +1, -1: a window of 3 leaves a third of the height."""
    figure = Figure("f", (Curve("c", tuple(range(60)), tuple((-1.0) ** k for k in range(60))),))
    [([raw], _)], [([mean], _)] = drawn_curves(figure, "raw"), drawn_curves(figure, "mean")
    np.testing.assert_allclose(np.ptp(mean[5:-5, 1]), np.ptp(raw[:, 1]) / 3, atol=0.03)


def test_a_chart_is_named_and_the_same_each_time():
    """Whatever the names hold; they are in the page, beside the drawing."""
    figure = Figure(
        "loss <of> $x_{$", (Curve("$\\frac{", (0, 1), (1.0, None)), Curve("\U0001f600", (0, 1), (2.0, 1e-9)))
    )
    root = ET.fromstring(chart_svg(figure))
    assert (root.get("role"), root.find("title").text) == ("img", "loss <of> $x_{$ over steps")
    assert chart_svg(figure) == chart_svg(figure)


@pytest.mark.parametrize(
    "values", [(1e308, -1e308, 0.0), (0.0, 1e-310, 0.0), (-1e30, 1e30, 1e-30), (1e9, 1e9 + 100, 0)]
)
def test_values_of_any_size_are_drawn(values):
    text = chart_svg(Figure("f", (Curve("c", (0, 1, 2), values),)))
    assert "nan" not in text
    assert "inf" not in text


def test_more_curves_than_colours_are_told_apart(tmp_path):
    """By dashes, in the drawing and in the legend, which has the same colours."""
    number = len(COLOURS) + 1
    figure = Figure("f", tuple(Curve(f"c{k}", (0, 1), (0.0, k)) for k in range(number)))
    _, page = page_of(Report("t", "", figures=(figure,)), tmp_path)
    drawn = [group for group in ET.fromstring(chart_svg(figure)).iter("g") if "mean" in group.get("class", "")]
    looks = [next(group.iter("path")).get("style") for group in drawn]
    assert len(set(looks)) == number
    assert ["dasharray" in look for look in looks] == [False] * (number - 1) + [True]
    legend = [attrs["class"] for tag, attrs in page.tags if tag == "li"]
    assert [set(name.split()) for name in legend] == [
        set(group.get("class").split()) - {"curve", "mean"} for group in drawn
    ]


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (Curve("none", (), ()), "f: none no finite value"),
        (Curve("gaps", (1, 2), (None, None)), "f: gaps no finite value"),
        (Curve("dot", (7,), (0.5,)), "f: dot 0.5 at step 7 alone"),
        (Curve("dot", (7, 8), (None, 0.5)), "f: dot 0.5 at step 8 alone (1 values not finite)"),
        (Curve("f", (1, 2, 3), (48.0, 48.0, 48.0)), "f: 48 at all 3 steps"),
        (Curve("zero", (1, 2), (0, 0)), "f: zero 0 at all 2 steps"),
        # As float32 rounds it.
        (Curve("ln 2", (1, 2), (0.6931472, 0.6931471)), "f: ln 2 0.6931 at all 2 steps"),
        (Curve("band", (1, 2), (0.5, 0.5), ((0.1, 0.2), (0.8, 0.9))), "f: band 0.5 at all 2 steps"),
    ],
)
def test_what_does_not_change_is_said_and_not_drawn(curve, said, tmp_path):
    _, page = page_of(Report("t", "", figures=(Figure("f", (curve,)),)), tmp_path)
    assert "svg" not in {tag for tag, _ in page.tags}
    assert said in page.text


def test_a_figure_is_drawn_whole_where_one_of_its_curves_changes(tmp_path):
    """And a small change is a change."""
    flat, small = Curve("flat", (0, 1), (0.5, 0.5)), Curve("small", (0, 1), (0.5, 0.5001))
    figures = (Figure("both", (flat, small)), Figure("flat ones", (flat, Curve("other", (0, 1), (1.0, 1.0)))))
    _, page = page_of(Report("t", "", figures=figures), tmp_path)
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert len([attrs for _, attrs in page.tags if "mean" in attrs.get("class", "")]) == 2
    assert "flat ones: flat 0.5 at all 2 steps; other 1 at all 2 steps" in page.text


def test_a_figure_with_an_interval_is_shown_with_it():
    rows = (Row("a", (Estimate(1.0, 0.1, 16, Interval(0.81, 1.0)), None)), Row("b", (Estimate(0.5, None, 1), 0.25)))
    lines = markdown_table(
        Table("t", (Column("wins", digits=1, percent=True), Column("y", digits=2)), rows)
    ).splitlines()
    assert lines[2:] == ["| a | **100.0 [81.0, 100.0]** | – | 16 |", "| b | 50.0 | 0.25 | 1 |"]  # noqa: RUF001


def test_the_headline_stands_before_all_else(tmp_path):
    _, page = page_of(Report("t", "described", headline=("Win rate 75% <b>", "More")), tmp_path)
    assert page.text == ["t", "t", "Win rate 75% <b>", "More", "described"]
    assert ("div", {"class": "headline"}) in page.tags
    assert "headline" not in page_of(Report("t", "described"), tmp_path)[0].split("</style>")[1]


def test_whole_runs_stand_side_by_side(tmp_path):
    """Every node in the order of the graph, the runs' values beside each other; what is a picture is drawn."""
    picture = np.zeros((4, 6, 3))
    before = {"draft": "a <b>\nline", "kinds": ["x", "y"], "sizes": [1, 2.5], "image": picture, "answer": ""}
    after = before | {"draft": "c", "kinds": [picture, " "], "answer": {"role": "user", "content": "d"}}
    runs = (ShownRun("before", before, "0.1"), ShownRun("after", after, "0.3 (win)"))
    _, page = page_of(Report("t", "", runs=(ComparedRuns("run 3-0", {"q": "why?", "p": picture}, runs),)), tmp_path)
    shown = page.text[page.text.index("run 3-0") :]
    assert shown == [
        "run 3-0", "before", "after", "q", "why?", "p", "score", "0.1", "0.3 (win)", "draft", "a <b>\nline", "c",
        "kinds", "x", "y", "(white space)", "sizes", "[1, 2.5]", "[1, 2.5]", "image", "answer", "(empty)", "role",
        "user", "content", "d",
    ]  # fmt: skip
    assert [tag for tag, _ in page.tags].count("img") == 4
    with pytest.raises(ValueError, match="runs 'r': 'b' has other nodes than 'a'"):
        ComparedRuns("r", {}, (ShownRun("a", {"x": 1}, ""), ShownRun("b", {"y": 1}, "")))


def test_long_curves_are_thinned():
    figure = Figure("f", (Curve("c", tuple(range(20000)), tuple(np.sin(np.arange(20000.0)).tolist())),))
    for kind in ("raw", "mean"):
        [([line], _)] = drawn_curves(figure, kind)
        assert 2 <= len(line) <= 400


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7), (0.691, 0.693), (0, 20000), (1e-7, 3e-7), (-5, -4.9)])
def test_ticks_are_round(low, high):
    """Beside the lines of the grid; steps of a run are whole."""
    root = ET.fromstring(chart_svg(Figure("f", (Curve("c", (0, 3), (low, high)),))))
    texts = [element.text.replace("\u2212", "-") for element in root.iter("text")]
    steps, values = texts[: texts.index("step")], [float(text) for text in texts[texts.index("step") + 1 :]]
    assert steps == ["0", "1", "2", "3"]
    assert 2 <= len(values) <= 8
    gaps = np.diff(values)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)
    assert f"{gaps[0]:.0e}"[0] in "125"


def test_learning_figures_leave_out_what_no_run_has():
    assert learning_figures({}) == ()
    assert [figure.title for figure in learning_figures({"a": [{"step": 0, "loss": 1.0}], "b": rows()})] == [
        "loss", "accuracy", "margin", "margin by node, b"]  # fmt: skip


def test_a_run_is_shown_with_its_splits_its_evaluations_and_their_bands():
    made = [row | {"grad_norm/lm": 1.0, "margin_share/answer": 0.6, "drift/kl/answer": 0.1} for row in rows()]
    ends = {"eval/win_rate/low": 0.4, "eval/win_rate/high": 0.7}
    made.insert(4, {"step": 4, "eval/win_rate": 0.55, "eval/length": 9.0} | ends)
    made.append({"step": 10, "eval/win_rate": 0.6, "eval/length": 8.0} | ends)
    figures = {figure.title: [curve.name for curve in figure.curves] for figure in run_figures(made)}
    assert figures == {
        "loss": ["loss"], "accuracy": ["accuracy"], "margin": ["margin"],
        "eval/win_rate": ["eval/win_rate"], "eval/length": ["eval/length"], "margin by node": ["answer", "images"],
        "share of the margin by node": ["answer"], "drift by node: KL estimate (nats)": ["answer"],
        "gradient norm by component": ["lm"],
    }  # fmt: skip
    win_rate, length = run_figures(made)[3:5]
    assert win_rate.curves[0] == Curve("eval/win_rate", (4, 10), (0.55, 0.6), ((0.4, 0.4), (0.7, 0.7)))
    assert length.curves[0].band is None
    # The band is as wide as the interval at each of the steps: a rectangle here.
    band = next(g for g in ET.fromstring(chart_svg(win_rate)).iter("g") if "band" in g.get("class", ""))
    outline = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", next(band.iter("path")).get("d")), float)
    [([line], _)] = drawn_curves(win_rate, "mean")
    assert sorted(set(outline[:, 0])) == sorted(line[:, 0])
    low, high = sorted(set(outline[:, 1]))
    np.testing.assert_allclose((high - low) / (line[0, 1] - line[1, 1]), (0.7 - 0.4) / (0.6 - 0.55), rtol=1e-3)
    compared = learning_figures({"a": made, "b": rows()})
    assert [[curve.name for curve in f.curves] for f in compared if f.title == "eval/win_rate"] == [["a"]]


def test_warnings_of_a_run_are_told(tmp_path):
    texts = run_warnings(
        [{"step": 0}, {"step": 1, "warnings": ["first <b>", "second"]}, {"step": 2, "warnings": ["x"]}]
    )
    assert texts == ("first <b>", "second", "x")
    _, page = page_of(Report("t", "", warnings=texts), tmp_path)
    assert page.text[-3:] == list(texts)


def test_a_curve_needs_a_step_for_each_value():
    for values, band in (((1.0, 2.0), None), ((1.0,), ((0.5, 0.5), (1.5,)))):
        with pytest.raises(ValueError, match="curve 'c' has 1 steps and 2 values"):
            Curve("c", (1,), values, band)


def drawn(system, tmp_path):
    """The graph of the page, {name: (class, its texts, its outlines)} and the number of edges."""
    text, _ = page_of(Report("t", "", system=system), tmp_path)
    root = ET.fromstring(re.search(r'<svg[^>]*class="graph".*?</svg>', text, re.DOTALL)[0])
    groups = [group for group in root.iter("g") if "data-name" in group.attrib]
    nodes = {
        group.get("data-name"): (
            group.get("class").removeprefix("node "),
            [element.text for element in group.iter("text")],
            [element for element in group if element.tag in ("rect", "polygon")],
        )
        for group in groups
    }
    assert len(nodes) == len(groups)
    return root, nodes, [element.get("d") for element in root.iter("path") if element.get("class") == "edge"]


def test_the_graph_shows_each_node_once_and_every_edge(tmp_path):
    _, nodes, edges = drawn(SYSTEM, tmp_path)
    assert {name: (kind, lines, len(outlines)) for name, (kind, lines, outlines) in nodes.items()} == {
        "request": ("input", ["request", "input"], 1),
        "context": ("input", ["context", "input"], 1),
        "answer": ("component", ["answer", "Categorical", "params lm"], 1),
        "captions": ("tool", ["captions x3", "Tool"], 3),
        "images": ("component", ["images x3", "Categorical", "params unet", "weight 50"], 3),
        "review": ("component", ["review", "Categorical", "params lm"], 1),
    }
    assert len(edges) == 1 + 2 + 1 + 3


def test_both_nodes_that_share_parameters_say_so(tmp_path):
    system = CompoundSystem(("x",), (Node("a", BINARY, ("x",)), Node("b", BINARY, ("a",), params="a")))
    _, nodes, _ = drawn(system, tmp_path)
    assert nodes["a"][1] == ["a", "Categorical", "params a"]
    assert nodes["b"][1] == ["b", "Categorical", "params a"]


def test_a_node_may_have_any_name(tmp_path):
    name = '"><script>alert(1)</script>'
    _, nodes, edges = drawn(CompoundSystem(("x",), (Node(name, BINARY, ("x",)),)), tmp_path)
    assert nodes[name][1] == [name, "Categorical"]
    assert len(edges) == 1


def test_boxes_do_not_overlap_and_edges_run_to_the_right(tmp_path):
    root, nodes, edges = drawn(SYSTEM, tmp_path)
    x, y, width, height = map(float, root.get("viewBox").split())
    # The last outline is the one in front.
    boxes = [outline_box(outlines[-1]) for _, _, outlines in nodes.values()]
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert x <= left < right <= x + width
        assert y <= top < bottom <= y + height
        for other in boxes[number + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    for path in edges:
        across = [float(path[1:].split()[0]), *map(float, re.findall(r" ([\d.]+) [\d.]+(?=H|C|$)", path))]
        assert across == sorted(across)
        # Between its ends it is in no box.
        middles = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) ([\d.]+)H", path)]
        for left, top, right, bottom in boxes:
            assert not any(left <= a <= right and top <= b <= bottom for a, b in middles)


def outline_box(outline):
    """Left, top, right and bottom."""
    if outline.tag == "rect":
        x, y, width, height = (float(outline.get(name)) for name in ("x", "y", "width", "height"))
        return x, y, x + width, y + height
    corners = np.array([point.split(",") for point in outline.get("points").split()], float)
    return (*corners.min(0), *corners.max(0))
