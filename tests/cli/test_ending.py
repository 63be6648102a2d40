"""What a training run ends with: the lines in the terminal, results.json, and the runs that the report shows."""

import contextlib
import io
import json
import os
import shutil
import signal
from html.parser import HTMLParser

import pytest
import yaml

from sysdpo_jax.cli.main import dispatch

PROMPTS, SAMPLES, STEPS = 24, 2, 8


def letters(question):
    return len(question) % 2


def two(run):
    """Right or wrong."""
    return run["answer"] == 2


def stops(run):
    """SIGTERM arrives in the second evaluation."""
    CALLS.append(run)
    if len(CALLS) == PROMPTS * SAMPLES + 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return two(run)


CALLS = []


class Tables(HTMLParser):
    """The rows of every table of runs, and the headline's sentences."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headline, self._cell, self._top = [], [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        kind = dict(attrs).get("class")
        if tag == "table":
            self.tables.append([] if kind == "runs" else None)
        runs = self.tables[-1] if self.tables else None
        if tag == "tr" and runs is not None:
            runs.append([])
        self._cell = tag in ("td", "th") and runs is not None
        self._top = kind == "headline" or (self._top and tag == "p")

    def handle_endtag(self, tag):
        self._top = self._top and tag != "div"
        self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.tables[-1][-1].append(data)
        if self._top:
            self.headline.append(data)

    @property
    def runs(self):
        return [table for table in self.tables if table]


def configured(folder, scorer="two", prompts=PROMPTS, **evaluation):
    """A router and a head that can learn the answer 2, on a few hundred preferences for it."""
    pairs = [
        {
            "inputs": {"question": "q" * (1 + number % 5)},
            "chosen": {"route": number % 2, "answer": 2},
            "rejected": {"route": (number + 1) % 2, "answer": number % 2},
        }
        for number in range(100)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (folder / "held.txt").write_text("".join(f"question {number}\n" for number in range(prompts)))
    table = {"factory": "sysdpo_jax:Categorical", "mode": "full"}
    config = {
        "directory": str(folder / "run"),
        "system": {
            "inputs": ["question"],
            "nodes": {
                "letters": {"tool": f"{__name__}:letters", "parents": ["question"]},
                "route": {"component": "router", "parents": ["letters"]},
                "answer": {"component": "head", "parents": ["route"]},
            },
            "components": {
                "router": table | {"settings": {"num_values": 2, "parent_sizes": [2]}},
                "head": table | {"settings": {"num_values": 3, "parent_sizes": [2]}},
            },
        },
        "data": {"source": str(folder / "pairs.jsonl")},
        "objective": {"beta": 0.5},
        "schedule": {"steps": STEPS, "batch_size": 8, "warmup": 1, "learning_rate": 0.5},
        "log_every": 1,
    }
    if scorer:
        config["evaluation"] = {"prompts": str(folder / "held.txt"), "scorer": f"{__name__}:{scorer}", "every": 4}
        config["evaluation"] |= {"samples": SAMPLES, "shown": 3} | evaluation
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return [str(folder / "run.yaml")]


def ended(folder, capsys, flags):
    """(lines of standard output, results.json, the page)"""
    dispatch(["train", *flags])
    return looked_at(folder, capsys)


def looked_at(folder, capsys):
    return capsys.readouterr().out.splitlines(), *found_in(folder)


def found_in(folder):
    results = json.loads((folder / "run" / "results.json").read_text())
    return results, Tables((folder / "run" / "report.html").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training that ended, and what `looked_at` finds of it; nothing may be changed there."""
    folder, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        dispatch(["train", *configured(folder)])
    return folder, printed.getvalue().splitlines(), *found_in(folder)


def without_evaluation(folder, other):
    """The flags of a copy of the run in `folder`, whose evaluation is left out."""
    shutil.copytree(folder / "run", other / "run")
    config = yaml.safe_load((folder / "run.yaml").read_text()) | {"directory": str(other / "run")}
    del config["evaluation"]
    (other / "run.yaml").write_text(yaml.safe_dump(config))
    return [str(other / "run.yaml")]


def runs_of(folder, step):
    lines = (folder / "run" / "evaluation" / f"runs-{step:08d}.jsonl").read_text().splitlines()
    return {run["id"]: run for run in map(json.loads, lines)}


def test_the_terminal_the_file_and_the_page_say_the_same(whole):
    folder, lines, results, page = whole
    final, before = results["final"], runs_of(folder, 0)
    after = runs_of(folder, final["step"])
    changes = [after[name]["score"] - before[name]["score"] for name in before]
    rate = sum((change > 0) + 0.5 * (change == 0) for change in changes) / len(changes)
    assert rate > 0.6
    assert final["win_rate"] == pytest.approx(rate)
    assert final["score_difference"] == pytest.approx(sum(changes) / len(changes))
    assert final["score_before"] == pytest.approx(sum(run["score"] for run in before.values()) / len(before))
    ends = f"[{100 * final['win_rate/low']:.1f}, {100 * final['win_rate/high']:.1f}]"
    assert lines[0].startswith(f"win rate {100 * rate:.1f}% {ends} over 24 prompts x 2 samples, best of 2 evaluations")
    assert lines[1].startswith(f"score {final['score_before']:.4g} before, {final['score']:.4g} after: difference +")
    assert lines[2:] == [str(folder / "run" / "report.html")]
    assert results["summary"] == lines[:2]
    assert [sentence.lower() for sentence in page.headline] == [f"{line}.".lower() for line in lines[:2]]


def test_whole_runs_of_several_prompts_are_shown_with_their_scores(whole):
    folder, _, results, page = whole
    step = results["final"]["step"]
    before, after = runs_of(folder, 0), runs_of(folder, step)
    assert len(page.runs) == 3
    for name, rows in zip(("0-0", "12-0", "23-0"), page.runs, strict=True):
        first, second = before[name], after[name]
        verdict = {1: "win", 0: "tie", -1: "loss"}[second["score"] - first["score"]]
        assert rows == [
            ["before training", f"after {step} steps"],
            ["question"],
            [first["inputs"]["question"]],
            ["score"],
            [f"{first['score']:g}", f"{second['score']:g} ({verdict})"],
            *[
                row
                for node in ("letters", "route", "answer")
                for row in ([node], [str(first["outputs"][node]), str(second["outputs"][node])])
            ],
        ]


def test_a_run_that_was_stopped_says_how_far_it_came(tmp_path, capsys):
    CALLS.clear()
    with pytest.raises(SystemExit) as stop:
        dispatch(["train", *configured(tmp_path, "stops")])
    assert stop.value.code == 0
    lines, results, _ = looked_at(tmp_path, capsys)
    assert results["final"]["step"] == 4
    assert lines[0].startswith("win rate ")
    assert lines[0].endswith(", at step 4")
    assert lines[-2:] == ["the last evaluation was at step 4 of 8", str(tmp_path / "run" / "report.html")]


def test_without_an_evaluation_nothing_is_invented(tmp_path, capsys):
    lines, results, page = ended(tmp_path, capsys, configured(tmp_path, scorer=None))
    assert lines == [str(tmp_path / "run" / "report.html")]
    assert (results["summary"], results["final"], results["best_step"]) == ([], {}, None)
    assert (page.headline, page.runs) == ([], [])
    assert "held-out" not in (tmp_path / "run" / "report.html").read_text().split("<h2>Configuration")[0]


def test_an_evaluation_that_is_left_out_later_is_still_told(whole, tmp_path, capsys):
    """The same folder, whose training is over."""
    folder, lines, _, page = whole
    again, _, same = ended(tmp_path, capsys, without_evaluation(folder, tmp_path))
    assert again == [*lines[:2], str(tmp_path / "run" / "report.html")]
    assert [rows[2] for rows in same.runs[:3]] == [["question 0"], ["question 3"], ["question 7"]]
    assert len(page.runs) == 3
    assert len(same.runs) == 8


def test_a_few_prompts_are_said_to_be_too_few_before_and_after(tmp_path, capsys):
    """One prompt as well, whose figures have no interval."""
    dispatch(["train", *configured(tmp_path, prompts=1)])
    captured = capsys.readouterr()
    assert "held.txt: too few prompts (n = 1)" in captured.err
    first, second, few, _ = captured.out.splitlines()
    assert "[" not in first + second
    assert few == "too few prompts (n = 1): figures of one prompt have no interval"
    assert '<tr><th scope="row">step 8' in (tmp_path / "run" / "report.html").read_text()


def test_a_report_that_cannot_be_written_does_not_undo_the_training(whole, tmp_path, capsys):
    """The result is told all the same."""
    folder, lines, results, _ = whole
    flags = without_evaluation(folder, tmp_path)
    (tmp_path / "run" / "evaluation" / f"runs-{results['final']['step']:08d}.jsonl").unlink()
    dispatch(["train", *flags])
    captured = capsys.readouterr()
    assert captured.out.splitlines() == lines[:2]
    warning = captured.err.splitlines()[-1]
    assert warning.startswith("warning: the report is not written: ")
    assert "runs-" in warning


def card(folder, output):
    dispatch(["export", "--directory", str(folder / "run"), "--output", str(output / "aligned")])
    return (output / "aligned" / "head" / "README.md").read_text().split("## Figures\n")[1]


def test_a_card_has_the_figures_that_the_terminal_has(whole, tmp_path):
    folder, _, results, _ = whole
    final, text = results["final"], card(folder, tmp_path)
    rate = f"{final['win_rate']:.4g} [{final['win_rate/low']:.3g}, {final['win_rate/high']:.3g}]"
    assert f"| eval/win_rate | {rate} | {final['step']} |" in text
    assert f"| eval/score_before | {final['score_before']:.4g} | {final['step']} |" in text
    assert f"| loss | {results['training']['loss']:.4g} | {results['training']['step']} |" in text
    assert not [name for name in ("runs", "prompts", "unscored", "step") if f"| eval/{name} " in text]
    assert text.splitlines()[-1].startswith("Evaluated on 24 prompts x 2 samples; brackets hold 95% intervals")


def test_a_card_speaks_of_intervals_where_there_are_any(tmp_path):
    dispatch(["train", *configured(tmp_path, prompts=1)])
    text = card(tmp_path, tmp_path)
    assert "| eval/win_rate | " in text
    assert "[" not in text
    assert text.splitlines()[-1] == (
        "Evaluated on 1 prompt x 2 samples; too few prompts (n = 1): figures of one prompt have no interval."
    )


def test_a_card_without_an_evaluation_has_the_figures_of_training(tmp_path):
    dispatch(["train", *configured(tmp_path, scorer=None)])
    text = card(tmp_path, tmp_path)
    assert "| loss | " in text
    assert "valuat" not in text
    assert "eval/" not in text
