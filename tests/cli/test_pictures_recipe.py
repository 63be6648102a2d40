"""The recipe of docs/programs/pictures.md: its wishes, what its pictures show, and what the system asks."""

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import transformers

import sysdpo_jax as sj
from sysdpo_jax.recipes.pictures import (
    BACKGROUND,
    COLOURS,
    RADII,
    drawings,
    drawn,
    kinds,
    request,
    right,
    score,
    shown,
    wanted,
)
from sysdpo_jax.runs.files import RECIPES, read_config, recipes
from sysdpo_jax.runs.system import build_system
from tests.pretrained.checkpoints import stable_diffusion_1, write_decoder

WRITER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAINTER = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
PAGE = (Path(__file__).parents[2] / "docs/programs/pictures.md").read_text()
WISH = "Could you make a box for a garden party? It should be yellow and huge."


@pytest.mark.parametrize("scale", [1, 4])
def test_a_drawing_is_seen_as_what_it_is_at_any_size_and_a_little_off(scale):
    for kind, drawing in zip(kinds(), drawings(), strict=True):
        large = drawing.repeat(scale, axis=0).repeat(scale, axis=1)
        assert shown(large) == kind
        size, colour, shape = kind
        assert shown(drawn(RADII[size] + 0.25, tuple(0.95 * part for part in COLOURS[colour]), shape)) == kind


def test_what_is_no_drawing_is_seen_as_none():
    noise = np.random.default_rng(0).random((16, 16, 3))
    for picture in (np.full((16, 16, 3), BACKGROUND), np.zeros((16, 16, 3)), noise):
        assert shown(picture) is None
        assert score({"wish": WISH, "picture": picture}) == right({"wish": WISH, "picture": picture}) == 0


def test_the_score_is_the_share_of_what_is_right():
    shares = {
        ("large", "yellow", "square"): 1,
        ("small", "yellow", "square"): 2 / 3,
        ("small", "red", "square"): 1 / 3,
        ("small", "red", "cross"): 0,
    }
    for kind, share in shares.items():
        run = {"wish": WISH, "picture": drawings()[kinds().index(kind)]}
        assert score(run) == pytest.approx(share)
        assert right(run) == (share == 1)


@pytest.mark.parametrize("wish", ["a red circle", "a small red and blue circle", "a big huge green box", ""])
def test_a_wish_says_each_respect_once(wish):
    with pytest.raises(ValueError, match=f"the wish {wish!r} does not say one size, one colour and one shape"):
        wanted(wish)


def test_held_out_wishes_are_of_other_kinds_and_occasions():
    texts = {name: (RECIPES / f"pictures_{name}.txt").read_text().splitlines() for name in ("wishes", "held_out")}
    assert {name: len(set(lines)) for name, lines in texts.items()} == {"wishes": 96, "held_out": 48}
    found = {name: [wanted(line) for line in lines] for name, lines in texts.items()}
    assert {name: len(set(each)) for name, each in found.items()} == {"wishes": 24, "held_out": 8}
    assert set(found["wishes"]) | set(found["held_out"]) == set(kinds())
    occasions = [{re.match(".*[Ff]or (.+?)([.,?]| I would)", line)[1] for line in lines} for lines in texts.values()]
    assert [len(each) for each in occasions] == [12, 8]
    assert not occasions[0] & occasions[1]
    # Each word of what is asked for is in training wishes, in other company.
    for place in range(3):
        assert {kind[place] for kind in found["held_out"]} <= {kind[place] for kind in found["wishes"]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe with a small writer that says anything, and a small painter."""
    write_decoder(tmp_path / "small", "llama", num_hidden_layers=1, max_position_embeddings=256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "small")
    stable_diffusion_1().save_pretrained(tmp_path / "painter")
    text = recipes()["pictures"].read_text()
    for name, folder in ((WRITER, "small"), (PAINTER, "painter")):
        text = text.replace(name, str(tmp_path / folder))
    (tmp_path / "pictures.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return "pictures.yaml"


def test_the_system_asks_what_the_program_asks(recipe, monkeypatch):
    """The page's program, with a painter that says how it was called."""
    asked, called = [], {}

    def painter(prompt, **settings):
        called.update(settings, prompt=prompt)
        return SimpleNamespace(images=["picture"])

    diffusers = ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = SimpleNamespace(from_pretrained=lambda folder: painter)
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    code, names = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {}
    exec(compile(code, "docs/programs/pictures.md", "exec"), names)
    assert names["draw"](WISH, lambda messages: asked.append(messages) or "a ball") == "picture"
    system, _ = build_system(read_config(recipe), sj.make_mesh())
    assert [system.node("prompt").component.prompt(request(WISH))] == asked
    own = system.node("picture").component
    expected = {"prompt": "a ball", "num_inference_steps": own.num_steps, "guidance_scale": own.guidance_scale}
    assert called == expected
    nodes = textwrap.indent(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1], 4 * " ")
    assert nodes in recipes()["pictures"].read_text()
