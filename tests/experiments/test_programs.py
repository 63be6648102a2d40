"""The painter of docs/programs/pictures.md, and how a run becomes the page's figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.programs import painter, pictures, results
from sysdpo_jax.recipes.pictures import COLOURS, RADII, SHAPES, drawings, kinds, request, shown

RED, BLUE = (kinds().index(("small", colour, "circle")) for colour in ("red", "blue"))


def test_the_painters_tokenizer_has_whole_words_of_what_it_draws_and_a_spelling_of_all_others():
    words = painter.tokenizer()
    for word in (*RADII, *COLOURS, *SHAPES):
        assert words.convert_ids_to_tokens(words(f"a {word}").input_ids) == [
            painter.START,
            "a</w>",
            f"{word}</w>",
            painter.END,
        ]
    ends = (words.bos_token_id, words.eos_token_id)
    for text in ("zebra", "Ünïcode ✨"):
        inner = words(text).input_ids[1:-1]
        assert len(inner) > 1
        assert not set(inner) & set(ends)


def test_training_pictures_show_what_their_captions_say():
    rng = np.random.default_rng(0)
    made = painter.pictures(kinds(), rng).permute(0, 2, 3, 1).numpy()
    assert [shown((picture + 1) / 2) for picture in made] == list(kinds())
    for kind, caption in zip(kinds() * 4, painter.captions(kinds() * 4, rng), strict=True):
        assert set(caption.replace(",", "").split()) <= {*kind, "a", "picture", "of"}


def test_a_run_of_the_program_by_pytorch_is_asked_and_scored():
    class Drawn:
        images = [drawings()[RED]]

    asked = []
    wishes = [f"I need a tiny {colour} ball for a toy shop." for colour in ("red", "blue", "green")]
    runs = [
        pictures.draw(wish, lambda messages: asked.append(messages) or "a ball", lambda prompt, **settings: Drawn)
        for wish in wishes
    ]
    assert asked == [request(wish) for wish in wishes]
    found = pictures.figures(runs)
    assert found["score"].value == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["right"].value == pytest.approx(1 / 3)
    # Three wishes with one run each: the usual standard error of 1, 0, 0.
    assert found["right"].standard_error == pytest.approx(np.std([1, 0, 0], ddof=1) / np.sqrt(3))


def test_figures_and_pictures_out_of_a_run(tmp_path, monkeypatch):
    """Of two wishes one is met before and both after."""
    wishes = [f"I need a tiny {colour} ball for a toy shop." for colour in ("red", "blue")]
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    for step, drawn in ((0, (RED, RED)), (8, (RED, BLUE))):
        lines = []
        for number, (wish, place) in enumerate(zip(wishes, drawn, strict=True)):
            Image.fromarray(np.round(drawings()[place] * 255).astype(np.uint8)).save(folder / f"{step}-{number}.png")
            met = float(kinds()[place] == kinds()[(RED, BLUE)[number]])
            outputs = {"prompt": {"text": f"step {step}"}, "picture": f"{step}-{number}.png"}
            row = {"inputs": {"wish": wish}, "outputs": outputs, "score": met, "figures": {"right": met}}
            lines.append(json.dumps(row) + "\n")
        (folder / f"runs-{step:08}.jsonl").write_text("".join(lines))
    (tmp_path / "run/results.json").write_text("{}")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "loss": 0.6931}\n')
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path / "run"), "--output", str(tmp_path / "made.json")])
    results.main()
    made = json.loads((tmp_path / "made.json").read_text())
    differences = {name: figure["difference"]["value"] for name, figure in made["held_out"].items()}
    zero = dict.fromkeys(("size", "shape", "no drawing", "words of a prompt"), 0)
    assert differences == {"score": 0.5, "right": 0.5, "colour": 0.5, **zero}
    assert made["prompts"][0] == {"wish": wishes[0], "before": "step 0", "after": "step 8"}
    assert made["training"] == {"loss": [0.6931]}
    with Image.open(tmp_path / "made.png") as sheet:
        assert sheet.size == (2 * 72 + 8, 2 * 72 + 8)


def test_the_page_has_the_figures_of_the_file():
    folder = Path(__file__).parents[2] / "docs/programs"
    held_out, page = (
        json.loads((folder / "pictures.json").read_text())["held_out"],
        (folder / "pictures.md").read_text(),
    )
    names = {"score": "score: respects that are right", "right": "right in all three"}
    for name in ("score", "right", "size", "colour", "shape", "words of a prompt"):
        scale = 1 if name == "words of a prompt" else 100
        before, after, difference = (
            f"{scale * each['value']:{sign}.1f} ± {scale * each['standard_error']:.1f}"
            for each, sign in zip(held_out[name].values(), ("", "", "+"), strict=True)
        )
        low, high = (scale * bound for bound in held_out[name]["difference"]["interval"])
        row = f"| {names.get(name, name)} | {before} | {after} | {difference}, 95% interval {low:+.1f} to {high:+.1f} |"
        assert row in page
