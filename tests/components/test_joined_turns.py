"""Turns of a conversation in one row: the very sum of their log-probabilities, for one pass over the transcript."""

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sysdpo_jax import ChatPrompt, LanguageModel
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.test_sampled_turns import QWEN3, SMOLLM2, STYLES, sampled, tokenizer_in
from tests.components.tokenizer_kinds import SIZE, TURN, tokenizer_of
from tests.parity.convert import llama_params

KEY = jax.random.key(0)
PROMPT, NEW, TURNS = 150, 10, 4
SIZES = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": PROMPT + NEW,
}
compiled = jax.jit(LanguageModel.log_prob_with_metrics, static_argnums=0)


def model(template=SMOLLM2, **settings):
    tokenizer = tokenizer_of("byte-level")
    tokenizer.chat_template = template
    prompt = ChatPrompt("{task}", ("task", "agent"), "agent", "action", ("seen",))
    given = {"decoder": Decoder(DecoderConfig(**SIZES)), "prompt": prompt} | settings
    return LanguageModel(tokenizer=tokenizer, max_prompt_length=PROMPT, max_new_tokens=NEW, **given)


@pytest.fixture(scope="module")
def torch_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1)).eval()


@pytest.fixture(scope="module")
def params(torch_model):
    return llama_params(torch_model)


def runs(tokenizer):
    """Turns of three conversations: answers of one token a letter, the third's second one cut."""
    words = [("ab", "abd", "re", "a"), ("sky", "ab", "red", "abab"), ("ab", "abababab", "a", "ab")]
    made = [[sampled(tokenizer, word, TURN) for word in run] for run in words]
    made[2][1] = sampled(tokenizer, "ababababab")
    assert made[2][1].end == "cut"
    return [[{"action": said, "seen": f"sky {place}"} for place, said in enumerate(run)] for run in made]


def prepared(node, conversations, tasks=("red?", "a", "b")):
    """[records, turns, ...], each turn with the turns before it as its parents' value."""
    rows = [(task, run[:turn], run[turn]["action"]) for task, run in zip(tasks, conversations, strict=True)
            for turn in range(len(run))]  # fmt: skip
    tasks, earlier, values = map(list, zip(*rows, strict=True))
    features = node.prepare(values, {"task": tasks, "agent": earlier})
    shape = len(conversations), len(conversations[0])
    return jax.tree.map(lambda x: np.reshape(x, (*shape, *x.shape[1:])), features), np.ones(shape, bool)


def flat(features):
    return jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])), features)


def log_prob(node, params, features):
    return compiled(node, params, features, KEY)


def summed(node, params, features, ran):
    """The log-probabilities of the turns that ran, and the figures of all."""
    values, metrics = log_prob(node, params, flat(features))
    shaped = {name: np.reshape(value, ran.shape) for name, value in metrics.items()}
    return np.where(ran, np.reshape(values, ran.shape), 0).sum(1), shaped


def labelled(torch_model, tokens, said):
    """transformers' own loss of a row whose labels are -100 wherever the model did not speak, as a log-probability."""
    labels = torch.tensor(np.where(said, tokens, -100))[None]
    with torch.no_grad():
        logits = torch_model.double()(torch.tensor(tokens)[None].long()).logits
        return -float(torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:].long(), ignore_index=-100, reduction="sum"
        ))  # fmt: skip


def test_one_row_has_the_sum_of_its_turns(params, torch_model):
    """1e-5 relative against the turns alone, 1e-4 in nats against float64: float32 sums over some 15 tokens."""
    node = model()
    features, ran = prepared(node, runs(node.tokenizer))
    joined, left = node.join_turns(features, ran)
    assert left.tolist() == [[False] * 3 + [True]] * 3
    alone, counted = summed(node, params, features, ran)
    together, metrics = summed(node, params, joined, left)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_array_equal(metrics["tokens"][:, -1], counted["tokens"].sum(1))
    np.testing.assert_array_equal(metrics["turns"], [[0, 0, 0, 4]] * 3)
    assert not metrics["retokenized"].any()
    for row in range(3):
        tokens, start = joined["tokens"][row, -1], joined["prompt_lengths"][row, -1]
        length, completion = joined["lengths"][row, -1], joined["completion"][row, -1]
        assert (start, length) == (features["prompt_lengths"][row, 0], features["lengths"][row, -1])
        said = np.zeros(length, bool)
        said[start:] = completion[: length - start]
        assert not completion[length - start :].any()
        # What it said is what the model made in its turns, one behind the other, and no word of an observation.
        own = [token for turn in runs(node.tokenizer)[row] for token in turn["action"].tokens]
        assert tokens[:length][said].tolist() == own
        assert together[row] == pytest.approx(labelled(torch_model, tokens[:length], said), abs=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_conversations_of_every_style_are_one_row(style):
    tokenizer, end, role = tokenizer_in(style)
    prompt = ChatPrompt("{task}", ("task", "agent"), "agent", "action", ("seen",), role)
    node = LanguageModel(Decoder(DecoderConfig(**SIZES)), tokenizer, PROMPT, NEW, prompt, stop_tokens=(TURN,))
    run = [{"action": sampled(tokenizer, word, end), "seen": "sky"} for word in ("ab", "abd", "ab")]
    features, ran = prepared(node, [run], ["a"])
    joined, left = node.join_turns(features, ran)
    assert left.tolist() == [[False, False, True]]
    assert joined["completion"][left].sum() == features["completion"].sum()


def test_turns_that_the_template_rewrites_stay_rows_of_their_own(params):
    """Thoughts go when the user speaks again, so that the second prompt begins otherwise than the first row."""
    prompt = ChatPrompt("{task}", ("task", "agent"), "agent", "action", ("seen",), "user")
    node = model(QWEN3.replace("</think>", "</t>"), prompt=prompt)
    said = [sampled(node.tokenizer, letters, TURN) for letters in ("ab</t>a", "ab", "abd")]
    features, ran = prepared(node, [[{"action": x, "seen": "sky"} for x in said]], ["a"])
    assert features["retokenized"].tolist() == [[0, 1, 1]]
    joined, left = node.join_turns(features, ran)
    assert left.tolist() == [[True, False, True]]
    assert joined["turns"].tolist() == [[1, 0, 2]]
    assert joined["retokenized"].tolist() == [[0, 1, 1]]
    np.testing.assert_allclose(summed(node, params, joined, left)[0], summed(node, params, features, ran)[0], rtol=1e-5)


def test_turns_that_did_not_run_are_joined_to_nothing(params):
    node = model()
    features, ran = prepared(node, runs(node.tokenizer))
    ran[0, 2:] = ran[1, 1:] = ran[2] = False
    # What they hold is arbitrary: here what would fit.
    joined, left = node.join_turns(features, ran)
    assert left.tolist() == [[False, True, False, False], [True, False, False, False], [False] * 4]
    np.testing.assert_allclose(summed(node, params, joined, left)[0], summed(node, params, features, ran)[0], rtol=1e-5)
    assert joined["turns"].tolist() == [[0, 2, 0, 0], [1, 0, 0, 0], [0] * 4]


def test_sizes_keep_what_was_said(params):
    """As narrow as can be, wider, and back; 1e-5 relative as above. A row is never longer than the model."""
    node = model()
    joined, left = node.join_turns(*prepared(node, runs(node.tokenizer)))
    rows = jax.tree.map(lambda x: x[left], joined)
    own = node.sizes(rows)
    np.testing.assert_array_equal(own["prompt"] + own["completion"], rows["lengths"])
    whole = log_prob(node, params, rows)[0]
    least = {name: int(size.max()) for name, size in own.items()}
    for sizes in (least, {name: size + 7 for name, size in least.items()}, {"prompt": 10**6, "completion": 10**6}):
        made = node.resize(rows, sizes)
        np.testing.assert_array_equal(made["completion"].sum(1), rows["completion"].sum(1))
        np.testing.assert_allclose(log_prob(node, params, made)[0], whole, rtol=1e-5)
        back = node.resize(node.resize(made, least), {"prompt": 10**6, "completion": 10**6})
        np.testing.assert_array_equal(back["completion"], rows["completion"])
    narrow = node.resize(rows, least)
    assert narrow["tokens"].shape == (3, sum(least.values()))
    assert node.units(rows) == {"tokens": int(rows["lengths"].sum())}
    assert node.padding(narrow) == pytest.approx(1 - rows["lengths"].sum() / narrow["tokens"].size)
    with pytest.raises(ValueError, match="a completion has"):
        node.resize(rows, least | {"completion": least["completion"] - 1})


def test_both_sides_share_their_first_prompt(params):
    """Rows of a pair with the same task, one token of prompt for both: 1e-5 relative as above."""
    node = model()
    conversations = runs(node.tokenizer)
    sides = []
    for own in conversations[:2], conversations[1:]:
        joined, left = node.join_turns(*prepared(node, own, ["the red ball on a sky?"] * 2))
        sides.append(node.resize(jax.tree.map(lambda x, left=left: x[left], joined), {"prompt": 40, "completion": 120}))
    whole = np.stack([log_prob(node, params, side)[0] for side in sides], 1)
    marked = node.mark_shared(sides)
    assert (marked[0]["shared"].sum(-1) == sides[0]["prompt_lengths"]).all()
    assert not node.sizes(marked[0])["prompt"].any()
    pair = jax.tree.map(lambda *x: np.stack(x, 1), *marked)
    np.testing.assert_allclose(log_prob(node, params, node.fold_runs(pair, 2))[0], whole.ravel(), rtol=1e-5)
    resized = node.resize(marked[0], {"prompt": 0, "shared": 48, "completion": 100})
    assert resized["shared"].shape == (2, 48)
    np.testing.assert_allclose(log_prob(node, params, resized)[0], whole[:, 0], rtol=1e-5)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_conversation_costs_one_pass_over_its_transcript():
    """The compiler's count of operations, each row at its own size, with the same count of the decoder's logits.

    Below 1.1 of these: picking log-probabilities costs a little. The prefixes of four turns grow evenly, so that layers
    cost 2.5 times as much as for the last; the head, large in so small a model, goes over each answer once. The model
    has one layer, because the compiler counts the body of a loop once.
    """
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1}
    node = model(decoder=Decoder(DecoderConfig(**(SIZES | wide))))
    features, ran = prepared(node, runs(node.tokenizer)[:1], ["red?"])
    joined, left = node.join_turns(features, ran)
    weights = jax.eval_shape(node.init, KEY)

    def cost(rows):
        own = node.resize(rows, {name: int(size.max()) for name, size in node.sizes(rows).items()})
        return flops(node.log_prob, weights, own, KEY), own["tokens"]

    one, tokens = cost(jax.tree.map(lambda x: x[left], joined))
    assert tokens.shape == (1, joined["lengths"][0, -1])
    turns = sum(cost(jax.tree.map(lambda x, turn=turn: x[0, turn : turn + 1], features))[0] for turn in range(TURNS))
    plain = flops(lambda params, tokens: node.decoder.apply({"params": params}, tokens), weights, tokens)
    assert one < 1.1 * plain
    assert turns > 1.8 * one


def test_a_sampled_conversation_is_one_row(params):
    """Sampled turn by turn with the node's own prompts: the joined row is what the sampler has seen; 1e-3 as sums."""
    node = model(stop_tokens=(TURN,))
    turns = [[], []]
    for turn in range(3):
        said = node.sample(params, {"task": ["red?", "a"], "agent": [list(run) for run in turns]}, jax.random.key(turn))
        for run, value in zip(turns, said, strict=True):
            run.append({"action": value, "seen": "sky"})
    features, ran = prepared(node, turns, ["red?", "a"])
    joined, left = node.join_turns(features, ran)
    assert left.tolist() == [[False, False, True]] * 2
    assert not joined["retokenized"].any()
    np.testing.assert_allclose(summed(node, params, joined, left)[0], summed(node, params, features, ran)[0], rtol=1e-5)
