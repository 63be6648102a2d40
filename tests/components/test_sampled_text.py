"""What a model sampled is what its log-probability is of, for every kind of tokenizer and every way to end."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import ByT5Tokenizer

from sysdpo_jax import LanguageModel, RecordError
from sysdpo_jax.components import language_model
from sysdpo_jax.components.sampled_text import facts_of, own_tokens, sampled_texts
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.values import SampledText, from_json, to_json
from tests.components.tokenizer_kinds import BOS, EOS, KINDS, QWEN, SIZE, TURN, tokenizer_of

KEY = jax.random.key(0)
ROWS, NEW = 6, 5
WIDTH = 8
CONFIG = DecoderConfig(SIZE, WIDTH, 8, 1, 1, 1, max_position_embeddings=96)
log_prob = jax.jit(LanguageModel.log_prob, static_argnums=0)
# What is added to the logits of the two ends, so that the model ends in this way.
ENDINGS = {"end": (3, -60), "stop": (-60, 3), "cut": (-60, -60), "at once": (60, 0)}


def model(name: str, **settings) -> LanguageModel:
    # The same ends everywhere: nothing compiles anew.
    given = {"stop_tokens": (TURN,)} | settings
    return LanguageModel(Decoder(CONFIG), tokenizer_of(name), 90, NEW, **given)


@functools.cache
def random_params():
    """Of a model that is sharp enough that no token is like another, and the first channel of its states.

    That channel is the same after every token, so that its row of the head is a bias.
    """
    made = jax.jit(Decoder(CONFIG).init)(KEY, jnp.zeros((1, 2), jnp.int32))["params"]
    random = np.random.default_rng(0)
    made = jax.tree.map(lambda x: np.array(x) + random.normal(0, 0.3, x.shape).astype("float32"), made)
    made["embed_tokens"]["embedding"][:, 0] = 4
    state = Decoder(CONFIG).apply({"params": made}, jnp.zeros((1, 1), jnp.int32), method="hidden_states")
    return made, float(np.asarray(state).ravel()[0])


@functools.cache
def params(name: str, ending: str):
    """Random ones, with a bias on the ends."""
    made, channel = jax.tree.map(np.copy, random_params()[0]), random_params()[1]
    bias = np.zeros(SIZE, np.float32)
    bias[[EOS, TURN]] = ENDINGS[ending]
    # Ids without a token, and bytes that are mostly no text.
    pieces = tokenizer_of(name).get_vocab()
    bias[len(pieces) :] = -60
    bias[[place for piece, place in pieces.items() if piece.startswith("<0x")]] -= 3
    made["lm_head"]["kernel"][0] = bias / channel
    return made


def prompts(name: str):
    asked = [f"a {word}" for word in ("red ball", "sky", "b?", "ab", "Sure:", "red")]
    return asked if KINDS[name].template is None else [[{"role": "user", "content": text}] for text in asked]


@functools.partial(jax.jit, static_argnums=0)
def scores(decoder: Decoder, weights, tokens):
    return jax.nn.log_softmax(decoder.apply({"params": weights}, tokens).astype(jnp.float32))


def seen(weights, starts, tokens) -> list[float]:
    """The sum of the log-probabilities of each row of ids, by one plain pass over the ids that the model had."""
    rows = np.zeros((len(tokens), 96), np.int32)
    for row, (start, made) in enumerate(zip(starts, tokens, strict=True)):
        rows[row, : len(start) + len(made)] = [*start, *made]
    found = np.asarray(scores(Decoder(CONFIG), weights, rows), np.float64)
    return [
        sum(found[row, len(start) + place - 1, token] for place, token in enumerate(made))
        for row, (start, made) in enumerate(zip(starts, tokens, strict=True))
    ]


def again(value):
    """As a file has it."""
    return from_json(json.loads(json.dumps(to_json(value))))


@pytest.fixture
def made(monkeypatch):
    """(prompts, their lengths, what was made) of every call of the samplers."""
    calls = []
    for name in ("generate", "beam_generate"):
        call = getattr(language_model, name)

        def recorded(decoder, weights, start, lengths, *rest, call=call, **settings):
            found = call(decoder, weights, start, lengths, *rest, **settings)
            calls.append((start, lengths, found))
            return found

        monkeypatch.setattr(language_model, name, recorded)
    return calls


@pytest.mark.parametrize("name", KINDS)
def test_the_log_probability_of_a_sample_is_what_its_sampler_saw(name, made):
    """Of records that were written and read again: 1e-3, of float32 sums over 5 tokens; from the very tokens made."""
    ends, tool_calls = set(), 0
    for ending, (temperature, top_p) in ((e, s) for e in ENDINGS for s in ((1.0, 1.0), (0.0, 1.0), (1.3, 0.7))):
        node, weights = model(name, temperature=temperature, top_p=top_p), params(name, ending)
        parents = {"x": prompts(name)}
        values = again(node.sample(weights, parents, jax.random.key(len(made))))
        start, lengths, found = made[-1]
        starts = [row[:length] for row, length in zip(start, lengths, strict=True)]
        tokens = [
            row[:length].tolist()
            for row, length in zip(np.asarray(found.tokens), np.asarray(found.lengths), strict=True)
        ]
        features = node.prepare(values, parents)
        np.testing.assert_allclose(log_prob(node, weights, features, KEY), seen(weights, starts, tokens), atol=1e-3)
        assert [list(value.tokens) for value in values] == tokens
        assert not features["retokenized"].any()
        assert not features["truncated"].any()
        for value in values:
            ends.add((value.end, len(value.tokens) == 1))
            tool_calls += "<tool_call>" in value
            assert value.end == {EOS: "end", TURN: "stop"}.get(value.tokens[-1], "cut")
            assert not any(token in value for token in ("</s>", "<end>", "<s>", "<pad>"))
            if ending != "cut":
                assert value.end != "cut" or len(value.tokens) == NEW
        assert (ending == "at once") <= all(value == "" for value in values)
    assert ends >= {("end", False), ("stop", False), ("cut", False), ("end", True)}


@pytest.mark.parametrize("name", KINDS)
def test_the_log_probability_of_a_beam_is_what_the_search_saw(name, made):
    """1e-3 as above, against the search's own sums, which another test holds to transformers'."""
    for ending in ENDINGS:
        node, weights, parents = model(name), params(name, ending), {"x": prompts(name)}
        found = again(node.candidates(weights, parents, 3, KEY))
        _, _, beams = made[-1]
        rows = [(row, value) for row, values in enumerate(found) for value in values]
        assert len(rows) >= 2 * ROWS or ending == "at once"
        features = node.prepare([value for _, value in rows], {"x": [parents["x"][row] for row, _ in rows]})
        tokens, lengths = np.asarray(beams.tokens), np.asarray(beams.lengths)
        wanted = []
        for row, value in rows:
            of_row = [tokens[row, beam, : lengths[row, beam]].tolist() for beam in range(tokens.shape[1])]
            wanted.append(np.asarray(beams.log_probs)[row, of_row.index(list(value.tokens))])
        np.testing.assert_allclose(log_prob(node, weights, features, KEY), wanted, atol=1e-3)


CHATS = [name for name, kind in KINDS.items() if kind.template is not None]


def completion(node, value, prompt):
    features = node.prepare([value], {"x": [prompt]})
    row = features["tokens"][0]
    start, end = features["prompt_lengths"][0], features["lengths"][0]
    return row[:start].tolist(), row[start:end].tolist(), features


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("text", ["Sure", "a ball.", "red<tool_call>a</tool_call>", "1\n\n2", "❄"])
def test_a_string_and_a_message_are_what_the_template_writes_in_one_text(name, text):
    """As TRL tokenizes them, up to the token that closes the turn, which the template writes."""
    node = model(name, stop_tokens=())
    node = LanguageModel(node.decoder, node.tokenizer, 70, 25)
    tokenizer, asked = node.tokenizer, {"role": "user", "content": "a sky?"}
    said = [{"role": "assistant", "content": text}]
    prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([asked, *said], tokenize=False)
    assert whole.startswith(prompt)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = EOS if "<end>" not in KINDS[name].template else TURN
    wanted = ids[: len(ids) - ids[::-1].index(end)]
    for value in (text, said):
        start, made, features = completion(node, value, [asked])
        assert start == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert start + made == wanted
        assert features["retokenized"] == 0
    # The end is a token of sampling too, without anybody's saying so.
    assert node.ends == tuple(dict.fromkeys((EOS, end)))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "words"])
@pytest.mark.parametrize(("prompt", "text"), [("a sky:", "Sure"), ("a sky:", " Sure red"), ("a\n", "red ball")])
def test_a_string_after_a_string_is_what_follows_in_one_text(name, prompt, text):
    """As TRL tokenizes prompt + completion + end of sequence."""
    node = model(name, stop_tokens=())
    node = LanguageModel(node.decoder, node.tokenizer, 70, 20)
    start, made, features = completion(node, text, prompt)
    assert start + made == [*node.tokenizer(prompt + text, add_special_tokens=False)["input_ids"], EOS]
    assert features["retokenized"] == 0


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("words", "unigram")])
def test_what_merges_with_its_prompt_is_tokenized_apart_and_counted(name):
    """The prompt ends with "a", which is one token with the "b" that follows: the model was asked with an "a"."""
    node = model(name, stop_tokens=())
    start, made, features = completion(node, "b", "red.a")
    assert start == node.tokenizer("red.a", add_special_tokens=False)["input_ids"]
    assert made == [node.tokenizer.convert_tokens_to_ids("b"), EOS]
    assert features["retokenized"] == 1


def with_template(template, **settings):
    tokenizer = tokenizer_of("byte-level, Qwen")
    tokenizer.chat_template = template
    return LanguageModel(Decoder(CONFIG), tokenizer, 70, 25, **settings)


def thoughts(template):
    """The prompt, the turn, and both as texts, of a string and of a message, after a prompt without thinking."""
    node = with_template(template)
    asked = {"messages": [{"role": "user", "content": "a?"}], "chat_template_kwargs": {"enable_thinking": False}}
    made = [completion(node, value, asked)[:2] for value in ("Sure", [{"role": "assistant", "content": "Sure"}])]
    assert made[0] == made[1]
    return [node.tokenizer.decode(ids) for ids in made[0]]


def test_a_prompt_without_thinking_keeps_its_empty_thoughts():
    """The template writes them into the prompt alone, for a model that goes on with its answer."""
    prompt, made = thoughts(QWEN)
    assert prompt.endswith("<turn>assistant\n<think>\n\n</think>\n\n")
    assert made == "Sure<end>"


def test_a_template_that_writes_the_thoughts_into_the_turn_too():
    """As Qwen 3's: they are the prompt's there, and the turn's where the prompt has none."""
    turn = "<turn>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    template = QWEN.replace("<turn>{{ m.role }}\n", turn)
    assert thoughts(template)[1] == "Sure<end>"
    node = with_template(template)
    _, made, _ = completion(node, "Sure", [{"role": "user", "content": "a?"}])
    assert node.tokenizer.decode(made) == "<think>\n\n</think>\n\nSure<end>"


def test_thoughts_that_the_prompt_leaves_open_are_for_a_string_to_go_on_from():
    node = with_template(QWEN.replace("<think>\n\n</think>\n\n", "<think>\n"))
    asked = {"messages": [{"role": "user", "content": "a?"}], "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(RecordError, match=r"ends the prompt in row 0 with '<think>\\n', .* as a string that goes on"):
        completion(node, [{"role": "assistant", "content": "Sure"}], asked)
    prompt, made, _ = completion(node, "no</think>Sure", asked)
    assert node.tokenizer.decode(prompt).endswith("<think>\n")
    assert node.tokenizer.decode(made) == "no</think>Sure<end>"


@pytest.mark.parametrize(
    ("template", "ends"),
    {
        "a special token": ("{{ messages[-1].content }}<end>\n", [TURN]),
        "the first of two": ("{{ messages[-1].content }}<end>\n</s>", [TURN]),
        "an added token": ("{{ messages[-1].content }}\n</tool_call>", [271]),
        "none": ("{{ messages[-1].content }}\n", []),
        "a content that is written twice": ("{{ messages[-1].content }} {{ messages[-1].content }}<end>", [TURN]),
        "no content": ("<end>", []),
        "no turn": ("{{ raise_exception('no') }}<end>", []),
    }.values(),
)
def test_the_end_of_a_turn_is_read_off_the_template(template, ends):
    assert with_template(template).ends == tuple(dict.fromkeys([EOS, *ends]))


def test_special_tokens_that_end_nothing_stay_in_the_text():
    tokenizer = tokenizer_of("byte-level, Qwen")
    ids = tokenizer("red<tool_call>a</tool_call><image>", add_special_tokens=False)["input_ids"]
    texts = sampled_texts(tokenizer, [[*ids, TURN], [*ids, EOS], ids, [BOS, 0, *ids]], (EOS, TURN))
    assert [text.end for text in texts] == ["stop", "end", "cut", "cut"]
    assert set(texts) == {"red<tool_call>a</tool_call><image>"}


def test_a_text_of_another_tokenizer_or_an_edited_one_is_tokenized_and_counted():
    node, other = model("prepended, Zephyr"), model("byte-level, Qwen")
    asked = [{"role": "user", "content": "a?"}]
    ids = [node.tokenizer.convert_tokens_to_ids(token) for token in ("S", "u", "re", "</s>")]
    [text] = sampled_texts(node.tokenizer, [ids], (EOS,))
    assert text == "Sure"
    whole = [node.tokenizer.convert_tokens_to_ids(token) for token in ("Sure", "</s>")]
    plain = completion(node, str(text), asked)
    assert plain[1] == whole
    assert plain[2]["retokenized"] == 0
    _, made, features = completion(node, text, asked)
    assert made == ids
    assert features["retokenized"] == 0
    edited = SampledText("a", text.tokens, text.end, text.tokenizer)
    for component, value in ((other, text), (node, edited)):
        _, made, features = completion(component, value, asked)
        assert made == completion(component, str(value), asked)[1]
        assert features["retokenized"] == 1
        metrics = jax.jit(LanguageModel.log_prob_with_metrics, static_argnums=0)(
            component, params("words", "cut"), features, KEY
        )[1]
        np.testing.assert_array_equal(metrics["retokenized"], [1])


def test_tokens_without_room_and_those_that_the_decoder_has_not():
    node = model("byte-level")
    [text, cut] = sampled_texts(node.tokenizer, [[70] * 7, [70, 71]], (EOS,))
    with pytest.raises(RecordError, match=r"completion in row 0 has 7 tokens, outside 1\.\.5: raise max_new_tokens"):
        completion(node, text, "a")
    shorter = dataclasses.replace(node, truncation="keep_start")
    assert completion(shorter, text, "a")[1] == [70] * 5
    assert completion(shorter, text, "a")[2]["truncated"] == 1
    # One that was cut gets no end, whatever room there is.
    assert completion(node, cut, "a")[1] == [70, 71]
    small = dataclasses.replace(node, decoder=Decoder(dataclasses.replace(CONFIG, vocab_size=71)))
    with pytest.raises(RecordError, match=r"completion in row 0 holds the token 'b' \(id 71\), but the decoder knows"):
        completion(small, cut, "a")


def test_the_fingerprint_is_of_what_ids_mean():
    tokenizer = tokenizer_of("byte-level")
    first = facts_of(tokenizer).fingerprint
    again_made = tokenizer_of("byte-level, Qwen")
    again_made.padding_side, again_made.pad_token = "left", again_made.eos_token
    assert facts_of(again_made).fingerprint == first
    assert facts_of(tokenizer_of("prepended")).fingerprint != first
    tokenizer.add_tokens(["<new>"])
    assert facts_of(tokenizer).fingerprint != first


def test_a_tokenizer_of_python_code():
    """transformers' slow tokenizers have no Rust backend."""
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("red ❄", add_special_tokens=False)["input_ids"]
    [text] = sampled_texts(tokenizer, [[*ids, tokenizer.eos_token_id]], (tokenizer.eos_token_id,))
    assert (text, text.end) == ("red ❄", "end")
    assert own_tokens(tokenizer, text) == [*ids, tokenizer.eos_token_id]
