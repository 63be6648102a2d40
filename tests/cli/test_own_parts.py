"""Components, prompts, readers and the like of a user's own: what they raise names them and their place."""

from asyncio import CancelledError
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

import sysdpo_jax as sj
from sysdpo_jax.cli.export import write_component
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.graph import GraphError
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.training.checkpoints import Checkpoints
from sysdpo_jax.training.evaluation import Evaluation, EvaluationError, Evaluator
from sysdpo_jax.training.state import TrainState
from tests.components.stubs import word_tokenizer
from tests.data.test_preference_files import SIZES

KEY = jax.random.key(0)
DECODER = Decoder(DecoderConfig(**SIZES, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=20))
# An evaluation without a best figure grades no checkpoint.
UNUSED = object.__new__(Checkpoints)
STATE = TrainState(jax.numpy.int32(2), {}, {}, None, {}, {})
RAISED = (ValueError, ConnectionError, SystemExit, StopIteration, KeyError, CancelledError)


@dataclass(frozen=True)
class Own(sj.Component):
    """A component of a user's own that fails in one of its parts."""

    fails: str
    raised: type

    def _may_fail(self, part):
        if part == self.fails:
            raise self.raised("0")

    def init(self, key):
        self._may_fail("init")
        return {}

    def prepare(self, values, parents):
        self._may_fail("prepare")
        return np.zeros((len(values), 1), np.float32)

    def log_prob(self, params, features, key):
        self._may_fail("log_prob")
        return features[:, 0]

    def sample(self, params, parents, key):
        self._may_fail("sample")
        return [0] * len(parents["x"])

    def candidates(self, params, parents, number, key):
        self._may_fail("candidates")
        return [[0] for _ in parents["x"]]

    def save(self, path: Path, params):
        self._may_fail("save")


def through(component):
    system = sj.CompoundSystem(("x",), (sj.Node("y", component, ("x",)), sj.Node("z", sj.Categorical(2, (1,)), ("y",))))
    params = {"y": {}, "z": {"logits": np.zeros((1, 2))}}
    return system, params


PARTS = {
    "init": (lambda own: through(own)[0].init(KEY), GraphError),
    "prepare": (lambda own: through(own)[0].prepare([{"x": 0, "y": 0, "z": 0}]), sj.RecordError),
    "log_prob": (
        lambda own: through(own)[0].log_prob(through(own)[1], {"y": np.zeros((1, 1)), "z": np.zeros((1, 2), int)}, KEY),
        GraphError,
    ),
    "sample": (lambda own: sj.rollout(*through(own), [{"x": 0}], KEY), sj.RecordError),
    "candidates": (lambda own: sj.draw_intermediates(*through(own), [{"x": 0}], 2, KEY), sj.RecordError),
}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("part", PARTS)
def test_a_component_of_ones_own_is_named_with_its_node(part, raised, caplog):
    call, failure = PARTS[part]
    with pytest.raises(failure, match=rf"node 'y': .*test_own_parts:Own\.{part} failed"):
        call(Own(part, raised))
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("raised", RAISED)
def test_what_saves_a_component_is_named(tmp_path, raised):
    with pytest.raises(CheckpointError, match=r"test_own_parts:Own\.save failed"):
        write_component(tmp_path / "out", Own("save", raised), {}, False, None)


@pytest.mark.parametrize("raised", RAISED)
def test_a_prompt_function_and_a_chat_template_are_named_with_their_row(raised):
    def prompt(text):
        raise raised("0")

    model = sj.LanguageModel(DECODER, word_tokenizer(chat=True), 16, 4, prompt=prompt)
    with pytest.raises(sj.RecordError, match=r"the prompt function .*:test_a_prompt.*prompt in row 0 failed"):
        model.prepare(["a"], {"x": ["a"]})
    tokenizer = word_tokenizer(chat=True)
    tokenizer.apply_chat_template = lambda *args, **settings: prompt("")
    model = sj.LanguageModel(DECODER, tokenizer, 16, 4)
    with pytest.raises(sj.RecordError, match="the chat template for the messages in row 1 failed"):
        model.prepare(["a", "a"], {"x": ["a", [{"role": "user", "content": "a"}]]})


def test_a_prompt_function_is_called_once_for_copies_of_a_row():
    """As those are that fill a batch up."""
    asked = []
    model = sj.LanguageModel(DECODER, word_tokenizer(), 16, 4, prompt=lambda text: asked.append(text) or text)
    text, other = "a red ball", "the cube"
    model.prepare(["a"] * 4, {"x": [text, other, other, other]})
    assert asked == [text, other]


@pytest.mark.parametrize("raised", [*RAISED, None])
def test_a_reader_is_named_with_its_row(tmp_path, raised):
    def reader(row, system):
        if row["x"] == 1:
            if raised is None:
                return None
            raise raised("0")
        return [sj.PreferenceRecord({"x": 0}, {"y": 0}, {"y": 1})]

    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 0}\n{"x": 1}\n{"x": 2}\n')
    said = "returned value=None: return a list of PreferenceRecord" if raised is None else "failed"
    with pytest.raises(sj.RecordError, match=rf"rows\.jsonl, row 2: the reader .*reader {said}"):
        sj.load_preferences(path, reader=reader)
    assert len(sj.load_preferences(path, reader=reader, on_error="skip")) == 2


@pytest.mark.parametrize("raised", RAISED)
def test_a_source_of_records_is_named_with_its_number(raised):
    class Source:
        def __len__(self):
            return 2

        def __getitem__(self, row):
            raise raised("0")

    system = sj.CompoundSystem(("x",), (sj.Node("y", sj.Categorical(2, (2,)), ("x",)),))
    with pytest.raises(sj.RecordError, match=r"Source.__getitem__, for record 0, counted from 0, failed"):
        sj.preference_dataset(system, Source(), 2, seed=0)[0]


@pytest.mark.parametrize("raised", RAISED)
def test_what_an_evaluation_measures_is_named_with_its_step(raised):
    def measure(step, params):
        raise raised("0")

    evaluator = Evaluator(Evaluation(measure, 1), None, None, 4)
    with pytest.raises(EvaluationError, match=r"the evaluation at step 2, .*measure, failed .* the state is saved"):
        evaluator.ends(2, STATE, UNUSED, lambda: None)


def test_a_tool_error_inside_an_evaluation_keeps_its_words():
    def measure(step, params):
        raise ToolError("node 'kind': the tool failed")

    with pytest.raises(ToolError, match=r"^node 'kind': the tool failed$"):
        Evaluator(Evaluation(measure, 1), None, None, 4).ends(2, STATE, UNUSED, lambda: None)
