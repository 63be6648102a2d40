"""The LanguageModel component against transformers' Llama, and what its records may hold."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sysdpo_jax import LanguageModel, RecordError
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.parity.convert import llama_params

KEY = jax.random.key(0)
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROMPTS = ["a red", "the small cube on the left", "ball"]
ANSWERS = ["ball", "a large green ball on the left", ""]
EOS = SPECIAL.index("<eos>")


def component(tokenizer=None, **settings):
    defaults = {"max_prompt_length": 8, "max_new_tokens": 8}
    return LanguageModel(Decoder(DecoderConfig(**SIZES)), tokenizer or word_tokenizer(), **(defaults | settings))


@pytest.fixture(scope="module")
def torch_model():
    torch.manual_seed(0)
    # Weights five times the default: with small ones every token is about as likely, and few mistakes would show.
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def params(torch_model):
    return llama_params(torch_model)


def torch_log_prob(model, prompt, completion):
    """log p(completion | prompt) of one unpadded row of ids, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(completion)[:, None]).sum())


def ids(text):
    return [(*SPECIAL, *WORDS).index(word) for word in text.split()]


def test_log_prob_equals_transformers(torch_model, params):
    """Each row alone and unpadded on their side. 1e-4: float32 sums over at most 8 tokens."""
    node = component()
    features = node.prepare(ANSWERS, {"x": PROMPTS})
    ours, metrics = node.log_prob_with_metrics(params, features, KEY)
    expected = [torch_log_prob(torch_model, ids(p), [*ids(a), EOS]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    np.testing.assert_array_equal(metrics["tokens"], [2, 8, 1])


def test_a_completion_that_fills_its_room_has_no_end(torch_model, params):
    """`sample` stops there as well, so its probability is that of its tokens alone."""
    node = component(max_new_tokens=7)
    ours = node.log_prob(params, node.prepare([ANSWERS[1]], {"x": ["a red"]}), KEY)
    np.testing.assert_allclose(ours, [torch_log_prob(torch_model, ids("a red"), ids(ANSWERS[1]))], atol=1e-4)


def test_log_prob_does_not_change_with_padding_place_or_neighbours(params):
    node, roomy = component(), component(max_prompt_length=16, max_new_tokens=12)
    together = node.log_prob(params, node.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    turned = node.log_prob(params, node.prepare(ANSWERS[::-1], {"x": PROMPTS[::-1]}), KEY)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5)
    padded = roomy.log_prob(params, roomy.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    np.testing.assert_allclose(padded, together, atol=1e-5)
    for row in range(3):
        alone = node.log_prob(params, node.prepare([ANSWERS[row]], {"x": [PROMPTS[row]]}), KEY)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_padding_may_be_the_end_of_sequence(params):
    """The end counts as a token of the completion, the padding after it does not."""
    same = word_tokenizer()
    same.pad_token = same.eos_token
    node, other = component(same), component()
    features = node.prepare(ANSWERS, {"x": PROMPTS})
    assert features["tokens"][0, -1] == EOS
    expected = other.log_prob(params, other.prepare(ANSWERS, {"x": PROMPTS}), KEY)
    np.testing.assert_allclose(node.log_prob(params, features, KEY), expected, atol=1e-5)


def test_prepare_adds_each_special_token_once():
    node = component(word_tokenizer(bos=True))
    features = node.prepare(["ball", "ball <eos>"], {"x": ["a red", "a red"]})
    expected = [[1, *ids("a red"), *ids("ball"), EOS] + [0] * 11] * 2
    np.testing.assert_array_equal(features["tokens"], expected)
    np.testing.assert_array_equal(features["prompt_lengths"], [3, 3])
    np.testing.assert_array_equal(features["lengths"], [5, 5])


def chat(subject, place):
    return [{"role": "user", "content": f"{subject} on {place}"}]


def test_prompts_of_several_parents_and_chat_templates():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"
    )
    features = component(tokenizer, prompt=chat).prepare(["cube"], {"x": ["a ball"], "y": ["left"]})
    np.testing.assert_array_equal(features["tokens"][0, :7], [*ids("a ball on left the cube"), EOS])
    with pytest.raises(RecordError, match="reads exactly one parent, got x, y: pass LanguageModel"):
        component().prepare(["cube"], {"x": ["a"], "y": ["a"]})


def test_samples_are_prepared_as_they_were_drawn(torch_model, params):
    """The share in 4000 draws of each text of two words is exp(log_prob) of it, within 5 standard errors.

    Shorter texts are left out: tokens like <unk> are dropped from a text, so it stands for more than one draw.
    """
    node = component(max_new_tokens=2)
    draws = node.sample(params, {"x": ["a red"] * 4000}, KEY)
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    p = np.exp(node.log_prob(params, node.prepare(texts, {"x": ["a red"] * 100}), KEY))
    share = np.array([draws.count(text) for text in texts]) / 4000
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-6).all()
    assert p.max() > 4 * np.median(p)


def test_equal_components_are_equal_and_hash_alike():
    assert component() == component()
    assert hash(component()) == hash(component())
    assert component() != dataclasses.replace(component(), max_new_tokens=3)


@pytest.mark.parametrize(
    ("value", "prompt", "message"),
    [
        ("a a a a a a a a a", "a", r"completion in row 1 has 10 tokens, outside 1\.\.8: raise max_new_tokens"),
        ("a", "a a a a a a a a a", r"prompt in row 1 has 9 tokens, outside 1\.\.8: raise max_prompt_length"),
        ("a", "", r"prompt in row 1 has 0 tokens"),
        (["a"], "a", "completion in row 1 must be a string, not list"),
        ("a", 3, "prompt in row 1 must be a string or messages, not int"),
    ],
)
def test_bad_records_are_refused(value, prompt, message):
    with pytest.raises(RecordError, match=message):
        component().prepare(["a", value], {"x": ["a", prompt]})


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token; set tokenizer\.eos_token"):
        component(tokenizer)
